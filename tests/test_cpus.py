"""Number of CPUs, in a process with an affinity and under a cgroup's quota."""

import os
import subprocess
import sys

import pytest

from dgmr_tp.utils.cpus import available_cpus


def test_the_affinity_limits_the_cpus():
    program = (
        "import os; from dgmr_tp.utils.cpus import available_cpus; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(available_cpus())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("quota", "expected"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("6400000 100000", None)]
)
def test_a_quota_limits_the_cpus(tmp_path, quota, expected):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cpus(tmp_path / "cpu.max") == (expected or len(os.sched_getaffinity(0)))


def test_without_cgroups_the_affinity_counts(tmp_path):
    assert available_cpus(tmp_path / "missing") == len(os.sched_getaffinity(0))
