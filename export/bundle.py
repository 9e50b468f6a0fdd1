"""Write the exported files of a model, verify each one, and record the results in ``export.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.export import onnx_file
from dgmr_tp.export.export_tower import ExportTower
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.export.verify import VERIFIED, verify
from dgmr_tp.utils.files import check_room, read_json, scratch_directory, sha256, write_errors, write_json
from dgmr_tp.utils.lazy_imports import require

MANIFEST = "export.json"
PROGRAM_BYTES = 10e6
"""Disk space that a file needs for the program, in addition to the weights."""


def export_bundle(
    towers: Sequence[ExportTower],
    directory: Path,
    *,
    model: str,
    preprocess: Mapping[str, Any],
    formats: Sequence[str] = ("onnx", "torchscript"),
    tolerance: Mapping[str, float] | None = None,
    dense: Path | None = None,
    latency_batches: Sequence[int] = (1, 8),
    notes: Sequence[str] = (),
    model_sha256: str | None = None,
) -> dict[str, Any]:
    """Write the towers' files, verify each in its own process, and record the results in ``export.json``.

    A file appears under its name only if it is verified. A file that fails is named ``.failed``.

    Args:
        towers: the towers to export, with inputs for the verification.
        directory: output directory. It is created if needed, and the files of an earlier export are deleted.
        model: source of the towers, recorded for readers of the files. A path is relative to ``directory``.
        preprocess: preprocessing of the images (size, mean, std, interpolation, resize_mode), copied into
            ``export.json``.
        formats: names in ``FORMATS``.
        tolerance: largest allowed relative error of an output, by format. Defaults: 1e-4, in half precision 1e-2, in
            int8 0.2 (a cosine of 0.98).
        dense: directory with an earlier export of the unpruned model. Its files are timed in turn with the new ones.
        latency_batches: batch sizes to time.
        notes: sentences for readers of the files, stored in ``export.json``.
        model_sha256: hash of the model's weights, stored in ``export.json``. Readers of the files compare it.

    Returns:
        The content of ``export.json``: model, preprocessing, opset, threads and versions; per tower the names, shapes
        and dtypes of inputs and outputs; per format the file, the SHA-256 of every file written, the size, and the
        verification (:func:`dgmr_tp.export.verify.verify`). A ``status`` other than ``verified`` is a failure; see
        :func:`failures`.

    Raises:
        DgmrError: a format is unknown, the directory contains another program's ``export.json``, or the disk is full.
    """
    if unknown := [name for name in {*formats, *(tolerance or {})} if name not in FORMATS]:
        raise DgmrError(f"unknown export format {unknown[0]!r}. Use {', '.join(FORMATS)}.")
    references = [tower.reference_outputs() for tower in towers]
    tolerances = {name: file_format.tolerance for name, file_format in FORMATS.items()} | dict(tolerance or {})
    described = {}
    with scratch_directory(directory / "export", "export is writing") as staging:
        _delete_earlier_export(directory)
        for tower, expected in zip(towers, references, strict=True):
            files = {}
            for name in formats:
                files[name] = _export_file(
                    name,
                    tower,
                    expected,
                    directory,
                    staging,
                    dense=dense,
                    tolerance=tolerances[name],
                    latency_batches=latency_batches,
                )
            described[tower.kind] = {**_describe(tower, expected), "files": files}
    runtimes = {"torch", *(FORMATS[name].runtime for name in formats)}
    result = {
        "format": 2,
        "model": model,
        "model_sha256": model_sha256,
        "preprocess": dict(preprocess),
        "notes": list(notes),
        "towers": described,
        "opset": onnx_file.OPSET,
        "threads": torch.get_num_threads(),
        "versions": {name: require(name, "export").__version__ for name in sorted(runtimes, reverse=True)},
    }
    write_json(directory / MANIFEST, result)
    return result


def failures(bundle: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of an ``export.json`` whose verification failed, with their status."""
    entries = [entry for tower in bundle["towers"].values() for entry in tower["files"].values()]
    return {entry["file"]: entry["status"] for entry in entries if entry["status"] != VERIFIED}


