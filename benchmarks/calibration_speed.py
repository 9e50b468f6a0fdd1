"""Time of ranking and recovery, in plain forward passes of the same tower over the same images.

    python benchmarks/calibration_speed.py --out benchmarks/results/calibration_speed.json

The towers have random weights and the shapes of ViT-S/14 (257 tokens) and ViT-B/16 (197 tokens). All stages of a tower
are timed in one process, between two forward passes whose mean is the unit. Recovery is that of ``mlp_ratio=1``.

The parts of a stage are timed inside it: products of activations (``Moments.add``), the greedy selection, the
sensitivity walk, and the solves. The rest is forward passes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch

from dgmr_tp import prune
from dgmr_tp.encoders import wrap_tower
from dgmr_tp.pruning import ImageEncoder, output_selection, rank_tower, recover, recovery
from dgmr_tp.pruning.calibration import Moments
from dgmr_tp.utils.files import atomic_write

TOWERS = {
    "ViT-S/14": ("vit_small_patch14_dinov2", 224),
    "ViT-B/16": ("vit_base_patch16_224", 224),
}
PARTS = {
    "products": (Moments, "add"),
    "greedy": (output_selection, "rank_neurons"),
    "sensitivity": (output_selection, "_embeddings"),
    "solves": (recovery, "_refit_layer"),
}
"""Functions whose time is shown separately."""


@contextmanager
def timed_parts() -> Iterator[Counter[str]]:
    """Add up the seconds inside the functions of :data:`PARTS` by name."""
    seconds: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[name] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield seconds


@torch.no_grad()
def measure(name: str, size: int, count: int, batch_size: int) -> dict[str, Any]:
    """Return the seconds of a forward pass over all images and of every stage, with its parts."""
    model = wrap_tower(timm.create_model(name, img_size=size).eval())
    adapter = model.adapter
    images = list(torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).split(batch_size))
    encoder = ImageEncoder(adapter)
    pruned = prune(model, criterion="l2", mlp_ratio=1).model
    picks = {site.name: site.width for site in model.sites}
    stages: dict[str, Callable[[], Any]] = {
        "rank, one size": lambda: rank_tower(adapter, images, picks=picks),
        "rank, all sizes": lambda: rank_tower(adapter, images),
        "recover": lambda: recover(adapter, pruned.adapter, images),
    }

    def forward() -> float:
        start = time.perf_counter()
        for batch in images:
            encoder(batch)
        return time.perf_counter() - start

    encoder(images[0])  # warm-up
    forwards, rows = [forward()], {}
    for stage, work in stages.items():
        with timed_parts() as parts:
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        rows[stage] = {"seconds": seconds, "parts": dict(parts)}
        forwards.append(forward())
    return {"images": count, "forward_seconds": forwards, "stages": rows}


def print_table(rows: dict[str, Any]) -> None:
    """Print each stage in forward passes, with the share of each part."""
    print("| tower | stage | forward passes | " + " | ".join((*PARTS, "rest")) + " |")
    print("|---|---|---|" + "---|" * (len(PARTS) + 1))
    for tower, row in rows.items():
        unit = sum(row["forward_seconds"]) / len(row["forward_seconds"])
        for stage, figures in row["stages"].items():
            parts = [figures["parts"].get(part, 0) / unit for part in PARTS]
            total = figures["seconds"] / unit
            cells = [f"{part:.2f}" for part in (*parts, total - sum(parts))]
            print(f"| {tower}, {row['images']} images | {stage} | {total:.2f} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {name: measure(*TOWERS[name], args.images, args.batch_size) for name in args.only}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    atomic_write(args.out, json.dumps({**machine, "towers": rows}, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
