"""Vision towers of transformers as a walk: CLIP, SigLIP, DINOv2, InternVL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from dgmr_tp.pruning import Block, TowerAdapter


def clip(tower: nn.Module, tokens: Tensor) -> Tensor:
    return tower.post_layernorm(tokens[:, 0])


def siglip(tower: nn.Module, tokens: Tensor) -> Tensor:
    return tower.head(tower.post_layernorm(tokens))


def class_token(tower: nn.Module, tokens: Tensor) -> Tensor:
    return tower.layernorm(tokens)[:, 0]


HEADS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "CLIPVisionModel": (clip, True),
    "SiglipVisionModel": (siglip, False),
    "Dinov2Model": (class_token, True),
    "InternVLVisionModel": (class_token, True),
}
"""By class: the embedding of the state after the last block, and whether the first token is a class token."""


class TransformersViT(TowerAdapter):
    """``embed`` gives the model's ``pooler_output`` (InternVL has none: the class token after its last norm), behind the ``projection`` of
    the CLIP that the tower belongs to, if any."""

    def __init__(self, tower: nn.Module, name: str, projection: nn.Module | None = None) -> None:
        super().__init__(tower, name)
        self.projection = projection
        self._head, self._has_class_token = HEADS[type(tower).__name__]
        self.gives_tokens = self._head is class_token
        """DINOv2 and InternViT serve dense tasks and language models with the patch tokens of the last block."""

    def stem(self, images: Tensor) -> Tensor:
        embedded = self.tower.embeddings(images)
        return self.tower.pre_layrnorm(embedded) if hasattr(self.tower, "pre_layrnorm") else embedded

    def blocks(self) -> Sequence[Block]:
        encoder = self.tower.encoder
        child = "layers" if hasattr(encoder, "layers") else "layer"
        masked = {} if type(self.tower).__name__.startswith("InternVL") else {"attention_mask": None}
        return [
            Block(f"encoder.{child}.{i}", layer, partial(layer, **masked))
            for i, layer in enumerate(getattr(encoder, child))
        ]

    def features(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        return (state[:, 0], state[:, 1:]) if self._has_class_token else (None, state)

    def norm(self, state: Tensor) -> Tensor:
        return (self.tower.post_layernorm if hasattr(self.tower, "post_layernorm") else self.tower.layernorm)(state)

    def embed(self, state: Tensor) -> Tensor:
        pooled = self._head(self.tower, state)
        return pooled if self.projection is None else self.projection(pooled)
