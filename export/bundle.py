"""An export that proves itself: every file is run against PyTorch before it keeps its name, and ``export.json`` says how it did."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.export import onnx_file
from dgmr_tp.export.export_tower import Part
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.export.verify import VERIFIED, prove
from dgmr_tp.utils.files import sha256, write_whole

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
        directory: where to; made if it is not there. What an earlier export wrote there is taken away.
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
        (:func:`dgmr_tp.export.verify.prove`). A format whose ``verdict`` is not ``verified`` failed: its file is named ``.failed``, or is
        not there because it could not be written.

    Raises:
        DgmrError: unknown format, the folder holds another program's ``export.json``, or the disk has no room for a file.
    """
    if unknown := [name for name in {*formats, *(tolerance or {})} if name not in FORMATS]:
        raise DgmrError(f"unknown export format {unknown[0]!r}; known: {', '.join(FORMATS)}")
    directory.mkdir(parents=True, exist_ok=True)
    _clear(directory)
    allowed = {name: kind.tolerance for name, kind in FORMATS.items()} | dict(tolerance or {})
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
        towers = {}
        for part in parts:
            expected = part.expected()
            towers[part.tower] = {
                "input": {
                    "name": part.input,
                    "shape": ["batch", *part.examples.shape[1:]],
                    "dtype": str(part.examples.dtype)[6:],
                },
                "outputs": [
                    {"name": name, "shape": ["batch", *rows.shape[1:]], "dtype": "float32"}
                    for name, rows in zip(part.outputs, expected, strict=True)
                ],
                "normalised": part.normalised,
                "files": {
                    name: _file(
                        name, part, expected, directory, Path(scratch), original, allowed[name], latency_batches
                    )
                    for name in formats
                },
            }
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


def _clear(directory: Path) -> None:
    """Take away what an earlier export wrote here, so that its files are never taken for this one's."""
    manifest = directory / MANIFEST
    if not manifest.exists():
        return
    try:
        towers = json.loads(manifest.read_text())["towers"]
        listed = [file for tower in towers.values() for entry in tower["files"].values() for file in entry["sha256"]]
    except (ValueError, KeyError) as error:
        raise DgmrError(f"{manifest} is of another program or version; export into another folder") from error
    for file in listed:
        if not (directory / file).resolve().is_relative_to(directory.resolve()):
            raise DgmrError(f"{manifest} names {file}, which is not below its folder; export into another folder")
    for file in listed:
        (directory / file).unlink(missing_ok=True)
        (directory / f"{file}.failed").unlink(missing_ok=True)
    manifest.unlink()


def _file(
    name: str,
    part: Part,
    expected: Sequence[Tensor],
    directory: Path,
    scratch: Path,
    original: Path | None,
    tolerance: float,
    latency_batches: Sequence[int],
) -> dict[str, Any]:
    """Write one file in ``scratch``, prove it, give it its name in ``directory``, and say how it did."""
    folder = scratch / f"{part.tower} {name}"
    path = folder / f"{part.file}{FORMATS[name].ending}"
    before = original / path.relative_to(folder) if original else None
    entry = _written(name, part, path, scratch / f"{part.tower}.onnx") or prove(
        name,
        path,
        part,
        expected,
        tolerance=tolerance,
        original=before if before and before.exists() else None,
        latency_batches=latency_batches,
    )
    written = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    described = {
        "file": str(path.relative_to(folder)),
        "sha256": {file: sha256(aside) for file, aside in written.items()},
        "megabytes": sum(aside.stat().st_size for aside in written.values()) / 1e6,
        **entry,
    }
    (directory / part.file).parent.mkdir(parents=True, exist_ok=True)
    for file, aside in written.items():
        os.replace(aside, directory / (file if entry["verdict"] == VERIFIED else f"{file}.failed"))
    return described


def _check_room(part: Part, folder: Path) -> None:
    """torch's writers end the process where the disk is full."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*part.module.parameters(), *part.module.buffers()))
    needed, free = 1.2 * size + 10e6, shutil.disk_usage(folder).free  # the program beside the weights
    if free < needed:
        raise DgmrError(
            f"a file of the {part.tower} tower takes up to {needed / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free; make room"
        )


def _written(name: str, part: Part, path: Path, source: Path) -> dict[str, Any] | None:
    """Write the file; what there is to say if that is not possible. ``source`` is the ONNX file that others are converted from."""
    kind = FORMATS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(part, path.parent)
    try:
        if kind.write:
            kind.write(part, path)
        if kind.convert:
            if not source.exists():
                onnx_file.write(part, source)
            kind.convert(source, path)
    except (OSError, DgmrError):  # no space, or a package that is not installed
        raise
    except Exception as error:  # an exporter's own: the other formats go on
        for left in path.parent.glob(f"{path.name}*"):
            left.unlink()
        return {"verdict": f"cannot be written: {first_line(error)}"}
    return None
