"""Allocation: the number of neurons that each site keeps.

Works on sites, costs and error curves, and returns integers. Knows no modules and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from numbers import Integral
from typing import Any, TypedDict, cast

import numpy as np
import scipy.optimize

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.cost import Cost
from dgmr_tp.pruning.sites import Site

MIN_WIDTH_DIVISOR = 64
"""Minimum fitted width: a site keeps at least one neuron in this many. It is the smallest step of AMP's search."""


class Amount(TypedDict, total=False):
    """Number of neurons to keep, in one of four forms, and the multiple to round to. See :func:`keep_counts`."""

    mlp_ratio: float | None
    """Hidden width as a multiple of the token width."""
    keep_ratio: float | None
    """Hidden width as a fraction of the current one."""
    keep: int | Mapping[str, int] | None
    """Hidden width, for all sites or by pattern."""
    budget: Mapping[str, float] | None
    """Cost of the whole tower by key."""
    round_to: int
    """Multiple that keep counts are rounded down to."""


AMOUNTS = ("mlp_ratio", "keep_ratio", "keep", "budget")
"""Names of the options that set the size."""
BUDGETS = ("params", "flops", "latency")
"""What a budget can limit."""


def given_amount(amount: Mapping[str, Any], ways: Sequence[str] = AMOUNTS) -> str | None:
    """Return which of ``ways`` is given; None if none is.

    Raises:
        DgmrError: more than one is given.
    """
    given = [way for way in ways if amount.get(way) is not None]
    if len(given) > 1:
        raise DgmrError(
            f"exactly one of {', '.join(ways)} says how many neurons stay, got {', '.join(given)}. Keep one."
        )
    return given[0] if given else None


def with_default_amount(amount: Amount) -> Amount:
    """Return ``amount``, with ``mlp_ratio=1`` if it does not say how many neurons stay."""
    return amount if given_amount(amount) else {**amount, "mlp_ratio": 1}


def keep_counts(
    sites: Sequence[Site],
    *,
    mlp_ratio: float | None = None,
    keep_ratio: float | None = None,
    keep: int | Mapping[str, int] | None = None,
    budget: Mapping[str, float] | None = None,
    round_to: int = 1,
    costs: Mapping[str, Cost] | None = None,
) -> dict[str, int]:
    """Return the hidden width of each site after pruning, by site name.

    Give exactly one of ``mlp_ratio``, ``keep_ratio``, ``keep`` and ``budget``. Ratios are exact decimals, rounded down:
    0.29 of 100 is 29.

    Args:
        sites: the MLPs.
        mlp_ratio: hidden width as a multiple of the token width. The papers' prune1 and prune2 are 1 and 2.
        keep_ratio: hidden width as a fraction of the current one.
        keep: hidden width, for all sites or by pattern, such as ``{"blocks.0.*": 64, "*": 128}``. The first matching
            pattern counts. A site without a match keeps all neurons.
        budget: cost of the whole tower, ``{"params": 0.5}``, ``{"flops": 0.4}`` or both. Up to 1 it is a share of the
            current cost, above 1 an absolute number. All sites keep the same share of their neurons, the largest that
            fits.
        round_to: keep counts are rounded down to a multiple of this, but not to zero. A site that keeps all neurons, or
            has fewer than ``round_to``, is not rounded. ``keep`` is only checked.
        costs: cost of the tower and of each neuron by budget key, for ``budget``.

    Raises:
        DgmrError: not exactly one amount is given, a value is invalid, a site would keep no neuron or more than it has,
            or the budget cannot be met.
    """
    ways = {"mlp_ratio": mlp_ratio, "keep_ratio": keep_ratio, "keep": keep, "budget": budget}
    if (way := given_amount(ways)) is None:
        raise DgmrError(f"nothing says how many neurons stay. Give exactly one of {', '.join(AMOUNTS)}.")
    if not _is_integer(round_to) or round_to < 1:
        raise DgmrError(f"round_to = {round_to} is not valid. Give an integer of 1 or more.")
    for count in keep.values() if isinstance(keep, Mapping) else (keep,):
        if count is not None and not _is_integer(count):
            raise DgmrError(f"keep = {count} is not an integer. Give a number of neurons.")
    for key, ratio in (("mlp_ratio", mlp_ratio), ("keep_ratio", keep_ratio)):
        if ratio is not None and not isfinite(ratio):
            raise DgmrError(f"{key} = {ratio} is not a finite number. Give a positive number.")
    if budget is not None:
        return _uniform_counts(budget, sites, round_to, costs or {})
    counts = {}
    for pattern in keep if isinstance(keep, Mapping) else ():
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise DgmrError(
                f"keep: no site matches {pattern!r}. The sites are {', '.join(site.name for site in sites)}."
            )
    for site in sites:
        if mlp_ratio is not None:
            count = _product(mlp_ratio, site.width)
        elif keep_ratio is not None:
            count = _product(keep_ratio, site.hidden)
        elif isinstance(keep, Mapping):
            count = next((n for pattern, n in keep.items() if fnmatchcase(site.name, pattern)), site.hidden)
        else:
            count = cast(int, keep)
        if not 1 <= count <= site.hidden:
            raise DgmrError(
                f"{way} = {ways[way]} keeps {count} neurons of site {site.name}, which has {site.hidden}. Give an "
                f"amount that makes it keep 1 to {site.hidden}."
            )
        counts[site.name] = _rounded(count, round_to, site)
        if keep is not None and counts[site.name] != count:
            raise DgmrError(
                f"keep = {count} for site {site.name} is not a multiple of round_to = {round_to}. Change one of them."
            )
    return counts


