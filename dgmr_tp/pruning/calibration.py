"""Record MLP inputs and outputs on calibration images, and weight the tokens.

Works on modules and on the states of a :class:`TowerAdapter`. Returns tensors and their moments. This is the only
module of ``pruning/`` with forward hooks. A block maps a state to a state, and a hook reads what a Linear inside it
receives without a copy of the block's forward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import TowerAdapter, used_tokens

ROUNDING_TOLERANCE = 1e-10
"""Variance, relative to the mean square, below which a target is constant. float32 rounds to about 1e-14."""

GRAM_BLOCK = 512
"""Number of rows of a Gram matrix that are computed at a time."""


def token_weights(adapter: TowerAdapter, state: Tensor, *, last: bool) -> Tensor:
    """Return the weight of each token of ``state`` ``[batch, tokens, width]``, float64 ``[tokens]``, with sum 1.

    The class token has half of the weight, and all other tokens together have the other half. After the last block,
    only the tokens that the head reads have a weight, unless callers use all tokens
    (:attr:`TowerAdapter.gives_tokens`).

    Args:
        adapter: the tower that ``state`` belongs to.
        state: the state after a block.
        last: True if it is the last block.

    Raises:
        DgmrError: ``last``, and the embedding does not depend on ``state``.
    """
    tokens = state.shape[1]
    weight = torch.full((tokens,), 1 / tokens, dtype=torch.float64, device=state.device)
    class_token, _ = adapter.features(state)
    if class_token is not None:
        is_class = used_tokens(lambda s: cast(Tensor, adapter.features(s)[0]), state)
        weight = torch.where(is_class, 0.5 / is_class.sum(), 0.5 / (~is_class).sum().clamp(min=1))
    if last and not adapter.gives_tokens:
        weight = weight * used_tokens(adapter.embed, state)
        if not weight.any():
            raise DgmrError(
                f"the embedding of {adapter.name} does not depend on the last block's tokens. Pass the vision tower "
                "itself."
            )
    return weight.double() / weight.sum()


def sample_tokens(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``weight`` ``[tokens]`` with 0 at all but ``count`` randomly chosen tokens, and the same sum.

    Tokens with more than twice an equal share, such as the class token, are always chosen, and at least one other. The
    weights of the others are scaled, so that every moment keeps its expectation. All tokens stay if there are no more
    than ``count``.
    """
    tokens = torch.nonzero(weight).flatten()
    if len(tokens) <= count:
        return weight
    is_heavy = weight[tokens] > 2 * weight[tokens].mean()
    heavy, light = tokens[is_heavy], tokens[~is_heavy]
    order = torch.randperm(len(light), generator=generator).to(weight.device)
    chosen = light[order[: max(1, count - len(heavy))]]
    sampled = torch.zeros_like(weight)
    sampled[heavy] = weight[heavy]
    sampled[chosen] = weight[chosen] * (weight[light].sum() / weight[chosen].sum())
    return sampled


def has_fewer_tokens(weight: Tensor, images: int, minimum: int) -> bool:
    """Return whether ``images`` have fewer tokens with a weight than ``minimum``.

    In the last block of a large tower the head may read one token per image, which does not determine a fit.
    """
    return int((weight > 0).sum()) * images < minimum


