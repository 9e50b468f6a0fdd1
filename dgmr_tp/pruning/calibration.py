"""What the MLPs of an encoder see and answer on calibration images, and how much each token counts.

The one place with forward hooks in this package: a block takes a state to a state, and only a hook tells what a Linear
inside it sees without a copy of every family's forward.
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
from dgmr_tp.pruning.adapter import TowerAdapter, tokens_read


def token_weights(adapter: TowerAdapter, state: Tensor, *, last: bool) -> Tensor:
    """How much each token of ``state`` ``[batch, tokens, width]`` counts, ``[tokens]``, in sum 1.

    The class token and all other tokens together weigh the same; after the last block only the tokens count that the head
    reads, unless callers take all of them (:attr:`TowerAdapter.gives_tokens`).
    """
    tokens = state.shape[1]
    weight = torch.full((tokens,), 1 / tokens, dtype=torch.float64, device=state.device)
    class_token, _ = adapter.features(state)
    if class_token is not None:
        is_class = tokens_read(lambda s: cast(Tensor, adapter.features(s)[0]), state)
        weight = torch.where(is_class, 0.5 / is_class.sum(), 0.5 / (~is_class).sum().clamp(min=1))
    if last and not adapter.gives_tokens:
        weight = weight * tokens_read(adapter.embed, state)
        if not weight.any():
            raise DgmrError("the embedding does not depend on the last block's tokens; is this the tower itself?")
    return weight.double() / weight.sum()


def too_few(weight: Tensor, images: int, neurons: int) -> bool:
    """Whether the tokens that count are fewer than an MLP's neurons, and so tell nothing of them: in the last block of a large tower the
    head may read one token of an image."""
    return int((weight > 0).sum()) * images < neurons


@contextmanager
def recorded_inputs(*modules: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """What the modules were last called with, while the context lasts."""
    seen: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[module] = arguments[0]

    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gated_inputs(*modules: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """While the context lasts, what the modules are called with is multiplied by gates of ones ``[batch, 1, …, channels]``.

    The gates come back by module; the gradient at a gate is the sum over the tokens of ``input · gradient at the input``.
    """
    gates: dict[nn.Module, Tensor] = {}

    def gate(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen = arguments[0]
        gates[module] = seen.new_ones(len(seen), *(1 for _ in seen.shape[1:-1]), seen.shape[-1]).requires_grad_(True)
        return (seen * gates[module], *arguments[1:])

    handles = [module.register_forward_pre_hook(gate) for module in modules]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def answers_as_leaf(module: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """While the context lasts, the module's answer is cut from what computed it and can be differentiated by; it comes back by module."""
    answers: dict[nn.Module, Tensor] = {}

    def cut(module: nn.Module, arguments: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        answers[module] = answer.detach().requires_grad_(True)
        return answers[module]

    handle = module.register_forward_hook(cut)
    try:
        yield answers
    finally:
        handle.remove()


class Moments:
    """Weighted first and second moments of pairs ``(h, y)``, in float64; the pairs themselves are never kept."""

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

    def last(self, count: int) -> Moments:
        """The same with the last ``count`` channels of ``y`` alone."""
        part = copy.copy(self)
        part.y, part.yh, part.yy = self.y[-count:], self.yh[-count:], self.yy[-count:]
        return part

    def about(self, h0: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, float]:
        """``Σ_hh``, ``Σ_yh`` and ``tr Σ_yy`` per unit of weight, about the points ``h0`` and ``y0``."""
        mean_h, mean_y = self.mean()
        dh, dy = mean_h - h0, mean_y - y0
        hh = self.hh / self.weight - torch.outer(mean_h, mean_h) + torch.outer(dh, dh)
        yh = self.yh / self.weight - torch.outer(mean_y, mean_h) + torch.outer(dy, dh)
        return hh, yh, max(0.0, float(self.yy.sum()) / self.weight - float(mean_y @ mean_y) + float(dy @ dy))

    def mean(self) -> tuple[Tensor, Tensor]:
        return self.h / self.weight, self.y / self.weight

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean squared error of ``y ≈ weight h + bias`` over the variance of ``y``: 0 is perfect, 1 as good as the mean."""
        mean_h, mean_y = self.mean()
        hh, yh, yy = self.about(mean_h, mean_y)
        offset = mean_y - weight @ mean_h - (0 if bias is None else bias)
        error = yy - 2 * float((weight * yh).sum()) + float(((weight @ hh) * weight).sum()) + float(offset @ offset)
        if not math.isfinite(error):  # weights that their type cannot hold
            return math.inf
        return max(0.0, error) / yy if yy > 0 else 0.0
