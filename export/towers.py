"""The towers of a model as parts that can be served."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.export.export_tower import Part
from dgmr_tp.pruning import TowerAdapter
from dgmr_tp.pruning.adapter import last_state

OUTPUTS = ("embedding", "patches")
TEXTS = ("a cat", "a photo of two people on a beach at night", "the small print of an old newspaper, out of focus")
"""What a text tower's files are proved with."""


def parts_of(
    model: OpenedModel,
    images: Tensor,
    *,
    outputs: Sequence[str] = ("embedding",),
    normalised: bool = False,
    text: bool = False,
) -> list[Part]:
    """The vision tower and, if asked for, the text tower of a model; see :func:`vision_part`.

    Raises:
        DgmrError: an unknown output; or the model has no text tower.
    """
    parts = [vision_part(model.adapter, images, outputs=outputs, normalised=normalised)]
    if text:
        tower = model.text
        if model.tokenizer is None or tower is None:
            raise DgmrError(f"{model.name} has no text tower to export, or no tokenizer; it takes a CLIP")
        parts.append(text_part(tower, model.tokenizer(list(TEXTS)), normalised=normalised))
    return parts


def vision_part(
    adapter: TowerAdapter, images: Tensor, *, outputs: Sequence[str] = ("embedding",), normalised: bool = False
) -> Part:
    """A vision tower: images ``[batch, 3, size, size]`` to ``embedding`` ``[batch, width]`` and ``patches`` ``[batch, patches, width]``.

    Args:
        encoder: the tower's walk; it is copied.
        images: preprocessed, ``[n, 3, size, size]``, n ≥ 2.
        outputs: the embedding, alone or with the patch tokens, which are those behind the final norm.
        normalised: the embedding's length is made 1 inside the file.

    Raises:
        DgmrError: an unknown output, or no embedding.
    """
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise DgmrError(f"unknown output {unknown[0]!r}; known: {', '.join(OUTPUTS)}")
    if "embedding" not in outputs:
        raise DgmrError("the outputs must hold the embedding; patches come beside it")
    ordered = tuple(name for name in OUTPUTS if name in outputs)
    return Part("image", _ready(_Vision(adapter, ordered, normalised)), images, "image", ordered, normalised)


def text_part(tower: nn.Module, tokens: Tensor, *, normalised: bool = False) -> Part:
    """A CLIP's text tower: ``text``, tokens ``[batch, length]``, to ``embedding`` ``[batch, width]``; ``tower`` has ``encode_text``."""
    return Part("text", _ready(_Text(tower, normalised)), tokens, "text", normalised=normalised, file="text")


class _Vision(nn.Module):
    def __init__(self, adapter: TowerAdapter, outputs: tuple[str, ...], normalised: bool) -> None:
        super().__init__()
        self.tower, self.projection, self.adapter = adapter.tower, adapter.projection, adapter
        self.outputs, self.normalised = outputs, normalised

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        state = last_state(self.adapter, images)
        found = []
        for name in self.outputs:
            if name == "patches":
                found.append(self.adapter.features(self.adapter.norm(state))[1])
            else:
                embedding = self.adapter.embed(state)
                found.append(F.normalize(embedding, dim=-1) if self.normalised else embedding)
        return found[0] if len(found) == 1 else tuple(found)


class _Text(nn.Module):
    def __init__(self, tower: nn.Module, normalised: bool) -> None:
        super().__init__()
        self.tower, self.normalised = tower, normalised

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tower.encode_text(tokens, normalize=self.normalised)


def _ready(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
