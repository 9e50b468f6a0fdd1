"""Widths for a budget of measured time: what this machine takes, beside the dense tower, in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.allocation import least
from dgmr_tp.pruning.cost import Cost, flop_cost
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.pruning.sites import Site
from dgmr_tp.utils.modules import evaluating, meta_copy

BATCH = 8
"""Images of one timed step."""
TURNS = 25
"""Steps of which the median counts."""
ROUNDS = 6
CLOSE = 0.02
"""Widths that use the budget up to this part of it are good enough."""


def widths_within(
    share: float,
    fit: Callable[[Cost], dict[str, int]],
    model: nn.Module,
    sites: Sequence[Site],
    image_size: int,
    round_to: int = 1,
    time_of: Callable[[Mapping[str, int]], float] | None = None,
) -> dict[str, int]:
    """Widths whose measured time is at most ``share`` of the dense tower's.

    Time is taken to be a fixed part and a part in proportion to each neuron's FLOPs. Widths are fitted under that,
    built and timed, and the aim is moved by what was missed, because kernels like some widths more than others.

    Args:
        share: of the dense tower's time for a batch of :data:`BATCH`, above 0 and below 1.
        fit: widths for a cost whose total is the dense tower's, under a budget that it knows to be ``share`` of it.
        model: on the device and in the type that it will be served on; unchanged.
        time_of: by widths, the time relative to the dense tower's. Default: measured here.

    Raises:
        DgmrError: the share is out of range, the tower has no weights, or not even the narrowest tower is fast enough.
    """
    if not 0 < share < 1:
        raise DgmrError(f"budget latency = {share}; give a share of the dense tower's time, above 0 and below 1")
    if next(model.parameters()).is_meta:
        raise DgmrError("a budget of latency is measured with the tower itself, which was opened without weights")
    time_of = time_of or (lambda counts: relative_time(model, counts, image_size))
    fewest, work = least(sites, round_to), flop_cost(model, sites, image_size)
    fixed = time_of(fewest)
    if fixed > share:
        raise DgmrError(
            f"budget latency = {share} cannot be met: with the fewest neurons the tower still takes {fixed:.2f} of "
            "its time"
        )
    whole = 10**12
    cut = sum(work.neuron[site.name] * (site.hidden - fewest[site.name]) for site in sites)
    best: dict[str, int] | None = None
    closest, aim = fixed, share
    for _ in range(ROUNDS):
        aim = max(aim, fixed + 1e-6)
        # A cost whose budget ``share`` is met where the model of time says ``aim``.
        spare = whole * (1 - share) * (1 - fixed) / (1 - aim)
        counts = fit(Cost(whole, {site.name: int(spare * work.neuron[site.name] / cut) for site in sites}))
        taken = time_of(counts)
        if closest <= taken <= share:
            best, closest = counts, taken
        if share * (1 - CLOSE) <= taken <= share:
            break
        aim = min(aim * share / taken, 1 - 1e-6)
    if best is None:
        raise DgmrError(
            f"no widths were found whose measured time stays within latency = {share}; is the machine busy with other "
            "work?"
        )
    return best


def relative_time(model: nn.Module, counts: Mapping[str, int], image_size: int) -> float:
    """Time of a tower of these widths over that of the dense one: the median over turns, so that a busy machine slows
    both alike.
    """
    narrow = meta_copy(model, buffers=False).requires_grad_(False)
    resize(narrow, counts)
    _fill(narrow, model)
    weight = next(model.parameters())
    images = torch.randn(BATCH, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    ratios = []
    with torch.no_grad(), evaluating(model, narrow):
        for turn in range(TURNS + 2):
            taken = {}
            for tower in (model, narrow):
                _settle(images)
                started = time.perf_counter()
                tower(images)
                _settle(images)
                taken[tower] = time.perf_counter() - started
            if turn > 1:  # the first two warm up
                ratios.append(taken[narrow] / taken[model])
    return statistics.median(ratios)


def _settle(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _fill(narrow: nn.Module, model: nn.Module) -> None:
    device = next(model.parameters()).device
    for module in narrow.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(std=0.02)
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
