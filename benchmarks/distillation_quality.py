"""Accuracy of a distilled model by the number of images, started from the recovered and from the pruned model.

    CIFAR10_DIR=.../cifar10 python benchmarks/distillation_quality.py --encoder VIT.safetensors \\
        --out benchmarks/results/quality.json

Models: the demo CLIP on generated scenes, and the CIFAR-10 encoder of ``methods.py``; DGMR's neurons, hidden = width.
The papers use every image ten times. Here every image is used at most once: 4,096 scenes, or 50,000 photographs without
those for calibration and testing. Loss as in a recipe; AdamW, 20 warm-up steps, cosine, 64 images a step, no
augmentation. Measured on 2,000 test images: accuracy of the original head (zero-shot for the demo CLIP) and cosine to
the dense embedding.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
from pathlib import Path

import torch
from methods import TESTED, Outputs, Subject, cifar, demo, distilling, measured, on_cifar, outputs
from torch import Tensor
from train_cifar10_clip import load_split, normalize

from dgmr_tp import prune
from dgmr_tp.compression.planning import make_plan
from dgmr_tp.encoders import wrap_tower
from dgmr_tp.utils.files import atomic_write

BATCH_SIZE = 64


def curve(
    subject: Subject, student: torch.nn.Module, images: Tensor, base_lr: float, dense: Outputs
) -> list[dict[str, float]]:
    """Return accuracy and cosine before the training and after each quarter of ``images``."""
    student, steps = copy.deepcopy(student).requires_grad_(True), len(images) // BATCH_SIZE
    points = [{"images": 0, **measured(subject, student.eval(), dense)}]
    batches, peak = images[: steps * BATCH_SIZE].split(BATCH_SIZE), base_lr * BATCH_SIZE / 256
    for step in distilling(subject.tower, student, batches, steps=steps, peak=peak, weight_decay=0.0):
        if step in {steps * quarter // 4 for quarter in (1, 2, 3, 4)}:
            points.append({"images": step * BATCH_SIZE, **measured(subject, student, dense)})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, object] = {}
    for name in ("demo", "cifar"):
        subject, base_lr = (demo(), 4e-3) if name == "demo" else (on_cifar(cifar(args.encoder)), 1e-3)
        calibration, dense = subject.calibration(0), outputs(subject, subject.tower)
        if name == "demo":
            images = subject.train[TESTED:]
        else:
            photographs, _ = load_split(Path(os.environ["CIFAR10_DIR"]), "train")
            images = normalize(photographs)[TESTED:]
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        width = subject.tower.patch_embed.proj.out_channels if name == "cifar" else subject.tower.conv1.out_channels
        plan = make_plan(wrap_tower(subject.tower), "dgmr", keep=width)
        dense_figures = measured(subject, subject.tower, dense)
        print(f"{name}, dense: head {dense_figures['head']:.1f}\n| from | images | head | cosine |\n|---|---|---|---|")
        result[name] = {"dense": dense_figures}
        for start, recovery_images in (("recovered", calibration), ("pruned", None)):
            points = curve(subject, prune(subject.tower, recovery_images, plan=plan).model, images, base_lr, dense)
            result[name][start] = points  # type: ignore[index]
            for point in points:
                print(f"| {start} | {point['images']:,} | {point['head']:.1f} | {point['cosine']:.4f} |", flush=True)
    setting = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, json.dumps({**setting, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
