"""Adapter of timm's Eva: EVA, EVA02, EVA-CLIP, Perception Encoder, DINOv3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt

from torch import Tensor

from dgmr_tp.pruning import Block, TowerAdapter


class TimmEva(TowerAdapter):
    """Adapter of ``timm.models.Eva``.

    ``embed`` returns logits, or the pooled features if the model has no classifier.
    """

    def stem(self, images: Tensor) -> Tensor:
        tokens, _ = self.tower._pos_embed(self.tower.patch_embed(images))
        return self.tower.norm_pre(tokens)

    def blocks(self) -> Sequence[Block]:
        return [Block(f"blocks.{i}", block, partial(self._block, i)) for i, block in enumerate(self.tower.blocks)]

    def _block(self, index: int, state: Tensor) -> Tensor:
        rotary = self._rotary(state)
        if rotary is not None and self.tower.rope_mixed:  # the angles differ per block
            rotary = rotary[index]
        return self.tower.blocks[index](state, rope=rotary)

    def _rotary(self, state: Tensor) -> Tensor | None:
        """Return the rotary position embedding of ``state``, or None if the model has none.

        It depends on the grid of patches only and is computed in each block, so that the state is one tensor.
        """
        model = self.tower
        if model.rope is None:
            return None
        if not model.dynamic_img_size and hasattr(model.rope, "feat_shape"):
            return model.rope.get_embed()
        patches, grid = state.shape[1] - model.num_prefix_tokens, tuple(model.patch_embed.grid_size)
        if patches != grid[0] * grid[1]:  # another image size; images are square
            grid = (isqrt(patches), isqrt(patches))
        return model.rope.get_embed(shape=grid)

    def features(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        class_token = None if self.tower.cls_token is None else state[:, 0]
        return class_token, state[:, self.tower.num_prefix_tokens :]

    def norm(self, state: Tensor) -> Tensor:
        return self.tower.norm(state)

    def embed(self, state: Tensor) -> Tensor:
        return self.tower.forward_head(self.norm(state))
