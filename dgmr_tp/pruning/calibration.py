"""What the MLPs of an encoder see on calibration images: recorded inputs, and how much each token counts.

The one place with forward hooks in this package: a block takes a state to a state, and only a hook tells what a Linear
inside it sees without a copy of every family's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from dgmr_tp.pruning.encoder import Encoder, tokens_read


def token_weights(encoder: Encoder, state: Tensor, *, last: bool) -> Tensor:
    """How much each token of ``state`` ``[batch, tokens, width]`` counts, ``[tokens]``, in sum 1.

    The class token and all other tokens together weigh the same; after the last block only the tokens count that the head
    reads.
    """
    tokens = state.shape[1]
    weight = torch.full((tokens,), 1 / tokens, dtype=torch.float64, device=state.device)
    class_token, _ = encoder.features(state)
    if class_token is not None:
        is_class = tokens_read(lambda s: cast(Tensor, encoder.features(s)[0]), state)
        weight = torch.where(is_class, 0.5 / is_class.sum(), 0.5 / (~is_class).sum().clamp(min=1))
    if last:
        weight = weight * tokens_read(encoder.embed, state)
    return weight.double() / weight.sum()


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
def evaluating(*encoders: Encoder) -> Iterator[None]:
    """Eval mode while the context lasts; every module's own mode comes back."""
    before = [(module, module.training) for encoder in encoders for module in encoder.module.modules()]
    try:
        for encoder in encoders:
            encoder.module.eval()
        yield
    finally:
        for module, mode in before:
            module.training = mode
