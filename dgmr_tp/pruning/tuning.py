"""Block tuning: train a pruned block towards the output of the dense block, without labels.

The closed-form recovery refits one Linear of a block. Tuning then trains all parameters of the block with Adam, so that
attention and norms adapt as well. Its inputs are the states that the recovered blocks before it produce, and its target
is the dense tower's state after the block. Gradients of one block at a time are in memory. Block-wise reconstruction is
known from quantization (BRECQ, arXiv 2102.05426).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgmr_tp.pruning.adapter import Block
from dgmr_tp.pruning.calibration import Moments

BATCH_SIZE = 32
"""Number of images in a step."""
LEARNING_RATE = 0.03
"""Peak learning rate of a parameter tensor, relative to the root mean square of its values."""
MIN_SCALE = 1e-3
"""Minimum root mean square that is assumed for a tensor. It lets zero biases move."""
BETAS = (0.9, 0.99)
WARMUP_STEPS = 20
NUM_EVALUATIONS = 10
"""Number of times that the held-out images judge the block during a training."""
NEGLIGIBLE_ERROR = 1e-8
"""Relative error below which a block is not tuned. Rounding in float32 is below it."""


@dataclass(frozen=True)
class Tuning:
    """Held-out error of a block's output, relative to the variance of the dense block's output.

    After the last block, both outputs pass through the tower's final norm first.
    """

    before: float
    """Error before tuning."""
    after: float
    """Error of the parameters that were kept. It is at most ``before``."""


def tune_block(
    block: Block,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    weight: Tensor,
    is_held_out: Tensor,
    *,
    steps: int,
    norm: Callable[[Tensor], Tensor],
    report_step: Callable[[int], None],
) -> Tuning:
    """Train all parameters of a block in place, and keep those with the smallest error on the held-out images.

    The loss is the squared error, weighted by token. The learning rate warms up for 20 steps and then follows a cosine
    to 0. A block in half precision is trained in float32 and rounded at the end.

    Args:
        block: the pruned tower's block.
        states: its inputs, in batches ``[batch, tokens, width]``.
        targets: the dense tower's states after the block, in the same batches.
        weight: weights of the tokens after the block, ``[tokens]``, with sum 1.
        is_held_out: bool ``[images]``. These images judge, and the others train.
        steps: number of steps of 32 images.
        norm: applied to output and target before they are compared, such as the final norm after the last block.
        report_step: receives the number of each finished step.
    """
    inputs, outputs = ([image for batch in batches for image in batch] for batches in (states, targets))
    fitted, held_out = torch.nonzero(~is_held_out).flatten(), torch.nonzero(is_held_out).flatten()

    def errors(images: Tensor) -> Tensor:
        """Return the weighted squared error of each image."""
        x, y = (torch.stack([rows[i] for i in images.tolist()]).float() for rows in (inputs, outputs))
        return (norm(block(x)) - norm(y)).square().sum(-1) @ weight.to(x)

    def held_out_error() -> float:
        return float(torch.cat([errors(images) for images in held_out.split(BATCH_SIZE)]).double().mean())

    with _in_float32(block.module):
        variance = _variance((norm(outputs[i][None].float())[0] for i in held_out.tolist()), weight)
        parameters = list(block.module.parameters())
        start = best = held_out_error()
        if start <= NEGLIGIBLE_ERROR * variance:
            return Tuning(0.0, 0.0)
        best_values = copy.deepcopy([parameter.data for parameter in parameters])
        optimizer = torch.optim.Adam([{"params": [p], "lr": _learning_rate(p)} for p in parameters], betas=BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
        generator = torch.Generator().manual_seed(0)
        with _trainable(parameters):
            for step in range(1, steps + 1):
                batch = fitted[torch.randint(len(fitted), (min(BATCH_SIZE, len(fitted)),), generator=generator)]
                with torch.enable_grad():
                    gradients = torch.autograd.grad(errors(batch).mean(), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                report_step(step)
                if step % math.ceil(steps / NUM_EVALUATIONS) == 0 or step == steps:
                    error = held_out_error()
                    if error < best:
                        best, best_values = error, copy.deepcopy([parameter.data for parameter in parameters])
        for parameter, values in zip(parameters, best_values, strict=True):
            parameter.data, parameter.grad = values, None
    return Tuning(start / variance, best / variance)


def _learning_rate(parameter: Tensor) -> float:
    return LEARNING_RATE * max(float(parameter.square().mean().sqrt()), MIN_SCALE)


def _rate_factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _variance(outputs: Iterable[Tensor], weight: Tensor) -> float:
    """Return the weighted variance of states ``[tokens, width]`` about their mean over images and tokens."""
    moments = Moments()
    for output in outputs:
        moments.add(output[:, :0], output, weight)
    mean = moments.means()
    return moments.second_moments(*mean)[2]


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Give a module's parameters and buffers float32 values inside the context."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters require gradients inside the context."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
