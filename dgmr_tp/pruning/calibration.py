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


class Moments:
    """Weighted first and second moments of pairs ``(h, y)``, in float64. The pairs are not stored."""

    def __init__(self) -> None:
        self.weight = 0.0
        zero = torch.zeros((), dtype=torch.float64)
        self.h, self.y, self.hh, self.yh, self.yy = zero, zero, zero, zero, zero

    def add(self, h: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows ``h`` ``[n, k]`` and ``y`` ``[n, d]`` with weights ``[n]``."""
        h, y, weight = h.double(), y.double(), weight.double()
        weighted = h * weight[:, None]
        self.weight += float(weight.sum())
        self.h = weighted.sum(0) + self.h
        self.y = weight @ y + self.y
        self.hh = h.T @ weighted + self.hh
        self.yh = y.T @ weighted + self.yh
        self.yy = weight @ y.square() + self.yy

    def last_channels(self, count: int) -> Moments:
        """Return the moments of ``h`` and the last ``count`` channels of ``y``."""
        part = copy.copy(self)
        part.y, part.yh, part.yy = self.y[-count:], self.yh[-count:], self.yy[-count:]
        return part

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of ``h`` ``[k]`` and ``y`` ``[d]``."""
        return self.h / self.weight, self.y / self.weight

    def second_moments(self, h0: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return ``Σ_hh`` ``[k, k]``, ``Σ_yh`` ``[d, k]`` and ``tr Σ_yy`` about the points ``h0`` and ``y0``.

        All are per unit of weight. About the means they are covariances.
        """
        mean_h, mean_y = self.means()
        dh, dy = mean_h - h0, mean_y - y0
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
        negligible = ROUNDING_TOLERANCE * float(self.yy.sum()) / self.weight
        if yy <= negligible:
            return 0.0 if error <= negligible else math.inf
        return max(0.0, error) / yy
