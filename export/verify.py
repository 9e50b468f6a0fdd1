"""The proof of one exported file, in a process of its own: a runtime that crashes is a verdict, not an end.

``prove`` starts ``python -m dgmr_tp.export.verify REQUEST``, which opens the file as a deployer would, compares its outputs with
PyTorch's at several batch sizes, then times it beside the original's file.
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

from dgmr_tp.export.export_tower import Part
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.export.latency import latencies

BATCHES = (1, 3, 8)
EXAMPLES = 24
"""Images that a file is proved with."""
VERIFIED = "verified"
HANGING = 6 * 3600
"""Seconds after which a runtime is given up."""


def prove(
    kind: str,
    path: Path,
    part: Part,
    expected: Sequence[Tensor],
    *,
    tolerance: float,
    original: Path | None = None,
    latency_batches: Sequence[int] = (1, 8),
) -> dict[str, Any]:
    """Compare the file with PyTorch's outputs, and time it.

    Args:
        kind: a key of ``FORMATS``.
        path: the file; ``part``: what it was made from; ``expected``: PyTorch's outputs for the part's examples.
        tolerance: the largest relative error that is allowed.
        original: the same kind of file of the encoder before pruning, timed in turn with this one.
        latency_batches: batch sizes to time.

    Returns:
        ``verdict`` (``verified`` or what was wrong) and, as far as the process came: per output and batch size the largest
        ``relative_error`` of an example and the lowest ``cosine`` (of ``patches``: of a patch); ``peak_memory_mb``, what the process
        took beyond what it held before it opened the file; ``latency_ms`` per batch size and contestant.
    """
    with tempfile.TemporaryDirectory(prefix="dgmr-proof-") as scratch:
        tensors = {"input": part.examples, **dict(zip(part.outputs, expected, strict=True))}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, Path(scratch) / "examples.safetensors"
        )
        request = {
            "kind": kind,
            "file": str(path.absolute()),
            "outputs": part.outputs,
            "original": None if original is None else str(original.absolute()),
            "latency_batches": list(latency_batches),
            "threads": torch.get_num_threads(),
            "tolerance": tolerance,
        }
        (Path(scratch) / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "dgmr_tp.export.verify", scratch]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING)
        except subprocess.TimeoutExpired:
            return {"verdict": f"the runtime did not end within {HANGING // 3600} hours"}
        answer = Path(scratch) / "answer.json"
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    if done.returncode < 0:
        return {**found, "verdict": f"the runtime crashed ({signal.Signals(-done.returncode).name})"}
    if done.returncode > 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {**found, "verdict": f"the runtime refused it: {lines[-1][:200] if lines else 'without a word'}"}
    return found


def _main(scratch: Path) -> None:
    request = json.loads((scratch / "request.json").read_text())
    tensors = load_file(scratch / "examples.safetensors")
    examples, threads = tensors.pop("input"), request["threads"]
    torch.set_num_threads(threads)
    read = FORMATS[request["kind"]].read
    before = _peak()
    run = read(Path(request["file"]), threads)
    found: dict[str, Any] = {"relative_error": {}, "cosine": {}}
    for batch in BATCHES:
        rows = [run(chunk) for chunk in examples.split(batch)]
        for name, outputs in zip(request["outputs"], zip(*rows, strict=True), strict=True):
            error, cosine = _compare(torch.cat(outputs).float(), tensors[name])
            found["relative_error"].setdefault(name, {})[batch] = error
            found["cosine"].setdefault(name, {})[batch] = cosine
    found["peak_memory_mb"] = _peak() - before
    found["verdict"] = _judge(found["relative_error"], request["tolerance"])
    _answer(scratch, found)  # what is known stays known if the timing crashes
    if found["verdict"] != VERIFIED:
        return
    contestants = (
        {"original": read(Path(request["original"]), threads), "pruned": run}
        if request["original"]
        else {"pruned": run}
    )
    found["latency_ms"] = {}
    for batch in request["latency_batches"]:
        inputs = examples.repeat(math.ceil(batch / len(examples)), *[1] * (examples.ndim - 1))[:batch]
        found["latency_ms"][batch] = latencies(
            {name: lambda call=call, x=inputs: call(x) for name, call in contestants.items()}
        )
    _answer(scratch, found)


def _compare(found: Tensor, expected: Tensor) -> tuple[float | None, float | None]:
    """The largest relative error of an example and the lowest cosine of a vector; None where the output is not finite."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return None, None
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    if not bool(error.isfinite().all()):
        return None, None
    return float(error.max()), float(F.cosine_similarity(found, expected, dim=-1).min())


def _judge(errors: dict[str, dict[int, float | None]], tolerance: float) -> str:
    flat = [(name, batch, error) for name, by_batch in errors.items() for batch, error in by_batch.items()]
    for name, batch, error in flat:
        if error is None:
            return f"its {name} at batch {batch} is not finite or has another shape"
    name, batch, worst = max(flat, key=lambda entry: entry[2] or 0.0)
    assert worst is not None
    return (
        VERIFIED
        if worst <= tolerance
        else f"its {name} at batch {batch} differs from PyTorch's by {worst:.1e} (allowed {tolerance:.0e})"
    )


def _answer(scratch: Path, found: dict[str, Any]) -> None:
    (scratch / "answer.json").write_text(json.dumps(found))


def _peak() -> float:
    """The most memory that this process has held, MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
