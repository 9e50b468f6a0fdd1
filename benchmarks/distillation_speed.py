"""Throughput of the distillation, compared with a minimal loop like the one in the papers' code.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 benchmarks/distillation_speed.py --out FILE.json

The loops:

- ``minimal`` (as released with arXiv 2506.08591 and 2603.08100): DistributedDataParallel, eager teacher, AdamW over all
  parameters, a barrier and ``.item()`` in every step; pure bf16 on a GPU.
- ``zero0``: ours, without sharding, as in the minimal loop. Not measured in bf16, which needs ZeRO's master weights.
- ``zero1``: ours, with sharded optimizer states. Float32 master weights, one all-reduce of losses and flags a step.
- ``cached``: ``zero1`` with the teacher's features read from the cache, as for the second size of a recipe with
  ``keep_features``.

All distill the demo CLIP (or ``--model``), pruned to hidden = width, on generated scenes with the same batch size. They
take turns for ``--rounds`` rounds, because the speed of a machine drifts. The rate of a turn is measured over its last
``MEASURED_STEPS`` steps: by the median step, which other work on the machine disturbs little, and by the mean.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import pairwise
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
from dgmr_tp.distillation.config import DistillConfig
from dgmr_tp.distillation.distill import distill
from dgmr_tp.distillation.engine import start_deepspeed, stop_deepspeed
from dgmr_tp.distillation.loop import read_curve
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.pruning import last_state
from dgmr_tp.utils.files import atomic_write

WARMUP_STEPS, MEASURED_STEPS = 20, 40
STEPS = WARMUP_STEPS + MEASURED_STEPS


class CropDataset(Dataset):
    """Random crops, as in the papers' code."""

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
        self.tower, self.adapter = opened.tower, opened.adapter

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        class_token, patches = self.adapter.features(last_state(self.adapter, images))
        return class_token, patches


def minimal(teacher: OpenedModel, student: OpenedModel, images: Images, batch: int, workers: int) -> None:
    """Train with the papers' loop."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher_features = Features(teacher).to(device, precision).eval().requires_grad_(False)
    ddp = DistributedDataParallel(Features(student).to(device, precision).train(), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.04)
    crops = CropDataset(images, teacher.preprocess_config, teacher.image_size)
    share = batch // distributed.get_world_size()
    step = 0
    while step < STEPS:
        for batch_images in DataLoader(
            crops, share, sampler=DistributedSampler(crops), num_workers=workers, drop_last=True
        ):
            batch_images = batch_images.to(device, precision)
            with torch.no_grad():
                teacher_class_token, teacher_patches = teacher_features(batch_images)
            class_token, patches = ddp(batch_images)
            loss = F.mse_loss(class_token, teacher_class_token) + F.mse_loss(patches, teacher_patches)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            distributed.barrier()
            loss.item()
            step += 1
            if step == STEPS:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    start_deepspeed()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    shared = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(shared)
    folder = Path(str(shared[0]))
    if rank == 0:
        scenes.write_classification(folder / "images", 512, seed=3)
    distributed.barrier()
    images = Images.find(folder / "images")

    def ours(teacher: OpenedModel, student: OpenedModel, directory: Path, stage: int, features: Path | None) -> None:
        section = {
            "steps": STEPS,
            "batch_size": args.batch,
            "base_lr": 1e-5,
            "weight_decay": 0.04,
            "workers": args.workers,
        }
        section |= {
            "bf16": torch.cuda.is_available(),
            "checkpoint_every": 10**9,
            "zero_stage": stage,
            "log_every": STEPS,
        }
        distill(teacher, student, images, DistillConfig(**section), directory, features=features)

    def turn(which: str, number: int) -> dict[str, float]:
        teacher = open_model(args.model, None if args.model == "demo" else "none")
        student = prune(teacher, criterion="l2", mlp_ratio=1).model
        starts: list[float] = []
        first = next(layer for layer in student.tower.modules() if isinstance(layer, torch.nn.Conv2d))
        first.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))  # once a step, in every loop
        directory = folder / f"{which}-{number}"
        if which == "minimal":
            minimal(teacher, student, images, args.batch, args.workers)
        else:
            stage, features = (1, folder / "features") if which == "cached" else (int(which[-1]), None)
            ours(teacher, student, directory, stage, features)
        times = [end - start for start, end in pairwise(starts[-MEASURED_STEPS:])]
        distributed.barrier()  # until rank 0 has written its curves
        curves = {name: read_curve(directory, name) for name in ("memory_gb", "share_of_peak")}
        figures = {name: curve[-1][1] for name, curve in curves.items() if curve}
        return {"median": args.batch / statistics.median(times), "mean": args.batch / statistics.mean(times), **figures}

    turn("cached", -1)  # fills the cache
    rates: dict[str, list[dict[str, float]]] = {which: [] for which in ("minimal", "zero0", "zero1", "cached")}
    if torch.cuda.is_available():
        del rates["zero0"]
    for number in range(args.rounds):
        for which, turns in rates.items():
            turns.append(turn(which, number))
            if rank == 0:
                print(f"{which:<8} {turns[-1]['median']:.1f} images/s, mean {turns[-1]['mean']:.1f}", flush=True)
    if rank == 0:
        pairs = [*((stage, "minimal") for stage in rates if stage.startswith("zero")), ("cached", "zero1")]
        ratios = {
            f"{first} / {second}, {kind}": statistics.median(
                one[kind] / other[kind] for one, other in zip(rates[first], rates[second], strict=True)
            )
            for kind in ("median", "mean")
            for first, second in pairs
        }
        for name, value in ratios.items():
            print(f"{name}: {value:.2f}")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        setting = {
            "device": device,
            "processes": world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "model": args.model,
        }
        atomic_write(
            args.out,
            json.dumps({**setting, "batch": args.batch, "images_per_second": rates, "ratios": ratios}, indent=1) + "\n",
        )
    stop_deepspeed()


if __name__ == "__main__":
    main()
