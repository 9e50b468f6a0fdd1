"""TorchScript by tracing. Deprecated by PyTorch, still what many C++ and mobile deployments load."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from dgmr_tp.export.export_tower import Part, Run, as_tuple


def write(part: Part, path: Path) -> None:
    """Traced; the batch stays free."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(part.module, (part.examples[:2],), check_trace=False), str(path))


def read(path: Path, threads: int | None = None) -> Run:
    """The file on the CPU. A TorchScript file is code: open only your own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path), map_location="cpu").eval()

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(module(inputs))

    return run
