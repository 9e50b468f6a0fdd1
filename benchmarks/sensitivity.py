"""Measure the loss of the fitted widths by the number of images that measure the sensitivity.

    CIFAR10_DIR=.../cifar10 python benchmarks/sensitivity.py --dinov2 DINOV2.safetensors \\
        --out benchmarks/results/sensitivity.json

The tower is the DINOv2 ViT-S/14 of ``methods.py`` at 98 pixels. It is ranked by ``output`` on 512 photographs, with the
sensitivity of every image. Sensitivities of fewer images are means over random draws. Each draw gives widths for a
budget of parameters. Their loss is counted with the sensitivities of all 512 images, and compared with the loss of the
widths that all images give.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.rankings import Rankings, rank
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.pruning import output_selection
from dgmr_tp.utils.files import atomic_write

NUM_IMAGES, NUM_DRAWS = 512, 10
COUNTS = (8, 16, 32, 64, 128, 256)


def rank_with_errors(model: OpenedModel, images: CalibrationImages) -> tuple[Rankings, Tensor]:
    """Return the rankings, and each image's share of their sensitivities ``[sites, images]``."""
    embeddings: list[Tensor] = []
    embed = output_selection._embeddings

    def record(*arguments: Any) -> Tensor:
        embeddings.append(embed(*arguments))
        return embeddings[-1]

    with (
        mock.patch.object(output_selection, "NUM_SENSITIVITY_IMAGES", len(images)),
        mock.patch.object(output_selection, "_embeddings", record),
    ):
        rankings = rank(model, "output", images)
    dense, *cut = embeddings
    errors = torch.stack([(embedding - dense).square().sum(1) for embedding in cut])
    return rankings, errors / errors.mean(1, keepdim=True)


def measure(model: OpenedModel, rankings: Rankings, shares: Tensor, budget: float) -> dict[str, list[float]]:
    """Return the excess loss of the widths from each number of images, one value a draw."""

    def loss(images: Tensor) -> float:
        scaled = {
            name: replace(ranking, sensitivity=ranking.sensitivity * float(share[images].mean()))
            for (name, ranking), share in zip(rankings.sites.items(), shares, strict=True)
        }
        plan = replace(rankings, sites=scaled).plan(model, budget={"params": budget})
        return sum(
            ranking.sensitivity * float(ranking.error[len(plan.sites[name].kept)])
            for name, ranking in rankings.sites.items()
        )

    best, generator = loss(torch.arange(NUM_IMAGES)), torch.Generator().manual_seed(0)
    return {
        str(count): [loss(torch.randperm(NUM_IMAGES, generator=generator)[:count]) / best - 1 for _ in range(NUM_DRAWS)]
        for count in COUNTS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.68, 0.51])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = open_model("timm:vit_small_patch14_dinov2", str(args.dinov2), image_size=98)
    images = CalibrationImages.read(Path(os.environ["CIFAR10_DIR"]) / "train", model, NUM_IMAGES)
    rankings, shares = rank_with_errors(model, images)
    rows = {f"{budget:g}": measure(model, rankings, shares, budget) for budget in args.budgets}
    machine = {"torch": torch.__version__, "machine": platform.machine()}
    atomic_write(args.out, json.dumps({**machine, "images": NUM_IMAGES, "excess_loss": rows}, indent=1) + "\n")
    print(f"| images | {' | '.join(f'{budget} of the parameters' for budget in rows)} |\n|---|{'---|' * len(rows)}")
    for count in COUNTS:
        cells = [
            f"{100 * sum(row[str(count)]) / NUM_DRAWS:.1f}, {100 * max(row[str(count)]):.1f}" for row in rows.values()
        ]
        print(f"| {count} | {' | '.join(cells)} |")
    print("excess loss in percent: mean and largest of ten draws")


if __name__ == "__main__":
    main()
