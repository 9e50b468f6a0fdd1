"""Latency side by side: the contestants take turns in one run, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def latencies(contestants: Mapping[str, Callable[[], object]], repeats: int = 15) -> dict[str, dict[str, float]]:
    """Time of one call of each, in milliseconds, after two calls to warm up: ``median``, and the quartiles ``low`` and ``high``."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    found = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        found[name] = {"median": median, "low": low, "high": high}
    return found