@contextmanager
def record_inputs(*modules: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Record the first input of each module's most recent call, by module, inside the context."""
    inputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0]

    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gate_inputs(*modules: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Multiply the modules' inputs by gates of ones ``[batch, 1, …, channels]`` inside the context.

    Yields the gates by module. The gradient at a gate is the sum over the tokens of ``input · gradient at the input``.
    """
    gates: dict[nn.Module, Tensor] = {}

    def gate(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = arguments[0]
        shape = (len(values), *(1 for _ in values.shape[1:-1]), values.shape[-1])
        gates[module] = values.new_ones(shape).requires_grad_(True)
        return (values * gates[module], *arguments[1:])

    handles = [module.register_forward_pre_hook(gate) for module in modules]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def detach_output(module: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Detach the module's output inside the context and make it a leaf with ``requires_grad``. Yields it by module."""
    outputs: dict[nn.Module, Tensor] = {}

    def detach(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs[module] = output.detach().requires_grad_(True)
        return outputs[module]

    handle = module.register_forward_hook(detach)
    try:
        yield outputs
    finally:
        handle.remove()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 if its precision is lower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Moments:
    """Weighted first and second moments of pairs ``(h, y)``, without storing the pairs.

    The products of a batch are computed in the batch's dtype and summed in float64. They are taken about the means of
    the first batch. A channel whose mean is large compared with its deviation therefore keeps its variance.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.rounding = 0.0
        """Relative rounding error of the products."""
        zero = torch.zeros((), dtype=torch.float64)
        self.origin_h, self.origin_y = zero, zero
        self.h, self.y, self.hh, self.yh, self.yy = zero, zero, zero, zero, zero

    def add(self, h: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows ``h`` ``[n, k]`` and ``y`` ``[n, d]`` of one dtype, float32 or float64, with weights ``[n]``."""
        if not self.weight:
            self.origin_h, self.origin_y = h.mean(0), y.mean(0)
            self.rounding = torch.finfo(h.dtype).eps
        root = weight.to(h).sqrt()
        h, y = (h - self.origin_h) * root[:, None], (y - self.origin_y) * root[:, None]
        self.weight += float(weight.double().sum())
        self.h = (root @ h).double() + self.h
        self.y = (root @ y).double() + self.y
        self.hh = _gram(h).double() + self.hh
        self.yh = (y.T @ h).double() + self.yh
        self.yy = y.square().sum(0).double() + self.yy

    def last_channels(self, count: int) -> Moments:
        """Return the moments of ``h`` and the last ``count`` channels of ``y``."""
        part = copy.copy(self)
        part.y, part.yh, part.yy = self.y[-count:], self.yh[-count:], self.yy[-count:]
        part.origin_y = self.origin_y[-count:]
        return part

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of ``h`` ``[k]`` and ``y`` ``[d]``, float64."""
        return self.origin_h + self.h / self.weight, self.origin_y + self.y / self.weight

    def second_moments(self, h0: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return ``Σ_hh`` ``[k, k]``, ``Σ_yh`` ``[d, k]`` and ``tr Σ_yy`` about the points ``h0`` and ``y0``, float64.

        All are per unit of weight. About the means they are covariances.
        """
        mean_h, mean_y = self.h / self.weight, self.y / self.weight  # relative to the origins
        dh, dy = self.origin_h + mean_h - h0, self.origin_y + mean_y - y0
        hh = self.hh / self.weight - torch.outer(mean_h, mean_h) + torch.outer(dh, dh)
        yh = self.yh / self.weight - torch.outer(mean_y, mean_h) + torch.outer(dy, dh)
        return hh, yh, max(0.0, float(self.yy.sum()) / self.weight - float(mean_y @ mean_y) + float(dy @ dy))

    def relative_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the mean squared error of ``y ≈ weight h + bias`` over the variance of ``y``.

        0 is a perfect fit and 1 is as good as the mean of ``y``. Infinity means that the weights are not finite, or
        that ``y`` is constant and the fit misses it.
        """
        mean_h, mean_y = self.means()
        hh, yh, yy = self.second_moments(mean_h, mean_y)
        offset = mean_y - weight @ mean_h - (0 if bias is None else bias)
        error = yy - 2 * float((weight * yh).sum()) + float(((weight @ hh) * weight).sum()) + float(offset @ offset)
        if not math.isfinite(error):
            return math.inf
        negligible = ROUNDING_TOLERANCE * (yy + float(mean_y @ mean_y))
        if yy <= negligible:
            return 0.0 if error <= negligible else math.inf
        return max(0.0, error) / yy


def _gram(rows: Tensor) -> Tensor:
    """Return ``rowsᵀ rows`` of ``[n, k]``. Only the blocks on and above the diagonal are multiplied."""
    width = rows.shape[1]
    gram = rows.new_empty(width, width)
    for start in range(0, width, GRAM_BLOCK):
        end = min(start + GRAM_BLOCK, width)
        gram[start:end, start:] = rows[:, start:end].T @ rows[:, start:]
        gram[end:, start:end] = gram[start:end, end:].T
    return gram
