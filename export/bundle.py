"""An export that proves itself: every file is run against PyTorch before it keeps its name, and ``export.json`` says how it did."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.export import onnx_file
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.export.parts import Part
from dgmr_tp.export.proof import VERIFIED, prove
from dgmr_tp.files import sha256, write_whole

MANIFEST = "export.json"


def export_bundle(
    parts: Sequence[Part],
    directory: Path,
    *,
    model: str,
    preprocess: Mapping[str, Any],
    formats: Sequence[str] = ("onnx", "torchscript"),
    tolerance: Mapping[str, float] | None = None,
    original: Path | None = None,
    latency_batches: Sequence[int] = (1, 8),
) -> dict[str, Any]:
    """Write the towers' files, prove each in a process of its own, and say in ``export.json`` how each did.

    Args:
        parts: the towers, and real inputs for the proof.
        directory: where to; made if it is not there.
        model: where the towers come from, for who opens the files later; a path is taken from ``directory``.
        preprocess: what the images went through (size, mean, std, interpolation, resize_mode); copied into the JSON.
        formats: which of ``FORMATS``.
        tolerance: by format, the largest relative error of an output that is allowed; by default 1e-4, in half precision 1e-2, in
            eight bits 0.2 (a cosine of 0.98).
        original: a folder with the same files of the encoder before pruning (an earlier export); each is timed in turn with the new one.
        latency_batches: batch sizes to time.

    Returns:
        What ``export.json`` holds: model, preprocessing, opset, threads, versions; per tower names, shapes and types of inputs and
        outputs, and per format the file, the SHA-256 of everything written, its size, and the proof
        (:func:`dgmr_tp.export.proof.prove`). A format whose ``verdict`` is not ``verified`` failed: its file is named ``.failed``, or is
        not there because it could not be written.

    Raises:
        DgmrError: unknown format.
    """
    if unknown := [name for name in {*formats, *(tolerance or {})} if name not in FORMATS]:
        raise DgmrError(f"unknown export format {unknown[0]!r}; known: {', '.join(FORMATS)}")
    directory.mkdir(parents=True, exist_ok=True)
    allowed = {name: kind.tolerance for name, kind in FORMATS.items()} | dict(tolerance or {})
    towers: dict[str, dict[str, Any]] = {}
    for part in parts:
        expected = part.expected()
        outputs = [
            {"name": name, "shape": ["batch", *rows.shape[1:]], "dtype": "float32"}
            for name, rows in zip(part.outputs, expected, strict=True)
        ]
        towers[part.tower] = {
            "input": {"name": part.input, "shape": ["batch", *part.examples.shape[1:]], "dtype": str(part.examples.dtype)[6:]},
            "outputs": outputs,
            "normalised": part.normalised,
            "files": {},
        }
        for name in formats:
            with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
                path = Path(scratch, f"{part.file}{FORMATS[name].ending}")
                before = original / path.relative_to(scratch) if original else None
                options = {"original": before if before and before.exists() else None, "latency_batches": latency_batches}
                entry = _written(name, part, path) or prove(name, path, part, expected, tolerance=allowed[name], **options)
                files = {str(file.relative_to(scratch)): file for file in sorted(Path(scratch).rglob("*")) if file.is_file()}
                towers[part.tower]["files"][name] = {
                    "file": str(path.relative_to(scratch)),
                    "sha256": {file: sha256(aside) for file, aside in files.items()},
                    "megabytes": sum(aside.stat().st_size for aside in files.values()) / 1e6,
                    **entry,
                }
                final = directory / path.relative_to(scratch)
                for stale in (final, final.with_name(f"{final.name}.data")):
                    stale.unlink(missing_ok=True)
                    stale.with_name(f"{stale.name}.failed").unlink(missing_ok=True)
                final.parent.mkdir(parents=True, exist_ok=True)
                for file, aside in files.items():
                    os.replace(aside, directory / (file if entry["verdict"] == VERIFIED else f"{file}.failed"))
    runtime = {"onnxruntime": onnx_file.runtime_version()} if any(name.startswith("onnx") for name in formats) else {}
    result = {
        "format": 2,
        "model": model,
        "preprocess": dict(preprocess),
        "towers": towers,
        "opset": onnx_file.OPSET,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, **runtime},
    }
    write_whole(directory / MANIFEST, json.dumps(result, indent=1) + "\n")
    return result


def failures(bundle: Mapping[str, Any]) -> dict[str, str]:
    """The files of an ``export.json`` that failed, and why."""
    return {
        entry["file"]: entry["verdict"]
        for tower in bundle["towers"].values()
        for entry in tower["files"].values()
        if entry["verdict"] != VERIFIED
    }


def _written(name: str, part: Part, path: Path) -> dict[str, Any] | None:
    """Write the file; what there is to say if that is not possible."""
    kind = FORMATS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if kind.write:
            kind.write(part, path)
        if kind.convert:
            with tempfile.TemporaryDirectory(dir=path.parent) as beside:
                onnx_file.write(part, Path(beside) / "model.onnx")
                kind.convert(Path(beside) / "model.onnx", path)
    except (OSError, DgmrError):  # no space, or a package that is not installed
        raise
    except Exception as error:  # an exporter's own: the other formats go on
        for left in path.parent.glob(f"{path.name}*"):
            left.unlink()
        return {"verdict": f"cannot be written: {first_line(error)}"}
    return None
