"""Write and read torch.export programs, and the same programs compiled to machine code by AOTInductor."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.export.export_tower import ExportTower, TowerFunction, as_tuple


def write(tower: ExportTower, path: Path) -> None:
    """Save the exported program, which PyTorch opens without the model's code. The batch size is dynamic."""
    with _suppress_output():
        torch.export.save(_export_program(tower), path)


def write_compiled(tower: ExportTower, path: Path) -> None:
    """Compile the program for this machine's kind of CPU and save the package. The batch size is dynamic.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise RuntimeError("AOTInductor needs a C++ compiler, and none was found. Install g++.")
    with _suppress_output():
        torch._inductor.aoti_compile_and_package(_export_program(tower), package_path=str(path))


def read(path: Path, threads: int | None = None) -> TowerFunction:
    """Load a program on the CPU. Loading can run code, so read only files from a source that you trust."""
    with _suppress_output():
        return _without_gradients(torch.export.load(path).module())


def read_compiled(path: Path, threads: int | None = None) -> TowerFunction:
    """Load a compiled package on the CPU. It is machine code, so read only files from a source that you trust."""
    with _suppress_output():
        return _without_gradients(torch._inductor.aoti_load_package(str(path)))


def _export_program(tower: ExportTower) -> torch.export.ExportedProgram:
    dynamic_shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(tower.module, (tower.examples[:2],), dynamic_shapes=dynamic_shapes)


def _without_gradients(module: Callable[[Tensor], Any]) -> TowerFunction:
    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(module(inputs))

    return run


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    """Hide the warnings, log lines and printed text of torch's exporter."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
