"""How many neurons each site keeps: integers that a reader can check, never a float ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from math import isfinite
from typing import TypedDict, cast

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.cost import Cost
from dgmr_tp.pruning.sites import Site


class Amount(TypedDict, total=False):
    """How many neurons stay, in one of four ways, and to what multiple that is rounded; see :func:`keep_counts`."""

    mlp_ratio: float | None
    keep_ratio: float | None
    keep: int | Mapping[str, int] | None
    budget: Mapping[str, float] | None
    round_to: int


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
        keep: the hidden width itself, for all sites or by pattern (``{"blocks.0.*": 64, "*": 128}``, first match counts;
            a site that no pattern matches keeps all).
        budget: what the whole tower may cost, ``{"params": 0.5}``, ``{"flops": 0.4}`` or both: up to 1 a share of what it costs
            now, above 1 a number. Every site keeps the same share of its neurons, the largest one that fits.
        round_to: keep counts are multiples of this: the largest not above the count, but not zero; a site that keeps all, or
            has fewer, stays as it is. For ``keep`` only a check, since those counts are the user's.
        costs: what ``params`` and ``flops`` mean, for ``budget``.

    Ratios are taken as the decimals they are written as and rounded down: 0.29 of 100 is 29.

    Raises:
        DgmrError: not exactly one was given, a site would keep none or more than it has, or the budget cannot be met.
    """
    ways = {"mlp_ratio": mlp_ratio, "keep_ratio": keep_ratio, "keep": keep, "budget": budget}
    given = {key: value for key, value in ways.items() if value is not None}
    if len(given) != 1:
        raise DgmrError(f"give exactly one of {', '.join(ways)}; given: {', '.join(given) or 'none'}")
    if round_to < 1:
        raise DgmrError(f"round_to = {round_to}; it must be 1 or more")
    for key, ratio in (("mlp_ratio", mlp_ratio), ("keep_ratio", keep_ratio)):
        if ratio is not None and not isfinite(ratio):
            raise DgmrError(f"{key} = {ratio} is no number")
    if budget is not None:
        return _within(budget, sites, round_to, costs or {})
    counts = {}
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
            [(key, value)] = given.items()
            raise DgmrError(f"{key} = {value} keeps {count} neurons of site {site.name}, which has {site.hidden}; keep 1 to {site.hidden}")
        counts[site.name] = _rounded(count, round_to, site)
        if keep is not None and counts[site.name] != count:
            raise DgmrError(f"keep = {count} for site {site.name} is no multiple of round_to = {round_to}")
    return counts


def _within(budget: Mapping[str, float], sites: Sequence[Site], round_to: int, costs: Mapping[str, Cost]) -> dict[str, int]:
    limits = {}
    for key, value in budget.items():
        if key not in costs:
            raise DgmrError(f"unknown budget {key!r}; known here: {', '.join(costs) or 'none'}")
        if not isfinite(value) or value <= 0:
            raise DgmrError(f"budget {key} = {value}; give a share of the tower up to 1, or a number above 1")
        limits[key] = Fraction(str(value)) * (costs[key].total if value <= 1 else 1)
    widest = max(site.hidden for site in sites)

    def share(step: int) -> dict[str, int]:
        return {site.name: _rounded(max(1, site.hidden * step // widest), round_to, site) for site in sites}

    def cost(key: str, counts: Mapping[str, int]) -> int:
        return costs[key].without({site.name: site.hidden - counts[site.name] for site in sites})

    def fits(step: int) -> bool:
        return all(cost(key, share(step)) <= limit for key, limit in limits.items())

    if not fits(0):
        key = next(key for key, limit in limits.items() if cost(key, share(0)) > limit)
        raise DgmrError(
            f"budget {key} = {budget[key]} cannot be met: with the fewest neurons the tower still costs {cost(key, share(0)):,}"
        )
    low, high = 0, widest  # fits(low); the largest step that fits is found by halving
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return share(low)


def _rounded(count: int, round_to: int, site: Site) -> int:
    return count if count == site.hidden else min(site.hidden, max(round_to, count // round_to * round_to))


def _floor(ratio: float, of: int) -> int:
    return int(Fraction(str(ratio)) * of)
