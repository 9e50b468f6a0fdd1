"""DGMR's selection: a greedy Gram-Schmidt over the rows of a matrix (arXiv 2506.08591, section 3.2).

Works on a plain matrix, one row a neuron; knows nothing of modules or pruners.

A round starts from the rows not chosen yet and repeats: take the row with the largest residual norm, project every row
onto the orthogonal complement of that residual. That is QR with column pivoting of the transposed matrix, so LAPACK's
``geqp3`` does it. A round ends after as many picks as the matrix has columns and the next begins on the rows left.

One stated deviation from the paper: a round also ends when the largest residual is spent, below
``max(rows, columns) · eps · ‖W‖`` (Frobenius). The paper goes on and orders what is left by rounding noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

BLOCK = 64
"""Columns that LAPACK may take at a time."""


@dataclass(frozen=True)
class Selection:
    """All rows of a matrix in the order in which the greedy procedure takes them."""

    order: np.ndarray
    """int64 ``[rows]``: row indices, first pick first."""
    residual: np.ndarray
    """float64 ``[rows]``: each pick's residual norm at its step; it rises where a new round begins."""


def select_diverse_rows(weight: np.ndarray, picks: int | None = None) -> Selection:
    """Order all rows of ``weight`` ``[rows, columns]`` by greedy Gram-Schmidt, in float64.

    The order is nested: the first ``k`` entries are the procedure's choice of ``k`` rows. Rows that are zero, or as
    small as the rank tolerance, come last, larger first.

    Args:
        weight: one row a neuron.
        picks: how many rows matter. No round begins after so many picks; the rows left follow by their norms, larger
            first.

    Raises:
        ValueError: ``weight`` is not a matrix or holds NaN or infinite values.
    """
    weight = np.asarray(weight, dtype=np.float64)
    if weight.ndim != 2:
        raise ValueError(f"select_diverse_rows needs a matrix [rows, columns], got shape {weight.shape}")
    if not np.isfinite(weight).all():
        raise ValueError("select_diverse_rows: the weight holds NaN or infinite values; the checkpoint is damaged")
    spent = max(weight.shape) * np.finfo(np.float64).eps * np.linalg.norm(weight)
    left = np.arange(len(weight))
    order, residual = [], []
    while len(left):
        wanted = picks is None or len(weight) - len(left) < picks
        pivots, norms = _pivoted_qr(weight[left]) if wanted else (left, np.zeros(0))
        count = int(np.count_nonzero(norms > spent))
        if count == 0:  # nothing but rows below the tolerance, or rows that nobody asked for
            norms = np.linalg.norm(weight[left], axis=1)
            pivots = np.argsort(-norms, kind="stable")
            norms, count = norms[pivots], len(left)
        order.append(left[pivots[:count]])
        residual.append(norms[:count])
        left = np.setdiff1d(left, order[-1])
    return Selection(np.concatenate(order), np.concatenate(residual)) if order else Selection(left, np.empty(0))


def _pivoted_qr(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pivots of ``rowsᵀ P = Q R`` and ``|diag R|``, which is each pivot's residual norm; ``min(rows.shape)`` of them.

    ``rows`` is overwritten: its transpose has the column order that LAPACK works on in place.
    """
    # SciPy's own choice of work space lets LAPACK take column by column, without the blocks that make it fast.
    count = len(rows)
    r, pivots, _, _, info = lapack.dgeqp3(rows.T, lwork=2 * count + (count + 1) * BLOCK, overwrite_a=True)
    if info != 0:
        raise ValueError(f"LAPACK dgeqp3 refused argument {-info} for a matrix of shape {rows.shape}")
    norms = np.abs(np.diagonal(r))
    return pivots[: len(norms)] - 1, norms
