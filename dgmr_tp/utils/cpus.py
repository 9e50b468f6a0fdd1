"""Number of CPUs that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""CPU time and period in microseconds, or ``max`` and the period. A container sees its own cgroup here."""


def available_cpus(quota_file: Path = CGROUP_QUOTA) -> int:
    """Return the number of CPUs in this process's affinity, limited by the quota of its cgroup (version 2).

    A container with a limit of two CPUs on a machine of 64 has an affinity of 64.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
