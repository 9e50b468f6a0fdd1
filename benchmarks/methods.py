"""Compare all selection methods at equal numbers of parameters, before and after closed-form recovery.

    export CIFAR10_DIR=.../cifar10
    python benchmarks/methods.py --dinov2 DINOV2.safetensors --encoder VIT.safetensors \\
        --out benchmarks/results/methods.json

There are six encoders, and ``--only`` chooses among them:

- ``dinov2s``, ``dinov2s-224``: a pretrained DINOv2 ViT-S/14 at 98 and at 224 pixels, on CIFAR-10 photographs. Its head
  is a logistic regression on the dense embeddings of 3,000 training images. 1,000 test images.
- ``cifar``: timm ``vit_tiny_patch16_224(img_size=32, patch_size=4, depth=6)``, trained on CIFAR-10.
- ``demo``: the demo CLIP on generated scenes.
- ``swiglu`` and ``swin``: small encoders that this script trains for a few epochs. Their weights are stored next to
  ``--out``.

Every method and every recovery uses the same 1,024 unlabeled training images. The seed draws these images and the
neurons of ``random``. Methods whose name ends in ``, tuned`` select on these images, are recovered on 4,096 images that
contain them, and then every block is tuned for 500 steps. AMP's search runs at several thresholds, and the other
methods then get as many parameters as the search kept.

The figures are measured on 2,000 test images (1,000 for ``dinov2s``):

- the accuracy of the dense model's head (zero-shot for ``demo``)
- the mean cosine to the dense embedding, and the mean cosine of the patch tokens after the final norm
- the share of the ten nearest neighbors in an index of dense embeddings that the new embedding finds too
- for the first seed, the k-NN accuracy (k = 20, T = 0.07)

Index and k-NN bank are 2,000 training images (3,000 for ``dinov2s``).

At an eighth of the neurons, four methods are also distilled for 1,000 steps of 64 unlabeled images. That run is
measured after 100 and after 1,000 steps. AMP's search is repeated with fewer images, to find out how few it needs.

Each cell is written to the JSON as soon as it is computed, so an interrupted run resumes. At the end, the script prints
the tables and draws ``methods.svg`` next to the JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import corp
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from train_cifar10_clip import load_split, normalize, train

from dgmr_tp import prune
from dgmr_tp.compression.amp_search import SearchConfig, search
from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.planning import make_plan
from dgmr_tp.compression.rankings import rank
from dgmr_tp.data.images import Images
from dgmr_tp.data.scenes import CLASSNAMES, TEMPLATES, Scene
from dgmr_tp.distillation.engine import parameter_groups
from dgmr_tp.distillation.losses import DistillationLoss, FeatureTap
from dgmr_tp.encoders import adapt, open_model, wrap_tower
from dgmr_tp.pruning import Plan, last_state
from dgmr_tp.pruning.cost import parameters
from dgmr_tp.pruning.output_selection import NUM_SENSITIVITY_IMAGES
from dgmr_tp.utils.files import atomic_write
from dgmr_tp.utils.knn import nearest, nearest_classes

UNIFORM_WIDTH_METHODS = ("random", "l1", "l2", "taylor", "amp", "dgmr", "activation", "output")
FITTED_WIDTHS = "output, fitted widths"
CORP = "corp"
"""Selection and compensation of a peer; see ``corp.py``."""
TUNED = ", tuned"
"""Suffix of the methods whose blocks are tuned."""
TUNE_STEPS, NUM_TUNING_IMAGES = 500, 4096
MATCHED_METHODS = ("random", "l2", "taylor", "amp", "dgmr")
SEARCH_THRESHOLDS = {"amp search": (1e-2,), "amp search, two-sided": (5e-3, 2e-2, 8e-2)}
SEARCH_IMAGES = {"amp search, two-sided": (2e-2, (64, 256))}
"""Method to a threshold and the numbers of images with which its search is repeated."""
DISTILLED_METHODS = ("random", "amp", "dgmr", FITTED_WIDTHS)
DISTILLATION_STEPS = (100, 1000)
NUM_IMAGES, TESTED = 1024, 2000
NUM_HEAD_IMAGES = 3000
"""Training images on which the head of ``dinov2s`` is fitted. They are also its k-NN bank."""
NUM_NEIGHBORS = 10


@dataclass
class Subject:
    """An encoder and the images that it is measured on."""

    tower: nn.Module
    head: Callable[[Tensor], Tensor]
    """Map embeddings to class scores."""
    train: Tensor
    """Preprocessed training images. The first ``num_bank`` are the k-NN bank, and calibration draws from the others."""
    labels: Tensor
    """Class numbers of ``train``."""
    test: Tensor
    answers: Tensor
    """Class numbers of ``test``."""
    num_bank: int = TESTED
    """Number of images in the k-NN bank."""

    def calibration(self, seed: int, count: int = NUM_IMAGES) -> list[Tensor]:
        """Return ``count`` training images, drawn by ``seed``, in batches of 128."""
        generator = torch.Generator().manual_seed(seed)
        order = self.num_bank + torch.randperm(len(self.train) - self.num_bank, generator=generator)
        return [batch.to(self.device) for batch in self.train[order[:count]].split(128)]

    @property
    def device(self) -> torch.device:
        """Device of the tower. Images and outputs stay on the CPU."""
        return next(self.tower.parameters()).device


def demo() -> Subject:
    """Return the demo CLIP with its zero-shot head and generated scenes."""
    opened = open_model("demo")
    clip = opened.module.eval()
    with torch.no_grad():
        prompts = [
            clip.encode_text(opened.tokenizer([t.format(c=name) for t in TEMPLATES]), normalize=True).mean(0)
            for name in CLASSNAMES
        ]
    texts = F.normalize(torch.stack(prompts), dim=-1)
    scenes = {
        seed: [Scene.draw(seed, i) for i in range(count)] for seed, count in ((201, TESTED + 4096), (202, TESTED))
    }
    pictures = {
        seed: torch.stack([opened.preprocess(Image.fromarray(scene.image())) for scene in drawn])
        for seed, drawn in scenes.items()
    }
    labels = {seed: torch.tensor([scene.label for scene in drawn]) for seed, drawn in scenes.items()}
    return Subject(
        clip.visual, lambda z: F.normalize(z, dim=-1) @ texts.T, pictures[201], labels[201], pictures[202], labels[202]
    )


def on_cifar(model: nn.Module) -> Subject:
    """Return a timm classifier with CIFAR-10. Its classifier becomes the head."""
    root = Path(os.environ["CIFAR10_DIR"])
    (images, labels), (test, answers) = load_split(root, "train"), load_split(root, "test")
    head, limit = model.get_classifier(), TESTED + 8192
    model.reset_classifier(0)
    pictures = normalize(images[:limit]), labels[:limit], normalize(test[:TESTED]), answers[:TESTED]
    return Subject(model.eval(), head, *pictures)


def dinov2s(weights: Path, image_size: int, pool: int) -> Subject:
    """Return a pretrained DINOv2 ViT-S/14 with CIFAR-10 and a head fitted on its dense embeddings.

    Args:
        weights: safetensors file of timm's ``vit_small_patch14_dinov2``.
        image_size: height and width of the images.
        pool: number of training images from which calibration draws.
    """
    opened = open_model("timm:vit_small_patch14_dinov2", str(weights), image_size=image_size)
    root = Path(os.environ["CIFAR10_DIR"])
    labels, answers = load_split(root, "train")[1], load_split(root, "test")[1]

    def preprocessed(split: str, count: int) -> Tensor:
        images = Images.find(root / split)
        return torch.stack([opened.preprocess(images.read(index)) for index in range(count)])

    train, test = preprocessed("train", NUM_HEAD_IMAGES + pool), preprocessed("test", 1000)
    dense = embeddings(opened.tower.eval(), train[:NUM_HEAD_IMAGES])
    mean, deviation = dense.mean(0), dense.std(0)
    regression = LogisticRegression(max_iter=2000).fit((dense - mean) / deviation, labels[:NUM_HEAD_IMAGES])
    weight, bias = torch.from_numpy(regression.coef_).float(), torch.from_numpy(regression.intercept_).float()
    return Subject(
        opened.tower,
        lambda z: (z - mean) / deviation @ weight.T + bias,
        train,
        labels[: len(train)],
        test,
        answers[: len(test)],
        num_bank=NUM_HEAD_IMAGES,
    )


def cifar(encoder: Path) -> nn.Module:
    """Load the ViT that was trained on CIFAR-10 from a safetensors file."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(encoder).items()})
    return model


