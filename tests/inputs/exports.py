"""Models and images of shapes that an export, a comparison, or a recovery must take or refuse."""

from __future__ import annotations

from pathlib import Path

import timm
from families import VIT

from inputs import Case, pictures


def rectangular(folder: Path) -> None:
    """Write a timm model directory whose images are 64 pixels high and 32 wide."""
    module = timm.create_model("vit_small_patch14_dinov2", **{**VIT, "img_size": (64, 32)})
    module.pretrained_cfg["input_size"] = (3, 64, 32)
    timm.models.save_for_hf(module, folder / "rectangular", safe_serialization=True)
    pictures(folder / "images", [f"{i}.png" for i in range(12)])


CASES = [
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
