"""Verify one exported file in its own process, so that a runtime that crashes fails the file and not the export.

:func:`verify` starts ``python -m dgmr_tp.export.verify DIRECTORY``. That process opens the file as a deployment would,
compares its outputs with PyTorch's at several batch sizes, and times it in turn with the dense model's file.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgmr_tp.export.export_tower import ExportTower
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.export.latency import latencies
from dgmr_tp.utils.files import write_errors

BATCH_SIZES = (1, 3, 8)
NUM_EXAMPLES = 24
"""Number of images that callers should give for the verification."""
VERIFIED = "verified"
TIMEOUT_S = 6 * 3600


def verify(
    format_name: str,
    path: Path,
    tower: ExportTower,
    expected: Sequence[Tensor],
    *,
    tolerance: float,
    dense: Path | None = None,
    latency_batches: Sequence[int] = (1, 8),
) -> dict[str, Any]:
    """Compare a file's outputs with PyTorch's, and time it.

    Args:
        format_name: key of ``FORMATS``.
        path: the file.
        tower: the tower that the file was written from.
        expected: PyTorch's outputs for the tower's examples.
        tolerance: largest allowed relative error.
        dense: file of the dense model in the same format, timed in turn with this one.
        latency_batches: batch sizes to time.

    Returns:
        ``status`` (``verified``, or the problem) and, as far as the process came: ``relative_error``, the largest of an
        example, and ``cosine``, the lowest of a vector (for ``patches``: of a patch), each per output and batch size;
        ``peak_memory_mb``, the increase of the process's peak memory while it opens and runs the file; ``latency_ms``
        per batch size for ``pruned`` and ``dense``.
    """
    with tempfile.TemporaryDirectory(prefix="dgmr-verify-") as name:
        scratch = Path(name)
        tensors = {"input": tower.examples, **dict(zip(tower.output_names, expected, strict=True))}
        with write_errors(scratch):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch / "examples.safetensors")
        request = {
            "format": format_name,
            "file": str(path.absolute()),
            "outputs": tower.output_names,
            "dense": None if dense is None else str(dense.absolute()),
            "latency_batches": list(latency_batches),
            "threads": torch.get_num_threads(),
            "tolerance": tolerance,
        }
        (scratch / "request.json").write_text(json.dumps(request), "utf-8")
        command = [sys.executable, "-m", "dgmr_tp.export.verify", str(scratch)]
        try:
            process = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return {"status": f"the runtime did not end within {TIMEOUT_S // 3600} hours"}
        result_path = scratch / "result.json"
        result: dict[str, Any] = json.loads(result_path.read_text("utf-8")) if result_path.exists() else {}
    if process.returncode < 0:
        return {**result, "status": f"the runtime crashed ({signal.Signals(-process.returncode).name})"}
    if process.returncode > 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        return {**result, "status": f"the runtime failed: {lines[-1][:200] if lines else 'it printed no message'}"}
    return result


def _main(scratch: Path) -> None:
    """Verify the file of ``request.json`` and write ``result.json``."""
    request = json.loads((scratch / "request.json").read_text("utf-8"))
    tensors = load_file(scratch / "examples.safetensors")
    examples, threads = tensors.pop("input"), request["threads"]
    torch.set_num_threads(threads)
    file_format = FORMATS[request["format"]]
    read = file_format.read
    memory_before = _peak_memory_mb()
    run = read(Path(request["file"]), threads)
    result: dict[str, Any] = {"relative_error": {}, "cosine": {}}
    for batch_size in BATCH_SIZES:
        batches = [run(batch) for batch in examples.split(batch_size)]
        for name, outputs in zip(request["outputs"], zip(*batches, strict=True), strict=True):
            error, cosine = _compare_outputs(torch.cat(outputs).float(), tensors[name])
            result["relative_error"].setdefault(name, {})[batch_size] = error
            result["cosine"].setdefault(name, {})[batch_size] = cosine
    result["peak_memory_mb"] = _peak_memory_mb() - memory_before
    result["status"] = _status(result["relative_error"], request["tolerance"])
    if result["status"] == VERIFIED and file_format.find_problem:
        result["status"] = file_format.find_problem(Path(request["file"]), examples) or VERIFIED
    _write_result(scratch, result)  # survives a crash during the timing
    if result["status"] != VERIFIED:
        return
    functions = {"pruned": run}
    if request["dense"]:
        functions = {"dense": read(Path(request["dense"]), threads), "pruned": run}
    result["latency_ms"] = {}
    for batch_size in request["latency_batches"]:
        inputs = examples.repeat(math.ceil(batch_size / len(examples)), *[1] * (examples.ndim - 1))[:batch_size]
        calls = {name: lambda call=call, x=inputs: call(x) for name, call in functions.items()}
        result["latency_ms"][batch_size] = latencies(calls)
    _write_result(scratch, result)


def _compare_outputs(outputs: Tensor, expected: Tensor) -> tuple[float | None, float | None]:
    """Return the largest relative error of an example and the lowest cosine of a vector.

    Both are None if the shapes differ or a value is not finite.
    """
    if outputs.shape != expected.shape or not bool(outputs.isfinite().all()):
        return None, None
    error = (outputs - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    if not bool(error.isfinite().all()):
        return None, None
    return float(error.max()), float(F.cosine_similarity(outputs, expected, dim=-1).min())


def _status(errors: dict[str, dict[int, float | None]], tolerance: float) -> str:
    """Return ``verified`` if all errors, per output and batch size, are within the tolerance, or the problem."""
    rows = [(name, batch, error) for name, by_batch in errors.items() for batch, error in by_batch.items()]
    for name, batch, error in rows:
        if error is None:
            return f"its {name} at batch {batch} is not finite or has another shape"
    name, batch, largest = max(rows, key=lambda row: row[2] or 0.0)
    assert largest is not None
    if largest <= tolerance:
        return VERIFIED
    return f"its {name} at batch {batch} differs from PyTorch's by {largest:.1e} (allowed {tolerance:.0e})"


def _write_result(scratch: Path, result: dict[str, Any]) -> None:
    (scratch / "result.json").write_text(json.dumps(result), "utf-8")


def _peak_memory_mb() -> float:
    """Return the peak memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the parent's memory at the time of the fork
        [line] = [line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
