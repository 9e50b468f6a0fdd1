"""Measure time and memory of a comparison of a million old and new embeddings on a CPU.

    python benchmarks/index_scale.py --out benchmarks/results/index_scale.json

The data are random clusters of width 768, with 1,000 queries and 1,000 classes. The memory is the peak of the process
minus its memory with both arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import faiss
import torch

from dgmr_tp.evaluation.index_compatibility import compare_embeddings
from dgmr_tp.utils.files import atomic_write

ROWS, WIDTH, CLASSES = 1_000_000, 768, 1000


def memory_gb(field: str) -> float:
    """Return a field of /proc/self/status in GB."""
    [line] = [
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    ]
    return int(line.split()[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH)
    old = centers[torch.randint(CLASSES, (ROWS,))].add_(torch.randn(ROWS, WIDTH).mul_(0.5))
    new = torch.randn(ROWS, WIDTH).mul_(0.05).add_(old)
    memory_before, start = memory_gb("VmRSS"), time.perf_counter()
    comparison = compare_embeddings(old, new, classifier=centers.T.contiguous())
    seconds = time.perf_counter() - start
    result = {
        "rows": ROWS,
        "width": WIDTH,
        "seconds": seconds,
        "gigabytes": memory_gb("VmHWM") - memory_before,
        "arrays_gigabytes": 2 * old.numel() * 4 / 1e9,
        "verdict": comparison["verdict"],
        "threads": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
    }
    atomic_write(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