def train_or_load(name: str, build: Callable[[], nn.Module], folder: Path, epochs: int) -> nn.Module:
    """Train a model on CIFAR-10, or load it if an earlier call trained it.

    The weights are in ``folder/NAME.safetensors``.
    """
    torch.manual_seed(0)
    model, file = build(), folder / f"{name}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    images, labels = load_split(Path(os.environ["CIFAR10_DIR"]), "train")
    train(model, images, labels, epochs)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file)
    return model


def swiglu() -> nn.Module:
    options = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 6,
        "num_classes": 10,
        "mlp_layer": SwiGLUPacked,
        "mlp_ratio": 16 / 3,
    }
    return timm.create_model("vit_tiny_patch16_224", **options)


def swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=64,
        depths=(2, 4),
        num_heads=(2, 4),
        num_classes=10,
        drop_path_rate=0.0,
    )


@torch.no_grad()
def embeddings(tower: nn.Module, images: Tensor) -> Tensor:
    device = next(tower.parameters()).device
    return torch.cat([tower(batch.to(device)).cpu() for batch in images.split(250)])


@dataclass
class Outputs:
    """Outputs of a tower for a subject's images."""

    embedding: Tensor
    """Of the test images, ``[images, width]``."""
    patches: Tensor
    """Patch tokens of the test images after the final norm, ``[images, patches, width]``."""
    bank: Tensor
    """Embeddings of the k-NN bank; empty if it was not asked for."""