def _uniform_counts(
    budget: Mapping[str, float], sites: Sequence[Site], round_to: int, costs: Mapping[str, Cost]
) -> dict[str, int]:
    """Return the counts of the largest share of neurons, the same at every site, whose cost is within the budget."""
    limits = _limits(budget, costs)
    widest = max(site.hidden for site in sites)

    def counts_at(step: int) -> dict[str, int]:
        return {site.name: _rounded(max(1, site.hidden * step // widest), round_to, site) for site in sites}

    def fits(step: int) -> bool:
        return all(costs[key].without(_removed(sites, counts_at(step))) <= limit for key, limit in limits.items())

    _check_reachable(counts_at(0), sites, budget, limits, costs)
    low, high = 0, widest  # bisection: fits(low) holds
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return counts_at(low)


def fitted_widths(
    sites: Sequence[Site],
    loss: Mapping[str, np.ndarray],
    *,
    budget: Mapping[str, float],
    costs: Mapping[str, Cost],
    round_to: int = 1,
) -> dict[str, int]:
    """Return the widths with the smallest total loss under a budget, by site name. Widths differ between sites.

    Each loss curve is replaced by its lower convex hull. On the hulls the optimum is that of a linear program, whose
    basic solution leaves at most one site per limit between two corners of its hull. With one limit, it takes the edges
    of the hulls by gain per cost. The remaining budget goes to the neurons that still fit.

    Each site keeps at least one neuron in :data:`MIN_WIDTH_DIVISOR`, because a curve from few images does not justify
    the removal of a whole MLP.

    Args:
        sites: the MLPs.
        loss: by site name, float64 ``[hidden + 1]``: loss by number of kept neurons.
        budget: as for :func:`keep_counts`.
        costs: as for :func:`keep_counts`.
        round_to: as for :func:`keep_counts`.

    Raises:
        DgmrError: a key of the budget is unknown, or the budget cannot be met.
    """
    limits = check_budget(sites, budget, costs, round_to)
    counts = minimum_widths(sites, round_to)
    remaining = {key: limit - costs[key].without(_removed(sites, counts)) for key, limit in limits.items()}
    edges = []  # (site, neurons, gain) of the hulls, in ascending width per site
    for site in sites:
        corners = [*range(counts[site.name], site.hidden, round_to), site.hidden]
        hull = _lower_hull(np.array(corners), np.minimum.accumulate(loss[site.name])[corners])
        edges += [(site, high - low, loss[site.name][low] - loss[site.name][high]) for low, high in pairwise(hull)]
    if not edges:
        return counts
    scale = {key: max(1.0, float(remaining[key])) for key in limits}
    prices = [[costs[key].neuron[site.name] * neurons / scale[key] for site, neurons, _ in edges] for key in limits]
    gains = np.array([gain for _, _, gain in edges])
    density = gains / np.sum(prices, axis=0)
    shares = np.zeros(len(edges))  # with one limit, the order by gain per cost is optimal
    if len(limits) > 1:
        objective = -gains / max(gains.max(), 1e-300)
        shares = scipy.optimize.linprog(objective, A_ub=prices, b_ub=np.ones(len(limits)), bounds=(0, 1)).x
    stopped = set()  # sites with an edge that did not fit, after which no edge can be added
    # Complete edges of the solution come first, then the others by gain per cost.
    for index in np.lexsort((-density, -shares)):
        site, neurons, gain = edges[index]
        if gain <= 0 or site.name in stopped:
            continue
        fits = min(remaining[key] // costs[key].neuron[site.name] for key in limits)
        added = neurons if fits >= neurons else int(fits) // round_to * round_to
        counts[site.name] += added
        remaining = {key: amount - added * costs[key].neuron[site.name] for key, amount in remaining.items()}
        if added < neurons:
            stopped.add(site.name)
    return counts


def check_budget(
    sites: Sequence[Site], budget: Mapping[str, float], costs: Mapping[str, Cost], round_to: int = 1
) -> dict[str, Fraction]:
    """Return the limits of a budget in the units of ``costs``.

    Raises:
        DgmrError: a key of the budget is unknown, or :func:`fitted_widths` cannot meet it.
    """
    limits = _limits(budget, costs)
    _check_reachable(minimum_widths(sites, round_to), sites, budget, limits, costs)
    return limits


def minimum_widths(sites: Sequence[Site], round_to: int = 1) -> dict[str, int]:
    """Return the minimum width of each site in :func:`fitted_widths`, by site name."""
    return {site.name: _rounded(-(-site.hidden // MIN_WIDTH_DIVISOR), round_to, site) for site in sites}


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Return the ``x`` of the corners of the lower convex hull. ``x`` is ascending (Andrew's monotone chain)."""
    corners: list[int] = []
    for k in range(len(x)):
        while len(corners) > 1:
            i, j = corners[-2:]
            if (y[j] - y[i]) * (x[k] - x[j]) < (y[k] - y[j]) * (x[j] - x[i]):
                break
            corners.pop()
        corners.append(k)
    return [int(x[k]) for k in corners]


def _limits(budget: Mapping[str, float], costs: Mapping[str, Cost]) -> dict[str, Fraction]:
    limits = {}
    for key, value in budget.items():
        if key not in costs:
            hint = " For latency, give rankings or a criterion that needs images." if key == "latency" else ""
            raise DgmrError(f"unknown budget {key!r}. Use one of {', '.join(costs) or 'none'}.{hint}")
        if not isfinite(value) or value <= 0:
            raise DgmrError(
                f"budget {key} = {value} is not positive. Give a share of the tower up to 1, or a number above 1."
            )
        limits[key] = Fraction(str(value)) * (costs[key].total if value <= 1 else 1)
    return limits


def _removed(sites: Sequence[Site], counts: Mapping[str, int]) -> dict[str, int]:
    """Return the number of removed neurons by site name."""
    return {site.name: site.hidden - counts[site.name] for site in sites}


def _check_reachable(
    minimum: Mapping[str, int],
    sites: Sequence[Site],
    budget: Mapping[str, float],
    limits: Mapping[str, Fraction],
    costs: Mapping[str, Cost],
) -> None:
    for key, limit in limits.items():
        lowest = costs[key].without(_removed(sites, minimum))
        if lowest > limit:
            raise DgmrError(
                f"budget {key} = {budget[key]} cannot be met: with the fewest neurons the tower still costs "
                f"{lowest:,}. Give a larger budget."
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _rounded(count: int, round_to: int, site: Site) -> int:
    return count if count == site.hidden else min(site.hidden, max(round_to, count // round_to * round_to))


def _product(ratio: float, width: int) -> int:
    """Return ``ratio · width`` rounded down, with ``ratio`` as the decimal that is written."""
    return int(Fraction(str(ratio)) * width)
