"""Adapter of open_clip's own ViT."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.transformer import VisionTransformer
from torch import Tensor

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Block, TowerAdapter


class OpenCLIPViT(TowerAdapter):
    """Adapter of the tower ``visual`` of an open_clip model (``open_clip.transformer.VisionTransformer``).

    Raises:
        DgmrError: the tower was built with ``batch_first=False``.
    """

    def __init__(self, tower: VisionTransformer, name: str) -> None:
        if not tower.transformer.batch_first:
            raise DgmrError(
                f"{name} was built with batch_first=False, which is not supported. Build it with batch_first=True."
            )
        super().__init__(tower, name)

    def stem(self, images: Tensor) -> Tensor:
        return self.tower._embeds(images)

    def blocks(self) -> Sequence[Block]:
        return [
            Block(f"transformer.resblocks.{i}", block, block)
            for i, block in enumerate(self.tower.transformer.resblocks)
        ]

    def features(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state[:, 0], state[:, 1:]

    def norm(self, state: Tensor) -> Tensor:
        # CoCa applies its norm to the pooled features, not to the tokens.
        pools_before_norm = self.tower.attn_pool is not None and self.tower.attn_pool_contrastive is None
        return state if pools_before_norm else self.tower.ln_post(state)

    def embed(self, state: Tensor) -> Tensor:
        pooled, _ = self.tower._pool(state)
        return pooled if self.tower.proj is None else pooled @ self.tower.proj
