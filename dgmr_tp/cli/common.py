"""What the commands share: where they print, options that several take, the machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False, markup=False)
MODEL_HELP = "open_clip:NAME, timm:NAME, a model directory, hf-hub:ORG/REPO, or demo."
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
PretrainedOption = Annotated[
    str | None,
    typer.Option(
        help="Weights for a NAME: the library's tag, a file, hf-hub:ORG/REPO/FILE, or TAG+FILE; none: random."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-file", help="Open .pt and .pt2 files, which are code, wherever they come from.")
]


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
