"""How many neurons each site keeps: integers that a reader can check, never a float ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from math import isfinite
from typing import cast

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.sites import Site


def keep_counts(
    sites: Sequence[Site],
    *,
    mlp_ratio: float | None = None,
    keep_ratio: float | None = None,
    keep: int | Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The hidden width of each site after pruning, by site name. Give exactly one of the three.

    Args:
        mlp_ratio: hidden width as a multiple of the token width (the papers' prune1 and prune2 are 1 and 2).
        keep_ratio: hidden width as a fraction of what it is now.
        keep: the hidden width itself, for all sites or by pattern (``{"blocks.0.*": 64, "*": 128}``, first match counts;
            a site that no pattern matches keeps all).

    Ratios are taken as the decimals they are written as and rounded down: 0.29 of 100 is 29.

    Raises:
        DgmrError: not exactly one was given, or a site would keep none or more than it has.
    """
    given = {key: value for key, value in (("mlp_ratio", mlp_ratio), ("keep_ratio", keep_ratio), ("keep", keep)) if value is not None}
    if len(given) != 1:
        raise DgmrError(f"give exactly one of mlp_ratio, keep_ratio and keep; given: {', '.join(given) or 'none'}")
    for key, ratio in (("mlp_ratio", mlp_ratio), ("keep_ratio", keep_ratio)):
        if ratio is not None and not isfinite(ratio):
            raise DgmrError(f"{key} = {ratio} is no number")
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
        counts[site.name] = count
    return counts


def _floor(ratio: float, of: int) -> int:
    return int(Fraction(str(ratio)) * of)
