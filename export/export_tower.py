"""Description of a tower to export: its module, example inputs, and names. Knows no file format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgmr_tp.pruning.adapter import check_embeddings

TowerFunction = Callable[[Tensor], tuple[Tensor, ...]]
"""An opened file: maps a batch of inputs to its outputs, float32 on the CPU."""


@dataclass(frozen=True)
class ExportTower:
    """A tower as it is deployed, float32 on the CPU, with example inputs for the verification."""

    kind: str
    """``image`` or ``text``."""
    module: nn.Module
    """Maps one input to one tensor, or to a tuple with one tensor per entry of ``output_names``."""
    examples: Tensor
    """Preprocessed images or token ids, ``[n, …]``, n ≥ 2. An exported file accepts any batch of this input shape."""
    input_name: str
    output_names: tuple[str, ...] = ("embedding",)
    normalized: bool = False
    """True if the embeddings have length 1."""
    file_stem: str = "model"
    """File name without suffix, such as ``model`` or ``visual/model``."""

    @torch.no_grad()
    def reference_outputs(self, batch_size: int = 8) -> tuple[Tensor, ...]:
        """Return PyTorch's outputs for all examples.

        Raises:
            DgmrError: an output is not finite.
        """
        batches = [as_tuple(self.module(batch)) for batch in self.examples.split(batch_size)]
        return tuple(check_embeddings(torch.cat(rows), f"the {self.kind} tower") for rows in zip(*batches, strict=True))


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs of a module as a tuple, a single tensor too."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