@torch.no_grad()
def outputs(subject: Subject, tower: nn.Module, with_bank: bool = True) -> Outputs:
    """Return the outputs of ``tower`` for the images of ``subject``."""
    adapter = adapt(tower)
    states = [last_state(adapter, batch.to(subject.device)) for batch in subject.test.split(250)]
    return Outputs(
        torch.cat([adapter.embed(state).cpu() for state in states]),
        torch.cat([adapter.features(adapter.norm(state))[1].cpu() for state in states]),
        embeddings(tower, subject.train[: subject.num_bank]) if with_bank else subject.train.new_empty(0),
    )


def measured(subject: Subject, tower: nn.Module, dense: Outputs, with_knn: bool = False) -> dict[str, float]:
    """Return the test figures of a tower: accuracies and overlap in percent, and mean cosines to the dense tower.

    Args:
        subject: gives the head and the images.
        tower: the tower to measure.
        dense: outputs of the dense tower.
        with_knn: also measure k-NN accuracy.
    """
    pruned = outputs(subject, tower, with_bank=with_knn)
    with torch.no_grad():
        accuracy = (subject.head(pruned.embedding).argmax(1) == subject.answers).float().mean()
    old, new = (nearest(dense.bank, queries, NUM_NEIGHBORS)[1] for queries in (dense.embedding, pruned.embedding))
    figures = {
        "head": 100 * float(accuracy),
        "cosine": float(F.cosine_similarity(pruned.embedding, dense.embedding).mean()),
        "patches": float(F.cosine_similarity(pruned.patches, dense.patches, dim=-1).mean()),
        "overlap": 100 * float((old[:, :, None] == new[:, None, :]).any(-1).float().mean()),
    }
    if with_knn:
        predictions = nearest_classes(pruned.bank, subject.labels[: subject.num_bank], pruned.embedding)
        figures["knn"] = 100 * float((predictions == subject.answers).float().mean())
    return figures


