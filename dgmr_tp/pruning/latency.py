"""Widths for a latency budget, from timings of the dense and the pruned tower in the same run on this machine.

Works on a vision tower with weights. The caller fits widths to a cost, and this module finds the cost that meets the
budget.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.allocation import minimum_widths
from dgmr_tp.pruning.cost import Cost, ImageSize, flop_cost, image_shape
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.pruning.sites import Site
from dgmr_tp.utils.modules import evaluating, meta_copy

BATCH_SIZE = 8
"""Number of images in one timed step."""
NUM_TIMED_STEPS = 25
"""Number of timed steps. Their median is the result."""
NUM_WARMUP_STEPS = 2
"""Number of steps before the timed ones."""
MAX_FITS = 6
"""Maximum number of widths that are fitted and timed."""
BUDGET_TOLERANCE = 0.02
"""Relative distance below the budget at which the search ends."""


def widths_for_latency(
    share: float,
    fit: Callable[[Cost], dict[str, int]],
    model: nn.Module,
    sites: Sequence[Site],
    image_size: ImageSize,
    round_to: int = 1,
    time_of: Callable[[Mapping[str, int]], float] | None = None,
) -> dict[str, int]:
    """Return widths, by site name, whose measured time is at most ``share`` of the dense tower's.

    Time is modeled as a constant plus a term proportional to each neuron's FLOPs. Widths are fitted to this model,
    built and timed. The target of the next fit is corrected by the measured deviation, because kernels are faster at
    some widths.

    Args:
        share: fraction of the dense tower's time for a batch of :data:`BATCH_SIZE`, above 0 and below 1.
        fit: returns widths for a cost whose total is the dense tower's, under a budget of ``share``.
        model: the dense tower, on the device and in the dtype in which it will be served. It is unchanged.
        sites: its MLPs.
        image_size: height and width of the images in pixels.
        round_to: as for :func:`~dgmr_tp.pruning.allocation.keep_counts`.
        time_of: maps widths to the time relative to the dense tower's. Default: :func:`relative_time`.

    Raises:
        DgmrError: ``share`` is out of range, the tower has no weights, or the narrowest tower is too slow.
    """
    if not 0 < share < 1:
        raise DgmrError(
            f"budget latency = {share} is out of range. Give a share of the dense tower's time, above 0 and below 1."
        )
    if next(model.parameters()).is_meta:
        raise DgmrError(
            "a latency budget needs a timing of the tower, which was opened without weights. Open it with weights."
        )
    time_of = time_of or (lambda counts: relative_time(model, counts, image_size))
    minimum, flops = minimum_widths(sites, round_to), flop_cost(model, sites, image_size)
    constant = time_of(minimum)
    if constant > share:
        raise DgmrError(
            f"budget latency = {share} cannot be met: with the fewest neurons the tower still takes {constant:.2f} of "
            "its time. Give a larger budget."
        )
    total = 10**12  # large, because costs are integers
    removable = sum(flops.neuron[site.name] * (site.hidden - minimum[site.name]) for site in sites)
    best: dict[str, int] | None = None
    best_time, target = constant, share
    for _ in range(MAX_FITS):
        target = max(target, constant + 1e-6)
        # A cost for which a budget of ``share`` is met where the time model predicts ``target``.
        removable_cost = total * (1 - share) * (1 - constant) / (1 - target)
        neuron = {site.name: int(removable_cost * flops.neuron[site.name] / removable) for site in sites}
        counts = fit(Cost(total, neuron))
        measured = time_of(counts)
        if best_time <= measured <= share:
            best, best_time = counts, measured
        if share * (1 - BUDGET_TOLERANCE) <= measured <= share:
            break
        target = min(target * share / measured, 1 - 1e-6)
    if best is None:
        raise DgmrError(
            f"no widths have a measured time within latency = {share}. Repeat it on a machine without other work."
        )
    return best


def relative_time(model: nn.Module, counts: Mapping[str, int], image_size: ImageSize) -> float:
    """Return the time of a tower of widths ``counts``, relative to the dense tower ``model``.

    Both are timed in turn, and the median of the ratios is returned, so that other work on the machine affects both.
    The pruned tower has random weights.

    Args:
        model: the dense tower. It is unchanged.
        counts: hidden widths by site name.
        image_size: height and width of the images in pixels.
    """
    narrow = meta_copy(model, buffers=False).requires_grad_(False)
    resize(narrow, counts)
    _fill_randomly(narrow, model)
    weight = next(model.parameters())
    images = torch.randn(BATCH_SIZE, *image_shape(model, image_size), device=weight.device, dtype=weight.dtype)
    ratios = []
    with torch.no_grad(), evaluating(model, narrow):
        for step in range(NUM_WARMUP_STEPS + NUM_TIMED_STEPS):
            seconds = {}
            for tower in (model, narrow):
                _synchronize(images)
                started = time.perf_counter()
                tower(images)
                _synchronize(images)
                seconds[tower] = time.perf_counter() - started
            if step >= NUM_WARMUP_STEPS:
                ratios.append(seconds[narrow] / seconds[model])
    return statistics.median(ratios)


def _synchronize(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _fill_randomly(narrow: nn.Module, model: nn.Module) -> None:
    """Replace the meta parameters of ``narrow`` by random ones on the device of ``model``."""
    device = next(model.parameters()).device
    for module in narrow.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(std=0.02)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
