"""Models and images of shapes that an export, a comparison, or a recovery must take or refuse."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from families import VIT

from dgmr_tp import open_model
from dgmr_tp.data.scenes import write_classification
from inputs import Case, pictures


def rectangular(folder: Path) -> None:
    """Write a timm model directory whose images are 64 pixels high and 32 wide."""
    module = timm.create_model("vit_small_patch14_dinov2", **{**VIT, "img_size": (64, 32)})
    module.pretrained_cfg["input_size"] = (3, 64, 32)
    timm.models.save_for_hf(module, folder / "rectangular", safe_serialization=True)
    pictures(folder / "images", [f"{i}.png" for i in range(12)])


@functools.cache
def _overflowing() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    scratch = tempfile.TemporaryDirectory()
    folder = Path(scratch.name)
    demo = open_model("demo")
    with torch.no_grad():
        demo.tower.ln_post.weight.fill_(1e30)
        demo.tower.proj.fill_(1e30)
    demo.save(folder / "clip")
    pictures(folder / "images", [f"{label}/{i}.png" for label in "ab" for i in range(60)])
    write_classification(folder / "scenes", 20, seed=3)
    return folder, scratch


def overflowing(folder: Path) -> None:
    """Write a CLIP whose weights are finite and whose image embeddings are not, and labeled images."""
    shutil.copytree(_overflowing()[0], folder, dirs_exist_ok=True)


OVERFLOW = "are not finite. Check the weights and the preprocessing, or compute in float32."
OVERFLOWS = {
    "zero-shot": "eval clip --dataset wds/scenes --root scenes -o out",
    "k-NN": "eval clip --knn-train images --knn-test images -o out",
    "linear head": "eval clip --head-train images --head-test images -o out",
    "compare": "compare demo clip --images images -o out",
    "compare, old model": "compare clip demo --images images -o out",
    "recovery": "prune --model clip --criterion l2 --recover images -o out",
    "criterion output": "rank --model clip --images images --calibration-images 20 -o out.safetensors",
    "quality target": "prune --model clip --min-cosine 0.9 --held-out 50 --recover images -o out",
    "export": "export clip -o out --formats torchscript",
}

CASES = [
    *(Case(f"embeddings overflow, {name}", command, overflowing, says=OVERFLOW) for name, command in OVERFLOWS.items()),
    Case(
        "rectangular model, inspect",
        "inspect rectangular",
        rectangular,
        code=0,
        says="blocks.1.mlp 48 192 27.4% rectangular: 0.07 M parameters, 0.00 GFLOPs per image",
    ),
    Case(
        "rectangular model, plan",
        "plan --model rectangular --budget flops=0.8 -o p.json",
        rectangular,
        0,
        "(-20.1%)",
        ("p.json",),
    ),
    Case(
        "rectangular model, recovery",
        "prune --model rectangular --mlp-ratio 1 --recover images -o out",
        rectangular,
        0,
        "blocks.1.mlp 192 48",
        ("out",),
    ),
]
