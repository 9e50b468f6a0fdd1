"""Time DGMR's selection at the size of one MLP of EVA02-CLIP-E: the paper's loop, LAPACK's pivoted QR, and plain QR.

    python benchmarks/selection.py --out benchmarks/results/selection.json

The matrix has 15360 rows and 1792 columns with a decaying spectrum, in float64, and 1792 rows are picked. The paper's
loop takes the row with the largest residual norm and projects all rows onto its orthogonal complement.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import lapack
from torch import Tensor

from dgmr_tp.pruning.selection import select_diverse_rows

ROWS, COLUMNS = 15360, 1792


def matrix() -> np.ndarray:
    rng = np.random.default_rng(0)
    basis = scipy.linalg.qr(rng.standard_normal((COLUMNS, COLUMNS)), mode="economic")[0]
    return rng.standard_normal((ROWS, COLUMNS)) * np.linspace(1, 0.05, COLUMNS) @ basis


def paper_loop(weight: np.ndarray | Tensor) -> np.ndarray:
    residual, picks = torch.as_tensor(weight).clone(), []
    for _ in range(COLUMNS):
        norms = residual.norm(dim=1)
        norms[picks] = -1
        pick = int(norms.argmax())
        picks.append(pick)
        direction = residual[pick] / residual[pick].norm()
        residual -= torch.outer(residual @ direction, direction)
    return np.array(picks)


def plain_qr(weight: np.ndarray) -> None:
    lapack.dgeqrf(weight.copy().T, lwork=64 * ROWS, overwrite_a=True)  # the same blocking as select_diverse_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    weight = matrix()
    methods: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
        "ours: LAPACK geqp3": lambda w: select_diverse_rows(w, COLUMNS).order[:COLUMNS],
        "plain QR, no pivoting (selects nothing)": plain_qr,
        "the paper's loop": paper_loop,
    }
    seconds, picks = {}, {}
    for name, select in methods.items():
        started = time.perf_counter()
        picks[name] = select(weight)
        seconds[name] = time.perf_counter() - started
        print(f"{name:<42} {seconds[name]:8.1f} s", flush=True)
    reference = set(picks["the paper's loop"].tolist())  # type: ignore[union-attr]
    common = {name: len(reference & set(chosen.tolist())) for name, chosen in picks.items() if chosen is not None}
    result = {
        "rows": ROWS,
        "columns": COLUMNS,
        "seconds": seconds,
        "times_faster_than_the_loop": {name: seconds["the paper's loop"] / value for name, value in seconds.items()},
        "picks_in_common_with_the_loop": common,
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "gpu": "not measured",
    }
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
