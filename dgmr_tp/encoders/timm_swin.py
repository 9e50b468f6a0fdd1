"""Adapter of timm's Swin and SwinV2.

The state is a sequence of tokens, and each block reshapes it to its stage's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from dgmr_tp.pruning import Block, TowerAdapter


class TimmSwin(TowerAdapter):
    """Adapter of ``timm.models.SwinTransformer`` and ``SwinTransformerV2``. There is no class token.

    Each stage halves the grid. The first block of a stage takes the tokens of the previous stage.
    """

    def stem(self, images: Tensor) -> Tensor:
        return self.tower.patch_embed(images).flatten(1, 2)

    def blocks(self) -> Sequence[Block]:
        return [
            Block(f"layers.{i}.blocks.{j}", block, partial(_block, block, stage, first=j == 0))
            for i, stage in enumerate(self.tower.layers)
            for j, block in enumerate(stage.blocks)
        ]

    def features(self, state: Tensor) -> tuple[None, Tensor]:
        return None, state

    def norm(self, state: Tensor) -> Tensor:
        return self.tower.norm(state)

    def embed(self, state: Tensor) -> Tensor:
        grid = self.tower.layers[-1].output_resolution
        return self.tower.forward_head(self.norm(state).unflatten(1, grid))


def _block(block: nn.Module, stage: nn.Module, state: Tensor, *, first: bool) -> Tensor:
    grid = stage.input_resolution if first else stage.output_resolution
    state = state.unflatten(1, grid)
    return block(stage.downsample(state) if first else state).flatten(1, 2)
