"""What a file computes: one tower, from its input to the outputs that are served."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Encoder
from dgmr_tp.pruning.encoder import last_state

Run = Callable[[Tensor], tuple[Tensor, ...]]
"""An exported file as a function: a batch of inputs to its outputs, float32 on the CPU."""
OUTPUTS = ("embedding", "patches")
TEXTS = ("a cat", "a photo of two people on a beach at night", "the small print of an old newspaper, out of focus")
"""What a text tower's files are proved with."""


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


def parts_of(
    model: OpenedModel, images: Tensor, *, outputs: Sequence[str] = ("embedding",), normalised: bool = False, text: bool = False
) -> list[Part]:
    """The vision tower and, if asked for, the text tower of a model; see :func:`vision_part`.

    Raises:
        DgmrError: an unknown output; or the model has no text tower.
    """
    parts = [vision_part(model.encoder, images, outputs=outputs, normalised=normalised)]
    if text:
        if model.tokenizer is None or not hasattr(model.module, "encode_text"):
            raise DgmrError(f"{model.name} has no text tower to export; it takes a CLIP of open_clip's")
        parts.append(text_part(model.module, model.tokenizer(list(TEXTS)), normalised=normalised))
    return parts


def vision_part(encoder: Encoder, images: Tensor, *, outputs: Sequence[str] = ("embedding",), normalised: bool = False) -> Part:
    """A vision tower: images ``[batch, 3, size, size]`` to ``embedding`` ``[batch, width]`` and ``patches`` ``[batch, patches, width]``.

    Args:
        encoder: the tower's walk; it is copied.
        images: preprocessed, ``[n, 3, size, size]``, n ≥ 2.
        outputs: which of the two; patch tokens are those behind the final norm.
        normalised: the embedding's length is made 1 inside the file.

    Raises:
        DgmrError: an unknown output, or none.
    """
    if not outputs or (unknown := [name for name in outputs if name not in OUTPUTS]):
        raise DgmrError(f"unknown output {unknown[0] if outputs else 'none'!r}; known: {', '.join(OUTPUTS)}")
    return Part("image", _ready(_Vision(encoder, tuple(outputs), normalised)), images, "image", tuple(outputs), normalised)


def text_part(clip: nn.Module, tokens: Tensor, *, normalised: bool = False) -> Part:
    """A CLIP's text tower: ``text``, tokens ``[batch, length]``, to ``embedding`` ``[batch, width]``; ``clip`` has ``encode_text``."""
    return Part("text", _ready(_Text(clip, normalised)), tokens, "text", normalised=normalised, file="text")


class _Vision(nn.Module):
    def __init__(self, encoder: Encoder, outputs: tuple[str, ...], normalised: bool) -> None:
        super().__init__()
        self.module, self.encoder = encoder.module, encoder
        self.outputs, self.normalised = outputs, normalised

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        state = last_state(self.encoder, images)
        found = []
        for name in self.outputs:
            if name == "patches":
                found.append(self.encoder.features(self.encoder.norm(state))[1])
            else:
                embedding = self.encoder.embed(state)
                found.append(F.normalize(embedding, dim=-1) if self.normalised else embedding)
        return found[0] if len(found) == 1 else tuple(found)


class _Text(nn.Module):
    def __init__(self, clip: nn.Module, normalised: bool) -> None:
        super().__init__()
        self.clip, self.normalised = clip, normalised

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, normalize=self.normalised)


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _ready(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
