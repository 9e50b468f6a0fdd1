"""Adapter of a timm tower inside an open_clip model: EVA02-CLIP, SigLIP, SigLIP2, Perception Encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from open_clip.timm_model import TimmModel
from torch import Tensor

from dgmr_tp.encoders.model import adapt
from dgmr_tp.pruning import Block, TowerAdapter


class OpenCLIPTimm(TowerAdapter):
    """Runs ``visual.trunk`` with its own adapter, then open_clip's projection ``visual.head``."""

    def __init__(self, tower: TimmModel, name: str) -> None:
        super().__init__(tower, name)
        self.trunk = adapt(tower.trunk)

    def stem(self, images: Tensor) -> Tensor:
        return self.trunk.stem(images)

    def blocks(self) -> Sequence[Block]:
        return [replace(block, name=f"trunk.{block.name}") for block in self.trunk.blocks()]

    def features(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        return self.trunk.features(state)

    def norm(self, state: Tensor) -> Tensor:
        return self.trunk.norm(state)

    def embed(self, state: Tensor) -> Tensor:
        return self.tower.head(self.trunk.embed(state))