def recovered_tower(subject: Subject, images: list[Tensor], plan: Plan, tune_steps: int = 0) -> nn.Module:
    """Return the subject's tower, pruned by ``plan``, recovered on ``images`` and tuned."""
    return prune(subject.tower, images, plan=plan, tune_steps=tune_steps).model


def cell(
    subject: Subject,
    plan: Plan,
    recover: Callable[[], nn.Module],
    dense: Outputs,
    seconds: float,
    seed: int,
) -> dict[str, object]:
    """Return the figures of a plan, before and after recovery.

    Args:
        subject: the encoder and its images.
        plan: the neurons to keep.
        recover: returns the tower after the plan and the recovery.
        dense: outputs of the dense tower.
        seconds: time that the plan took.
        seed: of the draw. The first draw has k-NN figures too.
    """
    pruned_tower = prune(subject.tower, plan=plan).model
    started = time.perf_counter()
    recovered = recover()
    return {
        "recovery_seconds": time.perf_counter() - started,
        "parameters": parameters(pruned_tower),
        "widths": [len(site.kept) for site in plan.sites.values()],
        "pruned": measured(subject, pruned_tower, dense),
        "recovered": measured(subject, recovered, dense, with_knn=seed == 0),
        "seconds": seconds,
    }


def distilling(
    tower: nn.Module, model: nn.Module, batches: Iterable[Tensor], *, steps: int, peak: float, weight_decay: float
) -> Iterator[int]:
    """Distill ``tower`` into ``model`` in place with the product's loss, and yield the number of each finished step.

    The optimizer is AdamW. The learning rate warms up for 20 steps and then follows a cosine.
    """
    teacher, student, loss = FeatureTap(adapt(tower)), FeatureTap(adapt(model)), DistillationLoss()
    optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay), lr=peak, betas=(0.9, 0.95))

    def rate_factor(step: int) -> float:
        return min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    for step, images in enumerate(batches, start=1):
        with torch.no_grad():
            target = teacher(images)
        loss.total(loss(student(images), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step


def distilled(subject: Subject, plan: Plan, calibration: list[Tensor], dense: Outputs) -> dict[str, object]:
    """Apply a plan, recover, distill, and return the figures after each of ``DISTILLATION_STEPS``.

    Distillation uses 64 images a step and a peak learning rate of 2.5e-4. See :func:`distilling`.
    """
    torch.manual_seed(0)
    model = copy.deepcopy(prune(subject.tower, calibration, plan=plan).model).requires_grad_(True)
    pool, result = subject.train[subject.num_bank :], {}
    batches = (pool[torch.randint(len(pool), (64,))].to(subject.device) for _ in range(DISTILLATION_STEPS[-1]))
    for step in distilling(subject.tower, model, batches, steps=DISTILLATION_STEPS[-1], peak=2.5e-4, weight_decay=0.05):
        if step in DISTILLATION_STEPS:
            result[str(step)] = measured(subject, model.eval(), dense, with_knn=True)
    return {"widths": [len(site.kept) for site in plan.sites.values()], "distilled": result}


def run(
    name: str, subject: Subject, store: Store, sizes: dict[str, int], chosen: list[str], searches: bool, limit: int
) -> None:
    """Compute all missing cells of one encoder.

    Args:
        name: the encoder's name in the cell keys.
        subject: the encoder and its images.
        store: receives the cells.
        sizes: share of neurons to keep, such as ``"1/8"``, to the number of seeds.
        chosen: methods to compare.
        searches: also run AMP's searches and the distillations.
        limit: maximum number of seeds.
    """
    model = wrap_tower(subject.tower)
    dense, sites = outputs(subject, subject.tower), model.sites
    store.cell(
        name,
        "dense",
        "1",
        0,
        lambda: {"parameters": parameters(subject.tower), **measured(subject, subject.tower, dense, True)},
    )

    def compare_methods(
        size: str, seed: int, amount: dict, total: dict, methods: tuple[str, ...] = UNIFORM_WIDTH_METHODS
    ) -> None:
        calibration = subject.calibration(seed)

        def make(method: str) -> dict[str, object]:
            started, untuned = time.perf_counter(), method.removesuffix(TUNED)
            if method == CORP:
                statistics = corp.collect(model, calibration)
                plan = corp.make_plan(model, statistics, amount["keep"])
                seconds = time.perf_counter() - started
                return cell(subject, plan, lambda: corp.compensated(model, plan, statistics), dense, seconds, seed)
            if untuned == FITTED_WIDTHS:
                if (name, seed) not in store.rankings:
                    store.rankings[name, seed] = rank(model, "output", CalibrationImages(calibration))
                plan = store.rankings[name, seed].plan(model, **total)
            else:
                plan = make_plan(model, untuned, CalibrationImages(calibration), seed=seed, **amount)
            seconds = time.perf_counter() - started
            images, steps = calibration, 0
            if method != untuned:
                images, steps = subject.calibration(seed, NUM_TUNING_IMAGES), TUNE_STEPS
            recover = partial(recovered_tower, subject, images, plan, steps)
            return cell(subject, plan, recover, dense, seconds, seed)

        for method in (*methods, FITTED_WIDTHS, *((CORP,) if "keep" in amount else ())):
            for variant in (method, method + TUNED):
                if variant in chosen:
                    store.cell(name, variant, size, seed, partial(make, variant))

    for size, seeds in sizes.items():
        share = Fraction(size)
        keep = {site.name: int(share * site.hidden) for site in sites}
        count = parameters(prune(subject.tower, criterion="l2", keep=keep).model)
        for seed in range(min(seeds, limit)):
            compare_methods(size, seed, {"keep": keep}, {"budget": {"params": count}})
    calibration = subject.calibration(0)

    def amp_search(method: str, threshold: float, count: int = NUM_IMAGES) -> dict[str, object]:
        started, images = time.perf_counter(), list(torch.cat(calibration)[:count].split(128))
        options = {"two_sided": "two-sided" in method, "candidates": min(512, count)}
        config = SearchConfig.model_validate(options)
        result = search(model, CalibrationImages(images), threshold=threshold, config=config)
        recover = partial(recovered_tower, subject, calibration, result.plan)
        figures = cell(subject, result.plan, recover, dense, time.perf_counter() - started, 0)
        return {**figures, "image_blocks": result.image_blocks, "entropy": result.entropy}

    for method, thresholds in SEARCH_THRESHOLDS.items() if searches else ():
        for threshold in thresholds:
            size = f"ΔE {threshold:g}{' two-sided' if 'two-sided' in method else ''}"
            store.cell(name, method, size, 0, partial(amp_search, method, threshold))
            budget = {"budget": {"params": store.cells[f"{name} | {method} | {size} | 0"]["parameters"]}}
            compare_methods(size, 0, budget, budget, MATCHED_METHODS)
    for method, (threshold, counts) in SEARCH_IMAGES.items() if searches else ():
        for count in counts:
            store.cell(
                name,
                f"{method}, {count} images",
                f"ΔE {threshold:g} two-sided",
                0,
                partial(amp_search, method, threshold, count),
            )
    for method in DISTILLED_METHODS if searches else ():

        def train_on(method: str = method) -> dict[str, object]:
            count = store.cells[f"{name} | {FITTED_WIDTHS} | 1/8 | 0"]["parameters"]
            if method == FITTED_WIDTHS:
                plan = rank(model, "output", CalibrationImages(calibration)).plan(model, budget={"params": count})
            else:
                plan = make_plan(
                    model, method, CalibrationImages(calibration), keep={s.name: s.hidden // 8 for s in sites}
                )
            return distilled(subject, plan, calibration, dense)

        store.cell(name, method, "1/8 distilled", 0, train_on)


class Store:
    """Cells of figures in a JSON file. Each cell is computed once."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.device = torch.cuda.get_device_name() if device == "cuda" else device
        self.cells: dict[str, dict] = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
        self.rankings: dict = {}

    def cell(self, encoder: str, method: str, size: str, seed: int, make: Callable[[], dict]) -> None:
        """Compute a cell with ``make`` and write the file, unless the file has this cell already."""
        key = f"{encoder} | {method} | {size} | {seed}"
        if key in self.cells:
            return
        self.cells[key] = make()
        setting = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": self.device,
            "images": NUM_IMAGES,
        }
        atomic_write(self.path, json.dumps({**setting, "cells": self.cells}, indent=1) + "\n")
        row = self.cells[key]
        figures = f"{row['pruned']['head']:5.1f} → {row['recovered']['head']:5.1f}" if "pruned" in row else ""
        print(f"{key:<60} {figures}", flush=True)

    def tables(self) -> None:
        """Print one table per encoder and size, with the mean over the seeds and, for several seeds, their spread."""
        groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
        for key, row in self.cells.items():
            encoder, method, size, _ = key.split(" | ")
            groups.setdefault((encoder, size), {}).setdefault(method, []).append(row)
        for (encoder, size), methods in groups.items():
            if size == "1":
                [row] = methods["dense"]
                figures = f"head {row['head']:.1f}, k-NN {row['knn']:.1f}, {row['parameters']:,} parameters"
                print(f"\n{encoder}, dense: {figures}")
                continue
            if size.endswith("distilled"):
                print(f"\n{encoder}, {size}")
                print("| method | 100 steps: head | k-NN | cosine | 1,000 steps: head | k-NN | cosine |")
                print("|---|---|---|---|---|---|---|")
                for method, [row] in methods.items():
                    after = [row["distilled"][str(step)] for step in DISTILLATION_STEPS]
                    texts = [
                        f"{figures['head']:.1f} | {figures['knn']:.1f} | {figures['cosine']:.4f}" for figures in after
                    ]
                    print(f"| {method} | {' | '.join(texts)} |")
                continue
            print(f"\n{encoder}, {size}: {next(iter(methods.values()))[0]['parameters']:,} parameters")
            columns = [
                ("pruned: head", "pruned", "head", 1),
                ("recovered: head", "recovered", "head", 1),
                ("k-NN", "recovered", "knn", 1),
                ("cosine", "recovered", "cosine", 4),
                ("patches", "recovered", "patches", 4),
                ("same ten neighbors", "recovered", "overlap", 1),
            ]
            print(f"| method | {' | '.join(title for title, *_ in columns)} |\n|{'---|' * (1 + len(columns))}")
            for method, rows in methods.items():
                texts = []
                for _, stage, figure, digits in columns:
                    values = torch.tensor([row[stage][figure] for row in rows if figure in row[stage]])
                    spread = f" ± {float(values.std()):.{digits}f}" if len(values) > 1 else ""
                    texts.append(f"{float(values.mean()):.{digits}f}{spread}")
                print(f"| {method} | {' | '.join(texts)} |")
            for method, rows in methods.items():
                if "image_blocks" in rows[0]:
                    blocks = len(rows[0]["widths"])
                    sensitivity_cost = NUM_SENSITIVITY_IMAGES * (blocks + blocks * (blocks + 1) // 2)
                    ranking_cost = NUM_IMAGES * blocks + sensitivity_cost
                    search_cost = rows[0]["image_blocks"]
                    print(
                        f"cost in images × blocks, forward: {method} {search_cost:,}, ranking {ranking_cost:,}: "
                        f"{search_cost / ranking_cost:.0f} ×; {rows[0]['widths']}"
                    )

    def draw(self) -> None:
        """Draw the dense head's accuracy over the parameters, pruned (dashed) and recovered, one panel per encoder."""
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot

        encoders = list(dict.fromkeys(key.split(" | ")[0] for key in self.cells))
        figure, panels = pyplot.subplots(1, len(encoders), figsize=(5 * len(encoders), 4), squeeze=False)
        for encoder, panel in zip(encoders, panels[0], strict=True):
            rows = [(key.split(" | "), row) for key, row in self.cells.items() if key.startswith(f"{encoder} | ")]
            for index, method in enumerate((*UNIFORM_WIDTH_METHODS, FITTED_WIDTHS)):
                points = sorted(
                    (row["parameters"] / 1e6, row["pruned"]["head"], row["recovered"]["head"])
                    for (_, name, size, seed), row in rows
                    if name == method and "/" in size and "pruned" in row and seed == "0"
                )
                if points:
                    millions, pruned, recovered = zip(*points, strict=True)
                    panel.plot(millions, recovered, f"C{index}o-", label=method, markersize=3)
                    panel.plot(millions, pruned, f"C{index}--", linewidth=0.7)
            [dense] = [row["head"] for (_, name, *_), row in rows if name == "dense"]
            panel.axhline(dense, color="black", linewidth=0.7)
            panel.set(title=encoder, xlabel="million parameters", ylabel="accuracy of the original head, %")
        panels[0][0].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(self.path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="weights of timm's vit_small_patch14_dinov2")
    parser.add_argument("--encoder", type=Path, required=True, help="the trained CIFAR-10 ViT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["dinov2s", "cifar", "demo", "swiglu", "swin"])
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[*UNIFORM_WIDTH_METHODS, FITTED_WIDTHS],
        help="methods to compare at equal numbers of parameters; 'dgmr, tuned' and the like tune the blocks",
    )
    parser.add_argument("--sizes", nargs="*", help="shares of neurons, such as 1/4 [default: all of the encoder]")
    parser.add_argument("--draws", type=int, default=3, help="maximum number of draws of calibration images")
    parser.add_argument("--no-searches", action="store_true", help="skip AMP's searches and the distillations")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tables", action="store_true", help="compute nothing, print the tables of the stored cells")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    store, weights = Store(args.out, args.device), args.out.parent / "weights"
    halves = {"1/4": 3, "1/2": 3, "1/8": 3}
    subjects = {
        "dinov2s": (lambda: dinov2s(args.dinov2, 98, 12288), halves, True),
        "dinov2s-224": (lambda: dinov2s(args.dinov2, 224, NUM_IMAGES), dict.fromkeys(halves, 1), False),
        "cifar": (lambda: on_cifar(cifar(args.encoder)), {"1/8": 3, "1/4": 3, "1/16": 1, "1/2": 1}, True),
        "demo": (demo, {"1/8": 3, "1/4": 3, "1/16": 1, "1/2": 1}, True),
        "swiglu": (lambda: on_cifar(train_or_load("swiglu", swiglu, weights, 4)), {"1/8": 1, "1/4": 1}, False),
        "swin": (lambda: on_cifar(train_or_load("swin", swin, weights, 4)), {"1/8": 1, "1/4": 1}, False),
    }
    # Seed limit and searches of each round. The cheap cells of all encoders come first.
    rounds = ((1, False), (args.draws, False)) if args.no_searches else ((1, False), (1, True), (args.draws, True))
    for limit, searching in () if args.tables else rounds:
        for name in args.only:
            build, sizes, searches = subjects[name]
            sizes = {size: draws for size, draws in sizes.items() if args.sizes is None or size in args.sizes}
            subject = build()
            subject.tower.to(args.device)
            run(name, subject, store, sizes, args.methods, searches and searching, limit)
    store.tables()
    store.draw()


if __name__ == "__main__":
    main()