def _describe(tower: ExportTower, expected: Sequence[Tensor]) -> dict[str, Any]:
    """Return names, shapes and dtypes of a tower's inputs and outputs."""
    outputs = [
        {"name": name, "shape": ["batch", *rows.shape[1:]], "dtype": "float32"}
        for name, rows in zip(tower.output_names, expected, strict=True)
    ]
    shape, dtype = ["batch", *tower.examples.shape[1:]], str(tower.examples.dtype).removeprefix("torch.")
    return {
        "input": {"name": tower.input_name, "shape": shape, "dtype": dtype},
        "outputs": outputs,
        "normalized": tower.normalized,
    }


def _delete_earlier_export(directory: Path) -> None:
    """Delete the files of an earlier export, which could be mistaken for files of this one."""
    manifest = directory / MANIFEST
    if not manifest.exists():
        return

    def parse(content: Any) -> list[str]:
        entries = [entry for tower in content["towers"].values() for entry in tower["files"].values()]
        return [file for entry in entries for file in entry["sha256"]]

    remedy = "It may be from another program or version; export into another directory."
    files = read_json(manifest, parse, remedy=remedy)
    for file in files:
        if not (directory / file).resolve().is_relative_to(directory.resolve()):
            raise DgmrError(
                f"{manifest} names {file}, which is not inside its directory. Export into another directory."
            )
    for file in files:
        (directory / file).unlink(missing_ok=True)
        (directory / f"{file}.failed").unlink(missing_ok=True)
    manifest.unlink()


def _export_file(
    name: str,
    tower: ExportTower,
    expected: Sequence[Tensor],
    directory: Path,
    staging: Path,
    *,
    dense: Path | None,
    tolerance: float,
    latency_batches: Sequence[int],
) -> dict[str, Any]:
    """Write one file in ``staging``, verify it, and move it to ``directory``. Return its entry in ``export.json``."""
    folder = staging / f"{tower.kind} {name}"
    staging_path = folder / f"{tower.file_stem}{FORMATS[name].suffix}"
    dense_path = dense / staging_path.relative_to(folder) if dense else None
    if dense_path and not dense_path.exists():
        dense_path = None
    if error := _write(name, tower, staging_path, onnx_source=staging / f"{tower.kind}.onnx"):
        verification = {"status": error}
    else:
        verification = verify(
            name,
            staging_path,
            tower,
            expected,
            tolerance=tolerance,
            dense=dense_path,
            latency_batches=latency_batches,
        )
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    entry = {
        "file": str(staging_path.relative_to(folder)),
        "sha256": {file: sha256(path) for file, path in paths.items()},
        "megabytes": sum(path.stat().st_size for path in paths.values()) / 1e6,
        **verification,
    }
    (directory / tower.file_stem).parent.mkdir(parents=True, exist_ok=True)
    for file, path in paths.items():
        os.replace(path, directory / (file if entry["status"] == VERIFIED else f"{file}.failed"))
    return entry


def _write(name: str, tower: ExportTower, path: Path, onnx_source: Path) -> str | None:
    """Write the file. Return the exporter's error as a status, or None.

    ``onnx_source`` is the float32 ONNX file that other formats are converted from. It is written if needed.
    """
    file_format = FORMATS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    _reserve_disk_space(tower, path.parent)
    try:
        with write_errors(path):
            if file_format.write:
                file_format.write(tower, path)
            if file_format.convert:
                if not onnx_source.exists():
                    onnx_file.write(tower, onnx_source)
                file_format.convert(onnx_source, path)
    except (OSError, DgmrError):  # the disk is full, or a package is missing
        raise
    except Exception as error:  # the exporter's own error: continue with the other formats
        for partial_file in path.parent.glob(f"{path.name}*"):
            partial_file.unlink()
        return f"cannot be written: {first_line(error)}"
    return None


def _reserve_disk_space(tower: ExportTower, folder: Path) -> None:
    """Raise an error if a file may not fit on the disk, into a quota, or below a file-size limit.

    torch's writers abort the process in these cases. The space is therefore allocated and freed before they start.
    """
    tensors = (*tower.module.parameters(), *tower.module.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    check_room(folder, int(1.2 * size + PROGRAM_BYTES), f"a file of the {tower.kind} tower")
