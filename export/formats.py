"""Registries of the export: file formats, tower outputs, and layouts of names and folders.

The recipe, the command line's help, the documentation and the report read them, so they load without torch. A new
format is a module with ``write`` and ``read`` functions and an entry in :data:`FORMATS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmr_tp.errors import DgmrError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from dgmr_tp.export.export_tower import ExportTower, TowerFunction


@dataclass(frozen=True)
class Format:
    """A kind of exported file. It has either ``write`` or ``convert``."""

    summary: str
    """One line for help texts and documentation."""
    suffix: str
    """End of the file name. The longest suffix that matches decides the format of an existing file."""
    read: Callable[[Path, int | None], TowerFunction]
    """Open a file on the CPU, with a number of threads or None for the runtime's default."""
    tolerance: float
    """Default for the largest relative error of an output against PyTorch."""
    write: Callable[[ExportTower, Path], None] | None = None
    """Write a tower to a file."""
    convert: Callable[[Path, Path], None] | None = None
    """Convert the tower's ``onnx`` file to this format."""
    find_problem: Callable[[Path, Tensor], str | None] | None = None
    """Look for a problem that the file's outputs on this machine do not show, with the examples of the verification.

    It returns the problem, or None.
    """
    runtime: str = "torch"
    """Package that runs the file. ``export.json`` records its version."""
    code: bool = True
    """Opening a file of this format can run code that it contains."""
    measured: bool = False
    """A recipe evaluates the file on its data sets.

    False for PyTorch's own formats, whose outputs are PyTorch's. Other runtimes and precisions are measured.
    """
    notice: str = ""
    """A sentence that the export command prints when the format is used."""


def _function(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module in this package. The first call imports the module, which may need torch."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"dgmr_tp.export.{module}"), name)(*args)

    return call


FORMATS: dict[str, Format] = {
    "onnx": Format(
        "ONNX in float32",
        ".onnx",
        read=_function("onnx_file", "read"),
        tolerance=1e-4,
        write=_function("onnx_file", "write"),
        runtime="onnxruntime",
        code=False,
        measured=True,
    ),
    "onnx-fp16": Format(
        "ONNX with float16 weights, float32 inputs and outputs",
        ".fp16.onnx",
        read=_function("onnx_file", "read"),
        tolerance=1e-2,
        convert=_function("onnx_file", "to_float16"),
        find_problem=_function("onnx_file", "find_overflow"),
        runtime="onnxruntime",
        code=False,
        measured=True,
    ),
    "onnx-int8": Format(
        "ONNX with int8 matrices and dynamically quantized activations",
        ".int8.onnx",
        read=_function("onnx_file", "read"),
        tolerance=0.2,
        convert=_function("onnx_file", "to_int8"),
        runtime="onnxruntime",
        code=False,
        measured=True,
    ),
    "torchscript": Format(
        "traced TorchScript",
        ".pt",
        read=_function("torchscript_file", "read"),
        tolerance=1e-4,
        write=_function("torchscript_file", "write"),
        notice="PyTorch has deprecated TorchScript. Its successor is pt2.",
    ),
    "pt2": Format(
        "torch.export program",
        ".pt2",
        read=_function("program_file", "read"),
        tolerance=1e-4,
        write=_function("program_file", "write"),
    ),
    "aotinductor": Format(
        "torch.export program compiled for this machine's kind of CPU",
        ".aoti.pt2",
        read=_function("program_file", "read_compiled"),
        tolerance=1e-4,
        write=_function("program_file", "write_compiled"),
    ),
}

OUTPUTS = {"embedding": "the embedding of the image", "patches": "the patch tokens after the final norm"}
"""Outputs of an image tower, in the order in which a file returns them, with a summary each."""


@dataclass(frozen=True)
class TowerNames:
    """Names that a layout gives to one tower."""

    input: str
    embedding: str
    file_stem: str


@dataclass(frozen=True)
class Layout:
    """Names, folders and side files as another program expects them."""

    summary: str
    """One line for help texts and documentation."""
    image: TowerNames
    text: TowerNames


LAYOUTS: dict[str, Layout] = {
    "plain": Layout(
        "model.onnx and text.onnx, output embedding",
        image=TowerNames("image", "embedding", "model"),
        text=TowerNames("text", "embedding", "text"),
    ),
    "huggingface": Layout(
        "the files that transformers.js and optimum load, with preprocessor_config.json",
        image=TowerNames("pixel_values", "image_embeds", "onnx/vision_model"),
        text=TowerNames("input_ids", "text_embeds", "onnx/text_model"),
    ),
    "immich": Layout(
        "the files that immich's machine-learning service loads, with preprocessing, tokenizer and config",
        image=TowerNames("image", "image_embedding", "visual/model"),
        text=TowerNames("text", "text_embedding", "textual/model"),
    ),
}


def is_exported_file(source: str | Path) -> bool:
    """Return whether ``source`` has the suffix of an exported file. Otherwise it names a model."""
    return Path(source).suffix in _plain_suffixes()


def open_exported(path: Path, *, trusted: bool = False, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Open an exported file as a function from images (or token ids) to embeddings, its first output.

    The file runs on the CPU. The function returns the embeddings on the device of its inputs.

    Args:
        path: the file. Its suffix decides the format; ``.fp16.onnx`` and ``.int8.onnx`` are ONNX files, and
            ``.aoti.pt2`` is a compiled package.
        trusted: allow formats that contain code, which opening the file runs. Only ONNX files contain none.
        threads: threads of onnxruntime; None uses one per core.

    Raises:
        DgmrError: the suffix is unknown, the file does not exist or cannot be read, or it contains code and is not
            trusted. The returned function raises it for inputs that the file does not accept.
    """
    matches = [candidate for candidate in FORMATS.values() if path.name.endswith(candidate.suffix)]
    if not matches:
        raise DgmrError(
            f"{path} does not have the suffix of an exported file. Exported files end in "
            f"{', '.join(_plain_suffixes())}."
        )
    if not path.is_file():
        raise DgmrError(f"{path} does not exist. Check the path.")
    file_format = max(matches, key=lambda candidate: len(candidate.suffix))
    if file_format.code and not trusted:
        raise DgmrError(f"{path} contains code that runs when it is opened. Pass --trust-file if you trust its source.")
    try:
        run = file_format.read(path, threads)
    except Exception as error:  # every runtime has its own errors
        raise DgmrError(f"cannot open {path}: {first_line(error)}") from error

    def embed(inputs: Tensor) -> Tensor:
        try:
            embeddings = run(inputs.cpu())[0].to(inputs.device)
        except Exception as error:
            raise DgmrError(
                f"{path} does not accept inputs of shape {list(inputs.shape)}: {first_line(error)}"
            ) from error
        if embeddings.ndim != 2 or len(embeddings) != len(inputs):
            raise DgmrError(
                f"the first output of {path} has the shape {list(embeddings.shape)} for {len(inputs)} inputs, and "
                "embeddings have [inputs, width]. Export the embedding as the first output."
            )
        return embeddings

    return embed


def _plain_suffixes() -> list[str]:
    """Return the last suffix of every format, such as ``.onnx`` for ``.fp16.onnx``."""
    return list(dict.fromkeys(f".{file_format.suffix.rpartition('.')[2]}" for file_format in FORMATS.values()))
