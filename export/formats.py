"""The kinds of file that are written, and how each is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.export import onnx_file, program_file, torchscript_file
from dgmr_tp.export.export_tower import Part, Run


@dataclass(frozen=True)
class Format:
    ending: str
    read: Callable[[Path, int | None], Run]
    tolerance: float
    """The largest relative error of one output against PyTorch."""
    write: Callable[[Part, Path], None] | None = None
    convert: Callable[[Path, Path], None] | None = None
    """From the ``onnx`` file, for those that are not written from the model."""
    code: bool = True
    """Opening one from elsewhere may run what somebody put there."""


FORMATS = {
    "onnx": Format(".onnx", onnx_file.read, 1e-4, write=onnx_file.write, code=False),
    "onnx-fp16": Format(".fp16.onnx", onnx_file.read, 1e-2, convert=onnx_file.to_half, code=False),
    "onnx-int8": Format(".int8.onnx", onnx_file.read, 0.2, convert=onnx_file.to_int8, code=False),
    "torchscript": Format(".pt", torchscript_file.read, 1e-4, write=torchscript_file.write),
    "pt2": Format(".pt2", program_file.read, 1e-4, write=program_file.write),
    "aotinductor": Format(".aoti.pt2", program_file.read_compiled, 1e-4, write=program_file.compile_),
}
SUFFIXES = (".onnx", ".pt", ".pt2")


def open_exported(path: Path, *, trusted: bool = False, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """An exported file as a function from images (or tokens) to embeddings, its first output.

    Args:
        path: its ending says what it is; ``.fp16.onnx`` and ``.int8.onnx`` are ONNX files, ``.aoti.pt2`` is a compiled package.
        trusted: every kind but ONNX is code, which opening it runs; True: you know where it comes from.
        threads: of onnxruntime; by default one per core.

    Raises:
        DgmrError: unknown ending, a file of code that is not trusted, or it cannot be read; later, inputs that it does not take.
    """
    matching = [kind for kind in FORMATS.values() if path.name.endswith(kind.ending)]
    if not matching:
        raise DgmrError(f"{path}: an exported encoder ends in {', '.join(SUFFIXES)}")
    kind = max(matching, key=lambda kind: len(kind.ending))
    if not path.is_file():
        raise DgmrError(f"{path} does not exist")
    if kind.code and not trusted:
        raise DgmrError(f"{path} is code, and opening it runs it; if you know where it comes from, say --trust-file")
    try:
        run = kind.read(path, threads)
    except Exception as error:  # each runtime has errors of its own
        raise DgmrError(f"cannot open {path}: {first_line(error)}") from error

    def embed(inputs: Tensor) -> Tensor:
        try:
            return run(inputs.cpu())[0].to(inputs.device)
        except Exception as error:
            raise DgmrError(
                f"{path} does not take inputs of shape {list(inputs.shape)}: {first_line(error)}"
            ) from error

    return embed
