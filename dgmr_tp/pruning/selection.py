"""DGMR's selection: a greedy Gram-Schmidt over the rows of a matrix (arXiv 2506.08591, section 3.2).

Works on a plain matrix with one row per neuron and returns an order of the rows. Knows no modules and no pruners.

A round starts with all rows that are not picked yet. Each step picks the row with the largest residual norm and
projects every row onto the orthogonal complement of its residual. This is QR with column pivoting of the transposed
matrix, and LAPACK's ``geqp3`` computes it. A round ends after as many picks as the matrix has columns. The next round
starts with the remaining rows.

There is one deviation from the paper. A round also ends when the largest residual is at most
``max(rows, columns) · eps · ‖W‖`` (Frobenius norm). The paper continues and orders the remaining rows by rounding
errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

PIVOT_BLOCK = 64
"""Number of columns that LAPACK factorizes at a time."""


@dataclass(frozen=True)
class Selection:
    """All rows of a matrix in the order of the greedy procedure."""

    order: np.ndarray
    """int64 ``[rows]``: row indices, first pick first."""
    residual: np.ndarray
    """float64 ``[rows]``: residual norm of each pick at its step. It rises at the start of a round."""


def select_diverse_rows(weight: np.ndarray, picks: int | None = None) -> Selection:
    """Order all rows of a matrix by greedy Gram-Schmidt, in float64.

    The order is nested: its first ``k`` entries are the procedure's choice of ``k`` rows. Rows with a norm of at most
    the rank tolerance come last, larger first.

    Args:
        weight: ``[rows, columns]``, one row per neuron.
        picks: number of rows that need an order. No round starts after this number of picks, and the remaining rows
            follow by norm, larger first. Default: all.

    Returns:
        The order of all rows and their residual norms.

    Raises:
        ValueError: ``weight`` is not a matrix, or contains NaN or infinite values.
    """
    weight = np.asarray(weight, dtype=np.float64)
    if weight.ndim != 2:
        raise ValueError(f"select_diverse_rows got an array of shape {weight.shape}. Give a matrix [rows, columns].")
    if not np.isfinite(weight).all():
        raise ValueError("select_diverse_rows: the weight holds NaN or infinite values. The checkpoint is damaged.")
    tolerance = max(weight.shape) * np.finfo(np.float64).eps * np.linalg.norm(weight)
    remaining = np.arange(len(weight))
    order, residual = [], []
    while len(remaining):
        needs_round = picks is None or len(weight) - len(remaining) < picks
        pivots, norms = _pivoted_qr(weight[remaining]) if needs_round else (remaining, np.zeros(0))
        count = int(np.count_nonzero(norms > tolerance))
        if count == 0:  # the remaining rows are below the tolerance, or need no order
            norms = np.linalg.norm(weight[remaining], axis=1)
            pivots = np.argsort(-norms, kind="stable")
            norms, count = norms[pivots], len(remaining)
        order.append(remaining[pivots[:count]])
        residual.append(norms[:count])
        remaining = np.setdiff1d(remaining, order[-1])
    return Selection(np.concatenate(order), np.concatenate(residual)) if order else Selection(remaining, np.empty(0))


def _pivoted_qr(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pivots of ``rowsᵀ P = Q R``, and ``|diag R|``, the residual norm of each pivot.

    There are ``min(rows.shape)`` of them. ``rows`` is overwritten: its transpose has the memory order that LAPACK needs
    to work in place.
    """
    # With SciPy's default work space, LAPACK factorizes column by column instead of in fast blocks.
    count = len(rows)
    r, pivots, _, _, info = lapack.dgeqp3(rows.T, lwork=2 * count + (count + 1) * PIVOT_BLOCK, overwrite_a=True)
    if info != 0:
        raise ValueError(f"LAPACK dgeqp3 rejected its argument {-info} for a matrix of shape {rows.shape}.")
    norms = np.abs(np.diagonal(r))
    return pivots[: len(norms)] - 1, norms
