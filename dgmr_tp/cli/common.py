"""What the commands share: where they print, options that several take, the machine."""

from __future__ import annotations

import os
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


def join_processes() -> bool:
    """Meet the other processes of a torchrun, if there are any; whether this one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return torch.distributed.get_rank() == 0
