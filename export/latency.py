"""Latency of several functions, measured in turn in one process so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

WARMUP_CALLS = 2


def latencies(functions: Mapping[str, Callable[[], object]], repeats: int = 15) -> dict[str, dict[str, float]]:
    """Measure the time of one call of each function, in milliseconds.

    Args:
        functions: the functions to time, by name. They take turns, after :data:`WARMUP_CALLS` calls each.
        repeats: measured calls per function.

    Returns:
        For each name the ``median`` and the quartiles ``low`` and ``high``.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + WARMUP_CALLS):
        for name, call in functions.items():
            start = time.perf_counter()
            call()
            if turn >= WARMUP_CALLS:
                times[name].append(1000 * (time.perf_counter() - start))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: {"median": median, "low": low, "high": high} for name, (low, median, high) in quartiles.items()}
