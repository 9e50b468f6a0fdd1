"""Hidden widths as a library's configuration says them: a ratio that its own arithmetic turns back into the width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dgmr_tp.pruning import Site, find_sites


def ratio_for(sites: Sequence[Site], rows: int = 1) -> float | None:
    """The ``mlp_ratio`` from which ``int(width · ratio)`` gives ``rows · hidden`` at every site, or None.

    The middle of what is allowed: ``240 / 88`` itself comes back as 239.
    """
    low = max(rows * site.hidden / site.width for site in sites)
    high = min((rows * site.hidden + 1) / site.width for site in sites)
    return (low + high) / 2 if low < high else None


def said(tower: nn.Module, build: Callable[[dict[str, float]], nn.Module]) -> dict[str, float] | None:
    """The arguments with which ``build`` gives a tower of the same hidden widths, or None if there are none.

    Tried on the meta device, because libraries differ in their arithmetic: some count a gate's rows, some round to 8, and
    some give the same ratio to a head that kept its neurons.
    """
    sites = find_sites(tower)
    ratios = [ratio for rows in (1, 2) if (ratio := ratio_for(sites, rows)) is not None]
    for arguments in ({}, *({"mlp_ratio": ratio} for ratio in ratios)):
        try:
            with torch.device("meta"):
                built = build(arguments)
        except Exception:  # a width that the library refuses
            continue
        if [(site.name, site.hidden) for site in find_sites(built)] == [(site.name, site.hidden) for site in sites]:
            return arguments
    return None
