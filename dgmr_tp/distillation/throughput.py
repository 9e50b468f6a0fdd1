"""The speed of a training next to what the machine can reach, and its memory."""

from __future__ import annotations

import resource
import time
from collections import deque
from itertools import pairwise

import torch

WINDOW = 20
"""Steps over which a rate is taken."""


class Speed:
    """Samples and operations a second over the last steps, and the memory of this process.

    Args:
        samples: in a step, over all processes.
        peak: operations a second that the processes could reach together.
    """

    def __init__(self, samples: int, peak: float) -> None:
        self.samples, self.peak = samples, peak
        self.ends = deque([time.monotonic()], maxlen=WINDOW + 1)

    def step(self, flops: float | None) -> dict[str, float]:
        """At the end of a step: ``samples_per_second``, ``memory_gb`` and, where ``flops``, a sample's operations, were counted,
        ``tflops`` and ``share_of_peak``."""
        self.ends.append(time.monotonic())
        rate = self.samples * (len(self.ends) - 1) / max(1e-9, self.ends[-1] - self.ends[0])
        found = {"samples_per_second": rate, "memory_gb": _memory() / 1e9}
        if flops is None:
            return found
        return {**found, "tflops": rate * flops / 1e12, "share_of_peak": rate * flops / self.peak}


def in_words(speed: dict[str, float]) -> str:
    """Short enough for a line of 80 columns."""
    counted = f" {speed['tflops']:.3g} TFLOP/s {100 * speed['share_of_peak']:.0f} %" if "tflops" in speed else ""
    return f"{speed['samples_per_second']:.0f}/s{counted} {speed['memory_gb']:.1f} GB"


def peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """Operations a second of a large matrix product here: what a training can come near to. The best of three."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=precision)
    ends = []
    for _ in range(4):  # the first is to warm up
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.monotonic())
    return 2 * size**3 / min(after - before for before, after in pairwise(ends))


def _memory() -> int:
    """The most bytes that this process held: of the GPU's memory, or of the machine's where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
