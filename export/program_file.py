"""torch.export: a program that PyTorch opens without the model's code, and the same compiled ahead of time by AOTInductor."""

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

from dgmr_tp.export.export_tower import Part, Run, as_tuple


def write(part: Part, path: Path) -> None:
    """The exported program, dynamic batch."""
    with _quiet():
        torch.export.save(_program(part), path)


def compile_(part: Part, path: Path) -> None:
    """A package of machine code for this kind of CPU, dynamic batch."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise RuntimeError("AOTInductor needs a C++ compiler, and there is none; install g++")
    with _quiet():
        torch._inductor.aoti_compile_and_package(_program(part), package_path=str(path))


def read(path: Path, threads: int | None = None) -> Run:
    """The program on the CPU. Opening one runs what it names: open only your own."""
    with _quiet():
        return _without_gradients(torch.export.load(path).module())


def read_compiled(path: Path, threads: int | None = None) -> Run:
    """The package on the CPU. It is machine code: open only your own."""
    with _quiet():
        return _without_gradients(torch._inductor.aoti_load_package(str(path)))


def _program(part: Part) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(part.module, (part.examples[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _without_gradients(module: Callable[[Tensor], Any]) -> Run:
    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(module(inputs))

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
