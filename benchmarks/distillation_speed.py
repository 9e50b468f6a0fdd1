"""Images per second of the product's distillation beside a minimal loop as the papers' code has it.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 benchmarks/distillation_speed.py --out FILE.json

The minimal loop (arXiv 2506.08591 and 2603.08100 as released): DistributedDataParallel, eager teacher, AdamW over all parameters, a barrier
and ``.item()`` in every step, on a GPU pure bf16. The product: ZeRO, float32 master weights, one exchange of losses and flags a step.
``kept`` is the product as it trains a recipe's second size with ``keep_features``: the teacher's features are read, not computed. All
distil the demo CLIP (or ``--model``) pruned to hidden = width on generated scenes, at the same batch. They take turns, ``--rounds``
times; a rate comes from the difference of a long and a short run, so that starting up does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms

from dgmr_tp import prune
from dgmr_tp.data import scenes
from dgmr_tp.data.images import Images
from dgmr_tp.distillation.distill import distill
from dgmr_tp.distillation.engine import start_deepspeed, stop_deepspeed
from dgmr_tp.distillation.settings import DistillSettings
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.files import write_whole
from dgmr_tp.pruning import last_state
from dgmr_tp.recipe import Distill

SHORT, LONG = 20, 120


class Folder(Dataset):
    def __init__(self, images: Images, preprocess: dict, size: int) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(preprocess["mean"], preprocess["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.images.read(index))


class Features(torch.nn.Module):
    """Class token and patch tokens of the last block."""

    def __init__(self, opened: OpenedModel) -> None:
        super().__init__()
        self.tower, self.walk = opened.encoder.module, opened.encoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        class_token, patches = self.walk.features(last_state(self.walk, images))
        return class_token, patches


def minimal(teacher: OpenedModel, student: OpenedModel, images: Images, batch: int, steps: int, workers: int) -> None:
    """``steps`` steps of the papers' loop."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = Features(teacher).to(device, precision).eval().requires_grad_(False)
    ddp = DistributedDataParallel(Features(student).to(device, precision).train(), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.04)
    crops = Folder(images, teacher.preprocess_config, teacher.image_size)
    share = batch // distributed.get_world_size()
    step = 0
    while step < steps:
        for pictures in DataLoader(crops, share, sampler=DistributedSampler(crops), num_workers=workers, drop_last=True):
            pictures = pictures.to(device, precision)
            with torch.no_grad():
                class_wanted, patches_wanted = wanted(pictures)
            class_token, patches = ddp(pictures)
            loss = F.mse_loss(class_token, class_wanted) + F.mse_loss(patches, patches_wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            distributed.barrier()
            loss.item()
            step += 1
            if step == steps:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    start_deepspeed()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    place = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(place)
    folder = Path(str(place[0]))
    if rank == 0:
        scenes.write_classification(folder / "images", 512, seed=3)
    distributed.barrier()
    images = Images.find(folder / "images")

    def product(teacher: OpenedModel, student: OpenedModel, steps: int, name: str, features: Path | None = None) -> None:
        section = {"steps": steps, "batch_size": args.batch, "base_lr": 1e-5, "weight_decay": 0.04, "workers": args.workers}
        section |= {"bf16": torch.cuda.is_available(), "checkpoint_every": 10**9, "zero_stage": args.zero_stage}
        distill(teacher, student, images, DistillSettings.of(Distill(**section).model_dump(), seed=0), folder / name, features)

    def timed(which: str, steps: int, turn: int) -> float:
        teacher = open_model(args.model)
        student = prune(teacher, criterion="l2", mlp_ratio=1).model
        distributed.barrier()
        started = time.perf_counter()
        if which == "product":
            product(teacher, student, steps, f"{turn}-{steps}")
        elif which == "kept":
            product(teacher, student, steps, f"kept-{turn}-{steps}", folder / "features")
        else:
            minimal(teacher, student, images, args.batch, steps, args.workers)
        distributed.barrier()
        return time.perf_counter() - started

    timed("kept", LONG, -1)  # fills the file
    rates: dict[str, list[float]] = {"minimal": [], "product": [], "kept": []}
    for turn in range(args.rounds):
        for which in rates:
            short, long = (timed(which, steps, turn) for steps in (SHORT, LONG))
            rates[which].append(args.batch * (LONG - SHORT) / (long - short))
            if rank == 0:
                print(f"{which:<8} {rates[which][-1]:.1f} images/s", flush=True)
    if rank == 0:
        ratio, saved = (
            statistics.median(a / b for a, b in zip(rates[first], rates[second], strict=True))
            for first, second in (("product", "minimal"), ("kept", "product"))
        )
        print(f"product / minimal: {ratio:.2f}, with kept features / without: {saved:.2f}")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        setting = {
            "device": device,
            "processes": world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "model": args.model,
        }
        write_whole(
            args.out,
            json.dumps(
                {**setting, "batch": args.batch, "zero_stage": args.zero_stage, "rates": rates, "ratio": ratio, "kept_ratio": saved},
                indent=1,
            )
            + "\n",
        )
    stop_deepspeed()


if __name__ == "__main__":
    main()
