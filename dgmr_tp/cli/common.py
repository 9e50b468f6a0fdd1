"""Parts shared by the commands: the console, options that several take, and checks of output paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dgmr_tp.errors import DgmrError

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
    bool, typer.Option("--trust-file", help="Open .pt and .pt2 files, which are code, whatever their origin.")
]
TrustRecipeOption = Annotated[
    bool,
    typer.Option("--trust-recipe", help="Run the shell commands in the recipe (pipe: URLs), whatever their origin."),
]


def print_skipped(broken: Mapping[str, str], others: Mapping[str, int]) -> None:
    """Print what reading a source of images skipped, and why."""
    from dgmr_tp.data.images import describe_skipped

    if line := describe_skipped(broken, others):
        out.print(line, soft_wrap=True)


def device() -> str:
    """Return ``cuda`` if there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def refuse_existing(path: Path) -> None:
    """Raise DgmrError if an output path exists already, or its parent directory does not."""
    if path.exists():
        raise DgmrError(f"{path} exists already. Name another with -o.")
    if not path.absolute().parent.is_dir():
        raise DgmrError(f"the directory {path.absolute().parent} for {path.name} does not exist. Make it first.")
