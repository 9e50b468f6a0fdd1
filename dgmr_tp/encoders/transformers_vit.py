"""Adapter of vision towers of transformers: CLIP, SigLIP, DINOv2, InternVL."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dgmr_tp.encoders.model import find_by_class
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Block, TowerAdapter


@dataclass(frozen=True)
class Family:
    """Differences between the towers of transformers."""

    pool: Callable[[Any, Tensor], Tensor]
    """Maps the tower and the state after the last block to the embedding, without a projection outside the tower."""
    has_class_token: bool = True
    """True if the first token is a class token."""
    gives_tokens: bool = False
    """See :attr:`TowerAdapter.gives_tokens`."""


def _pool_clip(tower: Any, state: Tensor) -> Tensor:
    return tower.post_layernorm(state[:, 0])


def _pool_siglip(tower: Any, state: Tensor) -> Tensor:
    return tower.head(tower.post_layernorm(state))


def _forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the layer as a function of the state. Some layers require a mask, which differs between versions."""
    takes_mask = "attention_mask" in inspect.signature(layer.forward).parameters
    return partial(layer, attention_mask=None) if takes_mask else layer


def _class_token(tower: Any, state: Tensor) -> Tensor:
    return tower.layernorm(state)[:, 0]


FAMILIES = {
    "transformers.CLIPVisionModel": Family(_pool_clip),
    "transformers.SiglipVisionModel": Family(_pool_siglip, has_class_token=False),
    "transformers.Dinov2Model": Family(_class_token, gives_tokens=True),
    "transformers.InternVLVisionModel": Family(_class_token, gives_tokens=True),
}
"""Families by the tower's class. DINOv2 and InternViT serve dense tasks and language models with their patch tokens."""


class TransformersViT(TowerAdapter):
    """Adapter of the towers in :data:`FAMILIES` and of their subclasses.

    ``embed`` returns the model's ``pooler_output``, and for InternVL, which has none, the class token after the last
    norm. The ``projection`` of a CLIP that contains the tower is applied after it.

    Args:
        tower: the vision module.
        name: the model and its library.
        projection: the projection of the CLIP that contains the tower, if any.
    """

    def __init__(self, tower: nn.Module, name: str, projection: nn.Module | None = None) -> None:
        super().__init__(tower, name)
        family = find_by_class(FAMILIES, tower)
        if family is None:
            raise DgmrError(f"{type(tower).__name__} is not supported. Use one of {', '.join(FAMILIES)}.")
        self.projection = projection
        self.family = family
        self.gives_tokens = family.gives_tokens

    def stem(self, images: Tensor) -> Tensor:
        embedded = self.tower.embeddings(images)
        return self.tower.pre_layrnorm(embedded) if hasattr(self.tower, "pre_layrnorm") else embedded

    def blocks(self) -> Sequence[Block]:
        encoder = self.tower.encoder
        child = "layers" if hasattr(encoder, "layers") else "layer"
        return [
            Block(f"encoder.{child}.{i}", layer, _forward(layer)) for i, layer in enumerate(getattr(encoder, child))
        ]

    def features(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        return (state[:, 0], state[:, 1:]) if self.family.has_class_token else (None, state)

    def norm(self, state: Tensor) -> Tensor:
        return (self.tower.post_layernorm if hasattr(self.tower, "post_layernorm") else self.tower.layernorm)(state)

    def embed(self, state: Tensor) -> Tensor:
        pooled = self.family.pool(self.tower, state)
        return pooled if self.projection is None else self.projection(pooled)
