"""Peak learning rate of a training, found by a line search before the first step.

The loss of a recovered student is steep. The first steps of Adam at a usual learning rate move it away from its
teacher, and much of the training then repairs that. The search measures how far a step may go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from dgmr_tp.distillation.data import Sample
from dgmr_tp.utils.distributed import all_reduce_sum, broadcast_from_main

FIRST_STEP_SIZE = 1e-6
"""Step size with which the search starts."""
MIN_STEP_SIZE, MAX_STEP_SIZE = 1e-9, 1e-2
"""Limits of the search."""
RATE_PER_STEP_SIZE = 4
"""Peak learning rate for a best step size of 1. A step of Adam is shorter than its learning rate: if the gradients are
mostly noise, as on single batches near a minimum, its root mean square is ``sqrt((1 − β₁) / (1 + β₁))``, 0.23 of it."""


def find_learning_rate(
    module: nn.Module, batches: Sequence[Sequence[Sample]], loss: Callable[[Sample], Tensor]
) -> float:
    """Return a peak learning rate for Adam. Every process must call it, and all get the same.

    The direction is the sign of the gradient on the first batch, which is the direction of Adam's first step. The best
    step size is the one with the lowest loss on the other batches, within a factor of 2.

    Args:
        module: all its parameters are complete on this device, in float32. They are the same after the search, which
            needs 8 bytes more for each that is trained.
        batches: this process's micro-batches of each global batch.
        loss: runs the module on a micro-batch.
    """
    first, *others = batches
    for sample in first:
        loss(sample).backward()
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    directions = [all_reduce_sum(parameter.grad).sign() for parameter in parameters if parameter.grad is not None]
    module.zero_grad(set_to_none=True)  # before the copy of the parameters, which takes as much memory
    starts = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def move(step_size: float) -> None:
        for parameter, start, direction in zip(parameters, starts, directions, strict=True):
            torch.add(start, direction, alpha=-step_size, out=parameter)

    @cache
    @torch.no_grad()
    def loss_after(step_size: float) -> float:
        move(step_size)
        own_total = torch.stack([loss(sample).double() for batch in others for sample in batch]).sum()
        total = float(all_reduce_sum(own_total))
        return broadcast_from_main(lambda: total)  # processors may differ in the last bit

    best = FIRST_STEP_SIZE
    factor = 2 if loss_after(2 * best) < loss_after(best) else 0.5
    while MIN_STEP_SIZE <= factor * best <= MAX_STEP_SIZE and loss_after(factor * best) < loss_after(best):
        best *= factor
    move(0.0)
    return RATE_PER_STEP_SIZE * best
