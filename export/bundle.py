"""An export that proves itself: every file is run against PyTorch before it keeps its name, and ``export.json`` says how it did."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.export import onnx_file, torchscript_file
from dgmr_tp.export.latency import median_milliseconds
from dgmr_tp.files import sha256, write_whole

FORMATS: dict[str, tuple[str, Any]] = {"onnx": ("model.onnx", onnx_file), "torchscript": ("model.pt", torchscript_file)}
BATCHES = (1, 3, 5)
TOLERANCE = 1e-4


def export_bundle(
    tower: nn.Module,
    directory: Path,
    *,
    image_size: int,
    preprocess: dict[str, Any],
    formats: Sequence[str] = ("onnx", "torchscript"),
    original: nn.Module | None = None,
    latency_batches: Sequence[int] = (1, 8),
) -> dict[str, Any]:
    """Export a vision tower, verify every file, measure latency, and write ``export.json`` beside the files.

    Args:
        tower: images ``[batch, 3, size, size]`` to embeddings ``[batch, dimension]``; exported in float32 on the CPU.
        directory: where to; made if it is not there.
        image_size: height and width of the images.
        preprocess: what the images went through (size, mean, std, interpolation, resize_mode); copied into the JSON.
        formats: which of ``onnx`` and ``torchscript``.
        original: the tower before pruning; it is exported to a temporary file and timed beside the pruned one.
        latency_batches: batch sizes to time.

    Returns:
        What ``export.json`` holds: per format the file, the SHA-256 of what was written, the relative error at batch 1, 3 and 5 and the
        latencies; names of input and output; embedding size; preprocessing; versions.

    Raises:
        DgmrError: unknown format, or a file's outputs differ from PyTorch's by more than 1e-4 (relative; the file is then
            named ``.failed``).
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise DgmrError(f"unknown export format {unknown[0]!r}; known: {', '.join(FORMATS)}")
    directory.mkdir(parents=True, exist_ok=True)
    tower = copy.deepcopy(tower).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    images = {batch: torch.randn(batch, 3, image_size, image_size, generator=generator) for batch in {*BATCHES, *latency_batches, 2}}
    with torch.no_grad():
        expected = {batch: tower(images[batch]) for batch in BATCHES}
    files = {}
    for name in formats:
        file_name, kind = FORMATS[name]
        with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
            aside = Path(scratch) / file_name
            kind.write(tower, images[2], aside)  # a large ONNX model puts its weights into a second file beside
            errors = _relative_errors(kind.read(aside), images, expected)
            worst = max(errors.values())
            ending = "" if worst <= TOLERANCE else ".failed"
            written = sorted(Path(scratch).iterdir(), key=lambda path: path.name)
            latency = {} if ending else _latencies(kind, aside, original, images, latency_batches)
            for path in written:
                os.replace(path, directory / f"{path.name}{ending}")
        if ending:
            raise DgmrError(f"{directory / file_name}.failed: its output differs from PyTorch's by {worst:.1e} (allowed {TOLERANCE:.0e})")
        files[name] = {
            "file": file_name,
            "sha256": {path.name: sha256(directory / path.name) for path in written},
            "megabytes": sum((directory / path.name).stat().st_size for path in written) / 1e6,
            "relative_error": {str(batch): error for batch, error in errors.items()},
            "latency_ms": latency,
        }
    result = {
        "format": 1,
        "input": {"name": "image", "shape": ["batch", 3, image_size, image_size], "dtype": "float32"},
        "output": {"name": "embedding", "shape": ["batch", expected[1].shape[1]], "dtype": "float32", "normalised": False},
        "preprocess": preprocess,
        "files": files,
        "opset": onnx_file.OPSET,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, **({"onnxruntime": onnx_file.runtime_version()} if "onnx" in formats else {})},
    }
    write_whole(directory / "export.json", json.dumps(result, indent=1) + "\n")
    return result


def open_exported(path: Path) -> Callable[[Tensor], Tensor]:
    """An exported file as a function from images to embeddings, by its ending.

    Raises:
        DgmrError: unknown ending, or the file cannot be read.
    """
    for file_name, kind in FORMATS.values():
        if path.suffix == Path(file_name).suffix:
            try:
                return kind.read(path)
            except Exception as error:  # each runtime has errors of its own
                raise DgmrError(f"cannot open {path}: {str(error).splitlines()[0][:200]}") from error
    raise DgmrError(f"{path}: an exported encoder ends in {' or '.join(Path(name).suffix for name, _ in FORMATS.values())}")


def _relative_errors(run: Callable[[Tensor], Tensor], images: dict[int, Tensor], expected: dict[int, Tensor]) -> dict[int, float]:
    """The largest relative error of one embedding, per batch size."""
    errors = {}
    for batch, reference in expected.items():
        difference = (run(images[batch]) - reference).norm(dim=1) / reference.norm(dim=1)
        errors[batch] = float(difference.max())
    return errors


def _latencies(
    kind: Any, path: Path, original: nn.Module | None, images: dict[int, Tensor], batches: Sequence[int]
) -> dict[str, dict[str, float]]:
    runs = {"pruned": kind.read(path, torch.get_num_threads())}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="original-") as scratch:
        if original is not None:
            dense_path = Path(scratch) / path.name
            kind.write(copy.deepcopy(original).cpu().float().eval(), images[2], dense_path)
            runs = {"original": kind.read(dense_path, torch.get_num_threads()), **runs}
        return {
            str(batch): median_milliseconds({name: lambda run=run, batch=batch: run(images[batch]) for name, run in runs.items()})
            for batch in batches
        }
