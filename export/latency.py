"""Latency side by side: the contestants take turns in one run, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def median_milliseconds(contestants: Mapping[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Median time of one call of each, in milliseconds, after two calls to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}
