"""The greedy Gram-Schmidt against a direct implementation of the paper's procedure."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgmr_tp.pruning.selection import select_diverse_rows

EPS = np.finfo(np.float64).eps


def residuals_along(weight: np.ndarray, order: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Run the paper's procedure with the picks ``order``.

    Returns the residual norm of each pick, and the residual norms of all rows at its step (-1 for earlier picks).
    """
    spent = max(weight.shape) * EPS * np.linalg.norm(weight)
    left = np.ones(len(weight), dtype=bool)
    steps = []
    residual, picks_in_round = None, 0
    for pick in order:
        if residual is not None:
            norms = np.where(left, np.linalg.norm(residual, axis=1), -1)
        if residual is None or picks_in_round == weight.shape[1] or norms.max() <= spent:
            residual, picks_in_round = weight.copy(), 0
            norms = np.where(left, np.linalg.norm(residual, axis=1), -1)
        steps.append((norms[pick], norms))
        left[pick] = False
        picks_in_round += 1
        if norms[pick] > 0:
            direction = residual[pick] / np.linalg.norm(residual[pick])
            residual = residual - np.outer(residual @ direction, direction)
            # Projected twice, so that rounding errors do not accumulate in this reference.
            residual -= np.outer(residual @ direction, direction)
    return steps


def check(weight: np.ndarray, order: np.ndarray) -> None:
    weight = weight.astype(np.float64)
    assert sorted(order) == list(range(len(weight)))
    noise = 1e2 * max(weight.shape) * EPS * np.linalg.norm(weight)
    for place, (chosen, norms) in enumerate(residuals_along(weight, order)):
        best = norms.max()
        assert chosen >= best * (1 - 1e-6) - noise, f"pick {place} has residual {chosen}, the best {best}"
        runner_up = np.sort(norms)[-2] if len(norms) > 1 else -1
        if best > runner_up * (1 + 1e-6) + noise:
            assert order[place] == norms.argmax(), f"pick {place}"


MATRICES = {
    "random": lambda rng: rng.standard_normal((90, 24)),
    "wide": lambda rng: rng.standard_normal((10, 40)),
    "correlated": lambda rng: (
        rng.standard_normal((80, 6)) @ rng.standard_normal((6, 24)) + 0.05 * rng.standard_normal((80, 24))
    ),
    "rank deficient": lambda rng: rng.standard_normal((80, 7)) @ rng.standard_normal((7, 24)),
    "duplicated": lambda rng: np.repeat(rng.standard_normal((30, 16)), 3, axis=0),
    "zero rows": lambda rng: np.where(rng.random((60, 1)) < 0.3, 0, rng.standard_normal((60, 16))),
    "decaying": lambda rng: rng.standard_normal((70, 20)) * 10.0 ** -np.arange(20),
    "bf16": lambda rng: rng.standard_normal((90, 24)).astype(ml_dtypes.bfloat16).astype(np.float32),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_every_pick_has_the_largest_residual(kind):
    weight = MATRICES[kind](np.random.default_rng(3))
    check(weight, select_diverse_rows(weight).order)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 20),
    rank=st.integers(1, 20),
    copies=st.integers(0, 10),
    zeros=st.integers(0, 6),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_pick_has_the_largest_residual_for_any_matrix(rows, columns, rank, copies, zeros, exponent, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    weight = np.concatenate([weight, weight[rng.integers(rows, size=copies)], np.zeros((zeros, columns))])
    shuffled = rng.permutation(weight) * 10.0**exponent
    check(shuffled, select_diverse_rows(shuffled).order)


def test_the_check_refuses_a_swapped_order():
    weight = MATRICES["random"](np.random.default_rng(3))
    order = select_diverse_rows(weight).order.copy()
    order[[2, 60]] = order[[60, 2]]
    with pytest.raises(AssertionError):
        check(weight, order)


def test_zero_rows_come_last_and_equal_rows_count_once_a_round():
    weight = np.array([[0, 0], [3.0, 0], [3.0, 0], [0, 2.0], [0, 0]])
    order = select_diverse_rows(weight).order
    assert set(order[:2]) in ({1, 3}, {2, 3})
    assert order[2] in (1, 2)
    assert set(order[3:]) == {0, 4}


def test_residual_norms_fall_within_a_round():
    selection = select_diverse_rows(np.random.default_rng(0).standard_normal((50, 20)))
    for start in range(0, 50, 20):
        part = selection.residual[start : start + 20]
        assert (np.diff(part) <= 1e-12 * part[0]).all()


def test_order_is_nested():
    weight = np.random.default_rng(1).standard_normal((60, 20))
    order = select_diverse_rows(weight).order
    for keep in (5, 20, 33, 50):
        kept = np.sort(order[:keep])
        assert (kept[select_diverse_rows(weight[kept]).order] == order[:keep]).all()


@pytest.mark.parametrize("weight", [np.ones(3), np.array([[1.0, np.nan]]), np.array([[np.inf, 0.0]])])
def test_refuses_what_is_no_finite_matrix(weight):
    with pytest.raises(ValueError, match=r"matrix|NaN"):
        select_diverse_rows(weight)
