"""Write and read TorchScript files. PyTorch has deprecated the format, but many C++ and mobile deployments load it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from dgmr_tp.export.export_tower import ExportTower, TowerFunction, as_tuple


def write(tower: ExportTower, path: Path) -> None:
    """Trace the tower and save it. The batch size stays dynamic."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(tower.module, (tower.examples[:2],), check_trace=False), str(path))


def read(path: Path, threads: int | None = None) -> TowerFunction:
    """Load the file on the CPU. TorchScript files contain code, so read only files from a source that you trust."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path), map_location="cpu").eval()

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(module(inputs))

    return run
