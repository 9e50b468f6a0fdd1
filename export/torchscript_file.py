"""TorchScript by tracing. Deprecated by PyTorch, still what many C++ and mobile deployments load."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def write(module: nn.Module, example: Tensor, path: Path) -> None:
    """Trace ``module`` (images to embeddings); the batch stays free."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, (example,), check_trace=False), str(path))


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """The file as a function of a CPU tensor. A TorchScript file is code: open only your own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path), map_location="cpu").eval()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return run
