"""Throughput of a training compared with the peak of the machine, and its memory use."""

from __future__ import annotations

import resource
import time
from collections import deque
from itertools import pairwise

import torch

WINDOW_STEPS = 20
"""Steps over which the rate is averaged."""


class Throughput:
    """Samples and floating point operations per second over the last steps, and the memory of this process.

    Args:
        samples: samples in a step, over all processes.
        peak: floating point operations per second that all processes together can reach.
    """

    def __init__(self, samples: int, peak: float) -> None:
        self.samples, self.peak = samples, peak
        self.step_ends = deque([time.monotonic()], maxlen=WINDOW_STEPS + 1)

    def step(self, flops: float | None) -> dict[str, float]:
        """Record the end of a step and return the figures so far.

        Args:
            flops: floating point operations of a sample; None if they are not counted.

        Returns:
            ``samples_per_second`` and ``memory_gb``; with ``flops`` also ``tflops`` and ``share_of_peak``.
        """
        self.step_ends.append(time.monotonic())
        rate = self.samples * (len(self.step_ends) - 1) / max(1e-9, self.step_ends[-1] - self.step_ends[0])
        figures = {"samples_per_second": rate, "memory_gb": _peak_memory() / 1e9}
        if flops is None:
            return figures
        return {**figures, "tflops": rate * flops / 1e12, "share_of_peak": rate * flops / self.peak}


def format_throughput(figures: dict[str, float]) -> str:
    """Return the figures of :meth:`Throughput.step` as text that fits on a line of 80 columns."""
    counted = f" {figures['tflops']:.3g} TFLOP/s {100 * figures['share_of_peak']:.0f} %" if "tflops" in figures else ""
    return f"{figures['samples_per_second']:.0f}/s{counted} {figures['memory_gb']:.1f} GB"


def measure_peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """Return the floating point operations per second of a large matrix product on ``device``: the best of three."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=precision)
    ends = []
    for _ in range(4):  # the first one warms up
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.monotonic())
    return 2 * size**3 / min(after - before for before, after in pairwise(ends))


def _peak_memory() -> int:
    """Return the maximum bytes that this process allocated on the GPU, or in RAM on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
