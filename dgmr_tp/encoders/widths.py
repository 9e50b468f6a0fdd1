"""Express hidden widths as the ratio in a library's config that the library's arithmetic maps to these widths.

Works on sites and returns constructor arguments. Does not know any library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dgmr_tp.pruning import Site, find_sites


def ratio_for(sites: Sequence[Site], rows: int = 1) -> float | None:
    """Return the ``mlp_ratio`` for which ``int(width · ratio)`` equals ``rows · hidden`` at every site, or None.

    The ratio is the middle of the valid interval, because ``int(88 · (240 / 88))`` is 239.

    Args:
        sites: at least one site.
        rows: rows per neuron that the library counts, 2 for a gate and a value.
    """
    low = max(rows * site.hidden / site.width for site in sites)
    high = min((rows * site.hidden + 1) / site.width for site in sites)
    return (low + high) / 2 if low < high else None


def config_arguments_for(
    sites: Sequence[Site], build: Callable[[dict[str, float]], nn.Module]
) -> dict[str, float] | None:
    """Return the arguments with which ``build`` makes a tower with the hidden widths of ``sites``, or None.

    Each candidate is built on the meta device, because libraries differ in their arithmetic. Some count the rows of a
    gate, some round to 8, and some apply the ratio to a head whose neurons were not pruned.

    Args:
        sites: all sites of the tower, heads included.
        build: builds the tower from constructor arguments.
    """
    widths = [(site.name, site.hidden) for site in sites]
    ratios = [ratio for rows in (1, 2) if (ratio := ratio_for(sites, rows)) is not None]
    for arguments in ({}, *({"mlp_ratio": ratio} for ratio in ratios)):
        try:
            with torch.device("meta"):
                tower = build(arguments)
        except Exception:  # the library rejects this width
            continue
        if [(site.name, site.hidden) for site in find_sites(tower)] == widths:
            return arguments
    return None
