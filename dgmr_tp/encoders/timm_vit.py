"""Adapter of timm's ViT: ViT, DeiT, DINOv2 and every other ``timm.models.VisionTransformer``."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dgmr_tp.pruning import Block, TowerAdapter


class TimmViT(TowerAdapter):
    """Adapter of ``timm.models.VisionTransformer``.

    ``embed`` returns logits, or the pooled features if the model has no classifier. A model without a classifier, such
    as DINOv2, serves dense tasks with the patch tokens of the last block, so that ``gives_tokens`` is true.
    """

    def __init__(self, tower: VisionTransformer, name: str) -> None:
        super().__init__(tower, name)
        self.gives_tokens = tower.num_classes == 0

    def stem(self, images: Tensor) -> Tensor:
        model = self.tower
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def blocks(self) -> Sequence[Block]:
        return [Block(f"blocks.{i}", block, block) for i, block in enumerate(self.tower.blocks)]

    def features(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        class_token = state[:, 0] if self.tower.has_class_token else None
        return class_token, state[:, self.tower.num_prefix_tokens :]

    def norm(self, state: Tensor) -> Tensor:
        return self.tower.norm(state)

    def embed(self, state: Tensor) -> Tensor:
        return self.tower.forward_head(self.norm(state))
