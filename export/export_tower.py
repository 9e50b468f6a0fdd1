"""What a file computes: one tower, from its input to the outputs that are served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], tuple[Tensor, ...]]
"""An exported file as a function: a batch of inputs to its outputs, float32 on the CPU."""


@dataclass(frozen=True)
class Part:
    """A tower as it will be served, float32 on the CPU, and real inputs to prove its files with."""

    tower: str
    """``image`` or ``text``."""
    module: nn.Module
    """One input to one tensor, or to a tuple of as many as ``outputs``."""
    examples: Tensor
    """At least two inputs, ``[n, …]``: preprocessed images, or tokens. A file's inputs have their shape but for the batch."""
    input: str
    outputs: tuple[str, ...] = ("embedding",)
    normalised: bool = False
    """Whether its embeddings have length 1."""
    file: str = "model"
    """The files' name without ending, such as ``model`` or ``visual/model``."""

    @torch.no_grad()
    def expected(self, batch: int = 8) -> tuple[Tensor, ...]:
        """PyTorch's outputs for all examples."""
        found = [as_tuple(self.module(chunk)) for chunk in self.examples.split(batch)]
        return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
