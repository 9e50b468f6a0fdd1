"""How many neurons each site keeps: integers that a reader can check, never a float ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from typing import Any, TypedDict, cast

import numpy as np
import scipy.optimize

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.cost import Cost
from dgmr_tp.pruning.sites import Site

FLOOR = 64
"""No fitted width is below this part of the neurons."""


class Amount(TypedDict, total=False):
    """How many neurons stay, in one of four ways, and to what multiple that is rounded; see :func:`keep_counts`."""

    mlp_ratio: float | None
    keep_ratio: float | None
    keep: int | Mapping[str, int] | None
    budget: Mapping[str, float] | None
    round_to: int


AMOUNTS = ("mlp_ratio", "keep_ratio", "keep", "budget")
"""The ways to say how many neurons stay."""
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
            f"Exactly one of {', '.join(ways)} says how many neurons stay, got {', '.join(given)}. Keep one."
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
    """The hidden width of each site after pruning, by site name. Give exactly one of the first four.

    Args:
        mlp_ratio: hidden width as a multiple of the token width (the papers' prune1 and prune2 are 1 and 2).
        keep_ratio: hidden width as a fraction of what it is now.
        keep: the hidden width itself, for all sites or by pattern (``{"blocks.0.*": 64, "*": 128}``, first match
            counts; a site that no pattern matches keeps all).
        budget: what the whole tower may cost, ``{"params": 0.5}``, ``{"flops": 0.4}`` or both: up to 1 a share of what
            it costs now, above 1 a number. Every site keeps the same share of its neurons, the largest one that fits.
        round_to: keep counts are multiples of this: the largest not above the count, but not zero; a site that keeps
            all, or has fewer, stays as it is. For ``keep`` only a check, since those counts are the user's.
        costs: what ``params`` and ``flops`` mean, for ``budget``.

    Ratios are taken as the decimals they are written as and rounded down: 0.29 of 100 is 29.

    Raises:
        DgmrError: not exactly one was given, a site would keep none or more than it has, or the budget cannot be met.
    """
    ways = {"mlp_ratio": mlp_ratio, "keep_ratio": keep_ratio, "keep": keep, "budget": budget}
    if (way := given_amount(ways)) is None:
        raise DgmrError(f"Nothing says how many neurons stay. Give exactly one of {', '.join(AMOUNTS)}.")
    if round_to < 1:
        raise DgmrError(f"round_to = {round_to}; it must be 1 or more")
    for key, ratio in (("mlp_ratio", mlp_ratio), ("keep_ratio", keep_ratio)):
        if ratio is not None and not isfinite(ratio):
            raise DgmrError(f"{key} = {ratio} is no number")
    if budget is not None:
        return _within(budget, sites, round_to, costs or {})
    counts = {}
    for pattern in keep if isinstance(keep, Mapping) else ():
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise DgmrError(f"keep: no site matches {pattern!r}; sites: {', '.join(site.name for site in sites)}")
    for site in sites:
        if mlp_ratio is not None:
            count = _floor(mlp_ratio, site.width)
        elif keep_ratio is not None:
            count = _floor(keep_ratio, site.hidden)
        elif isinstance(keep, Mapping):
            count = next((n for pattern, n in keep.items() if fnmatchcase(site.name, pattern)), site.hidden)
        else:
            count = cast(int, keep)
        if not 1 <= count <= site.hidden:
            raise DgmrError(
                f"{way} = {ways[way]} keeps {count} neurons of site {site.name}, which has {site.hidden}; keep 1 to "
                f"{site.hidden}"
            )
        counts[site.name] = _rounded(count, round_to, site)
        if keep is not None and counts[site.name] != count:
            raise DgmrError(f"keep = {count} for site {site.name} is no multiple of round_to = {round_to}")
    return counts


def _within(
    budget: Mapping[str, float], sites: Sequence[Site], round_to: int, costs: Mapping[str, Cost]
) -> dict[str, int]:
    limits = _limits(budget, costs)
    widest = max(site.hidden for site in sites)

    def share(step: int) -> dict[str, int]:
        return {site.name: _rounded(max(1, site.hidden * step // widest), round_to, site) for site in sites}

    def fits(step: int) -> bool:
        return all(costs[key].without(_cut(sites, share(step))) <= limit for key, limit in limits.items())

    _refuse_unmet(share(0), sites, budget, limits, costs)
    low, high = 0, widest  # fits(low); the largest step that fits is found by halving
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return share(low)


def fitted_widths(
    sites: Sequence[Site],
    loss: Mapping[str, np.ndarray],
    *,
    budget: Mapping[str, float],
    costs: Mapping[str, Cost],
    round_to: int = 1,
) -> dict[str, int]:
    """The widths that lose least in sum under a budget, each MLP with a width of its own.

    Every curve is replaced by its lower convex hull, on which the optimum is that of a linear programme; its basic
    solution leaves at most one site per limit between two corners. What room is left goes to the neurons that still
    fit.

    Args:
        sites: the MLPs.
        loss: by site name, float64 ``[hidden + 1]``: what is lost when the site keeps so many neurons.
        budget, costs, round_to: as for :func:`keep_counts`.

    No site falls below a 64th of its neurons, the smallest step of AMP's search: a curve from a few images is no reason
    to lose a whole MLP.

    Raises:
        DgmrError: the budget cannot be met.
    """
    limits = check_budget(sites, budget, costs, round_to)
    counts = least(sites, round_to)
    left = {key: limit - costs[key].without(_cut(sites, counts)) for key, limit in limits.items()}
    steps = []  # (site, neurons, gain): the hulls' edges, each site's in the order in which they are taken
    for site in sites:
        corners = [*range(counts[site.name], site.hidden, round_to), site.hidden]
        hull = _lower_hull(np.array(corners), np.minimum.accumulate(loss[site.name])[corners])
        steps += [(site, high - low, loss[site.name][low] - loss[site.name][high]) for low, high in pairwise(hull)]
    if not steps:
        return counts
    room = {key: max(1.0, float(left[key])) for key in limits}
    prices = [[costs[key].neuron[site.name] * neurons / room[key] for site, neurons, _ in steps] for key in limits]
    gains = np.array([gain for _, _, gain in steps])
    programme = scipy.optimize.linprog(
        -gains / max(gains.max(), 1e-300), A_ub=prices, b_ub=np.ones(len(limits)), bounds=(0, 1)
    )
    density = gains / np.sum(prices, axis=0)
    stopped = set()  # sites with an edge that did not fit: what comes behind it cannot be taken
    for place in np.lexsort(
        (-density, -programme.x)
    ):  # whole edges first, then the parts that still fit, the best first
        site, neurons, gain = steps[place]
        if gain <= 0 or site.name in stopped:
            continue
        fits = min(left[key] // costs[key].neuron[site.name] for key in limits)
        more = neurons if fits >= neurons else int(fits) // round_to * round_to
        counts[site.name] += more
        left = {key: amount - more * costs[key].neuron[site.name] for key, amount in left.items()}
        if more < neurons:
            stopped.add(site.name)
    return counts


def check_budget(
    sites: Sequence[Site], budget: Mapping[str, float], costs: Mapping[str, Cost], round_to: int = 1
) -> dict[str, Fraction]:
    """The limits that a budget means, in the costs' units.

    Raises:
        DgmrError: a key is unknown, or :func:`fitted_widths` cannot meet it.
    """
    limits = _limits(budget, costs)
    _refuse_unmet(least(sites, round_to), sites, budget, limits, costs)
    return limits


def least(sites: Sequence[Site], round_to: int = 1) -> dict[str, int]:
    """The fewest neurons that :func:`fitted_widths` leaves each site."""
    return {site.name: _rounded(-(-site.hidden // FLOOR), round_to, site) for site in sites}


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """The ``x`` of the corners of the lower convex hull of points in ascending order (Andrew's monotone chain)."""
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
            hint = "; latency goes with a criterion that looks at images, or with rankings" if key == "latency" else ""
            raise DgmrError(f"unknown budget {key!r}; known here: {', '.join(costs) or 'none'}{hint}")
        if not isfinite(value) or value <= 0:
            raise DgmrError(f"budget {key} = {value}; give a share of the tower up to 1, or a number above 1")
        limits[key] = Fraction(str(value)) * (costs[key].total if value <= 1 else 1)
    return limits


def _cut(sites: Sequence[Site], counts: Mapping[str, int]) -> dict[str, int]:
    return {site.name: site.hidden - counts[site.name] for site in sites}


def _refuse_unmet(
    fewest: Mapping[str, int],
    sites: Sequence[Site],
    budget: Mapping[str, float],
    limits: Mapping[str, Fraction],
    costs: Mapping[str, Cost],
) -> None:
    for key, limit in limits.items():
        least = costs[key].without(_cut(sites, fewest))
        if least > limit:
            raise DgmrError(
                f"budget {key} = {budget[key]} cannot be met: with the fewest neurons the tower still costs {least:,}"
            )


def _rounded(count: int, round_to: int, site: Site) -> int:
    return count if count == site.hidden else min(site.hidden, max(round_to, count // round_to * round_to))


def _floor(ratio: float, of: int) -> int:
    return int(Fraction(str(ratio)) * of)
