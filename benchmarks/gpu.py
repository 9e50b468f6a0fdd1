"""Compare pruning and recovery on a GPU with the CPU, and time them at the shapes of the papers' towers.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

All weights and images are random. The cells, each written to the JSON when it is computed, so that a second call
continues:

- ``same result``: a ViT-S/14 at 98 pixels, pruned to a quarter of its neurons and recovered on 256 images on both
  devices, for several criteria. The script fails if a kept neuron differs, or if a recovered weight differs by more
  than ``WEIGHT_TOLERANCE``.
- ``selection``: DGMR's order of the rows of one MLP of EVA02-CLIP-E, by LAPACK on the CPU and by the paper's loop on
  the GPU in float64.
- ``greedy``: the selection by outputs of all neurons of one MLP of ViT-g/14.
- ``ViT-g-14 ranking``, ``ViT-g-14 recovery``: ranking by outputs, and recovery to hidden = width, with ``--images``
  images of 224 pixels, and the peak of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from selection import COLUMNS, matrix, paper_loop
from timm import create_model
from torch import Tensor, nn

from dgmr_tp import prune
from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.planning import make_plan
from dgmr_tp.compression.rankings import rank
from dgmr_tp.encoders import wrap_tower
from dgmr_tp.pruning.output_selection import rank_neurons
from dgmr_tp.pruning.selection import select_diverse_rows
from dgmr_tp.utils.files import atomic_write

WEIGHT_TOLERANCE = 1e-3
"""Maximum difference of recovered weights between the devices, relative to the norm of the weight."""


def redraw(module: nn.Module) -> nn.Module:
    """Set every parameter to a random value. As initialized, LayerScales of 1e-5 hide what an MLP does."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.copy_(values * parameter[0].numel() ** -0.5 if parameter.ndim >= 2 else 0.5 + 0.1 * values)
    return module.eval()


def smooth_images(count: int, size: int) -> Tensor:
    """Return random images with a decaying spectrum, ``[count, 3, size, size]``."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """Return the result of ``work`` and its seconds, with the GPU's queue empty before and after."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, time.perf_counter() - started


def same_result(criterion: str) -> dict[str, object]:
    """Prune and recover on both devices, and compare."""
    images = smooth_images(256, 98)
    results, seconds = {}, {}
    for device in ("cuda", "cpu"):
        tower = redraw(create_model("vit_small_patch14_dinov2", img_size=98, num_classes=0)).to(device)
        batches = [batch.to(device) for batch in images.split(64)]
        results[device], seconds[device] = timed(
            lambda tower=tower, batches=batches: prune(tower, batches, criterion=criterion, mlp_ratio=1)
        )
    plans = {device: result.plan.sites for device, result in results.items()}
    kept = [len(set(plans["cuda"][name].kept) & set(site.kept)) / len(site.kept) for name, site in plans["cpu"].items()]
    expected = {name: parameter.detach() for name, parameter in results["cpu"].model.named_parameters()}
    difference = {
        name: float(
            (parameter.detach().cpu().double() - expected[name].double()).norm() / expected[name].double().norm()
        )
        for name, parameter in results["cuda"].model.named_parameters()
    }
    return {
        "seconds": seconds,
        "kept_in_common": min(kept),
        "largest_difference": max(difference.values()),
        "parameter": max(difference, key=lambda name: difference[name]),
    }


def selection() -> dict[str, object]:
    """Time DGMR's selection on both devices."""
    weight = matrix()
    started = time.perf_counter()
    order = select_diverse_rows(weight, COLUMNS).order[:COLUMNS]
    seconds = {"LAPACK geqp3, CPU": time.perf_counter() - started}
    on_gpu = torch.from_numpy(weight).cuda()
    picks, seconds["the paper's loop, GPU"] = timed(lambda: paper_loop(on_gpu))
    return {"seconds": seconds, "picks_in_common": len({*order.tolist()} & {*picks.tolist()}), "picks": COLUMNS}


def greedy() -> dict[str, object]:
    """Time the greedy selection by outputs on the GPU, at the shape of an MLP of ViT-g/14."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, width = 6144, 1408
    activations = torch.randn(2 * hidden, hidden, generator=generator, device="cuda", dtype=torch.float64)
    gram = activations.T @ activations / len(activations)
    weight = torch.randn(width, hidden, generator=generator, device="cuda", dtype=torch.float64)
    rank_neurons(gram, weight, picks=64)  # warms up
    return {"seconds": timed(lambda: rank_neurons(gram, weight))[1], "hidden": hidden, "width": width}


def vit_g(count: int) -> tuple[nn.Module, list[Tensor]]:
    """Return the vision tower of ViT-g/14 with random weights, made on the GPU, and batches of ``count`` images."""
    with torch.device("cuda"):
        tower = create_model("vit_giant_patch14_clip_224", num_classes=0)
    return redraw(tower), [batch.cuda() for batch in smooth_images(count, 224).split(32)]


def ranking(count: int) -> dict[str, object]:
    """Rank the neurons of ViT-g/14, next to a forward pass of the same images."""
    tower, batches = vit_g(count)
    model = wrap_tower(tower)
    with torch.no_grad():
        tower(batches[0])
        forward = timed(lambda: [tower(batch) for batch in batches])[1]
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: rank(model, "output", CalibrationImages(batches)))[1]
    return {
        "images": count,
        "seconds": {"forward": forward, "ranking": seconds},
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def recovery(count: int) -> dict[str, object]:
    """Prune ViT-g/14 to hidden = width by the L2 norms, and recover it."""
    tower, batches = vit_g(count)
    plan = make_plan(wrap_tower(tower), "l2", mlp_ratio=1)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: prune(tower, batches, plan=plan))[1]
    return {"images": count, "seconds": seconds, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument(
        "--only", nargs="*", default=["same result", "selection", "greedy", "ViT-g-14 ranking", "ViT-g-14 recovery"]
    )
    args = parser.parse_args()
    cells = json.loads(args.out.read_text(encoding="utf-8"))["cells"] if args.out.exists() else {}
    setting = {
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    work: dict[str, Callable[[], dict[str, object]]] = {
        f"same result, {criterion}": lambda criterion=criterion: same_result(criterion)
        for criterion in ("dgmr", "l2", "output")
    }
    work |= {
        "selection": selection,
        "greedy": greedy,
        "ViT-g-14 ranking": lambda: ranking(args.images),
        "ViT-g-14 recovery": lambda: recovery(args.images),
    }
    for name, compute in work.items():
        if name not in cells and name.split(",")[0] in args.only:
            cells[name] = compute()
            atomic_write(args.out, json.dumps({**setting, "cells": cells}, indent=1) + "\n")
            print(name, json.dumps(cells[name]), flush=True)
    wrong = [
        name
        for name, cell in cells.items()
        if name.startswith("same result")
        and (cell["kept_in_common"] < 1 or cell["largest_difference"] > WEIGHT_TOLERANCE)
    ]
    if wrong:
        raise SystemExit(f"GPU and CPU disagree: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
