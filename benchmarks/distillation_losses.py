"""Quality of a recovered student by the number of images that its distillation sees, for every loss.

    CIFAR10_DIR=.../cifar10 DS_ACCELERATOR=cpu OMP_NUM_THREADS=2 torchrun --nproc_per_node 1 \\
        benchmarks/distillation_losses.py --model timm:vit_small_patch14_dinov2 --pretrained FILE --image-size 98 \\
        --student runs/dinov2-s/recover/mlp_ratio-1/model --out benchmarks/results/distillation_losses.json

One process with as many threads as there are cores: on a CPU, two processes would only add a copy of the teacher. Every
cell is a training of its own with the product's ``distill``, whose schedule ends at that number of images: 64 images a
step, random crops of at least half of a photograph, no image twice. The learning rate is found, except in the row whose
name has a rate. All trainings see the same crops in the same order, so that the teacher's features are cached.

Measured on photographs of the test split: the mean cosine to the dense embedding; the accuracy of a logistic regression
that is fitted on the dense embeddings of training photographs; and the share of the ten nearest neighbors in the dense
index of these that a query by the student's embedding finds.

Each cell is written to the JSON as soon as it is computed, so that an interrupted run resumes. At the end the script
prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dgmr_tp.data.images import Images
from dgmr_tp.distillation.config import DistillConfig
from dgmr_tp.distillation.distill import distill
from dgmr_tp.distillation.engine import start_deepspeed, stop_deepspeed
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.files import atomic_write
from dgmr_tp.utils.knn import nearest

WITHOUT_TOKENS = {"class_token": 0, "patches": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "class token + patches": {},
    "class token + patches, peak 1e-4": {"base_lr": 4e-4, "warmup_steps": 20},
    "balanced": {"loss": {"balanced": True}},
    "cosine": {"loss": {**WITHOUT_TOKENS, "cosine": 1}},
    "neighbors": {"loss": {**WITHOUT_TOKENS, "neighbors": 1}},
    "cosine + neighbors": {"loss": {**WITHOUT_TOKENS, "cosine": 10, "neighbors": 1}},
    "class token + patches + cosine": {"loss": {"cosine": 10}},
    "class token + patches + neighbors": {"loss": {"neighbors": 1}},
    "balanced + cosine + neighbors": {"loss": {"balanced": True, "cosine": 10, "neighbors": 1}},
}
"""Keys of a distillation by the name of its row. The weights bring the terms to the same order of size at the start."""
START = "start"
BATCH_SIZE, NUM_NEIGHBORS = 64, 10
INDEX_SEED, QUERY_SEED = 101, 102


class Measurement:
    """The dense encoder's index, its queries, and the head that is fitted on the index.

    Args:
        dense: the teacher.
        root: folder with the splits ``train`` and ``test``.
        index, queries: number of images of each.
    """

    def __init__(self, dense: OpenedModel, root: Path, index: int, queries: int) -> None:
        images, labels = Images.find(root / "train").sample_labeled(index, INDEX_SEED, dense.preprocess)
        self.index = embed(dense, images)
        self.queries, self.answers = Images.find(root / "test").sample_labeled(queries, QUERY_SEED, dense.preprocess)
        self.dense_queries = embed(dense, self.queries)
        self.neighbors = nearest(self.index, self.dense_queries, NUM_NEIGHBORS)[1]
        self.head = LogisticRegression(max_iter=2000).fit(self.index.numpy(), labels)

    def __call__(self, model: OpenedModel) -> dict[str, float]:
        embeddings = embed(model, self.queries)
        neighbors = nearest(self.index, embeddings, NUM_NEIGHBORS)[1]
        is_shared = (neighbors[:, :, None] == self.neighbors[:, None]).any(-1)
        return {
            "cosine": float(F.cosine_similarity(embeddings, self.dense_queries).mean()),
            "head": float(self.head.score(embeddings.numpy(), self.answers)),
            "overlap": float(is_shared.double().mean()),
        }


@torch.no_grad()
def embed(model: OpenedModel, images: Tensor) -> Tensor:
    """Return the embeddings of preprocessed images."""
    encoder = ImageEncoder(model.adapter).eval()
    device = next(encoder.parameters()).device
    return torch.cat([encoder(batch.to(device)).float().cpu() for batch in images.split(BATCH_SIZE)])


def train(
    teacher: OpenedModel, student: OpenedModel, images: Images, name: str, seen: int, folder: Path
) -> dict[str, Any]:
    """Distill ``student`` in place with the variant ``name`` on ``seen`` images, and return the figures."""
    steps = seen // BATCH_SIZE
    fixed = {"steps": steps, "batch_size": BATCH_SIZE, "min_crop": 0.5, "checkpoint_every": steps}
    config = DistillConfig(**fixed, **VARIANTS[name])
    features = folder / f"{'-'.join(sorted(config.loss.features))}.features"
    training = folder / f"{name}, {seen}"
    figures = distill(teacher, student, images, config, training, features=features)
    assert figures
    shutil.rmtree(training)
    return {"steps": steps, "peak_learning_rate": figures["peak_learning_rate"]}


def print_table(rows: list[dict[str, Any]], budgets: list[int]) -> None:
    """Print a line for each loss, with cosine, head and overlap at each number of images."""
    cells = {
        (row["loss"], row["images"]): f"{row['cosine']:.4f}, {100 * row['head']:.1f}, {100 * row['overlap']:.1f}"
        for row in rows
    }
    print(f"| loss | {' | '.join(f'{seen:,}' for seen in budgets)} |\n|---|{'---|' * len(budgets)}")
    for name in (START, *VARIANTS):
        print(f"| {name} | {' | '.join(cells.get((name, seen), '–') for seen in budgets)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pretrained")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--student", required=True, help="model directory of the recovered student")
    parser.add_argument("--images-seen", type=int, nargs="+", default=[2048, 5120, 10240, 20480])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--index", type=int, default=3000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    root, folder = Path(os.environ["CIFAR10_DIR"]), args.out.with_suffix(".work")
    start_deepspeed()
    teacher = open_model(args.model, pretrained=args.pretrained, image_size=args.image_size)
    measure, images = Measurement(teacher, root, args.index, args.queries), Images.find(root / "train")
    setting = {"model": args.model, "student": args.student, "index": args.index, "queries": args.queries}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    result: dict[str, Any] = {**setting, **machine, "rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text("utf-8"))
        if changed := [key for key, value in setting.items() if result[key] != value]:
            parser.error(
                f"{args.out} was measured with another {changed[0]}: {result[changed[0]]}. Choose another --out"
            )
    rows: list[dict[str, Any]] = result["rows"]

    def add(name: str, seen: int) -> None:
        if any((row["loss"], row["images"]) == (name, seen) for row in rows):
            return
        student, started = open_model(args.student), time.monotonic()
        figures = train(teacher, student, images, name, seen, folder) if seen else {}
        figures |= {"seconds": round(time.monotonic() - started)} if seen else {}
        rows.append({"loss": name, "images": seen, **figures, **measure(student)})
        print(rows[-1], flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out, json.dumps(result, indent=1) + "\n")

    result["dense"] = measure(teacher)
    add(START, 0)
    for seen in args.images_seen:
        for name in args.only:
            add(name, seen)
    print_table(rows, [0, *args.images_seen])
    shutil.rmtree(folder, ignore_errors=True)
    stop_deepspeed()


if __name__ == "__main__":
    main()
