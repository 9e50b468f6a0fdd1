"""What the student is asked for: the teacher's features, by mean squared errors with a weight each.

Both papers ask for the class token and the patch tokens before the final norm, weights 1 : 1 (arXiv 2603.08100 eq. 8; arXiv 2506.08591,
its EVA path). Its OpenCLIP path asks for patch tokens after the norm and the projected class token, which is the embedding; its Swin path
for the logits too, which is the embedding of a tower with a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import TowerAdapter

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The parts of the loss and their weights; a weight of 0 leaves a part out."""

    class_token: float = 1.0
    """Of towers that have one."""
    patches: float = 1.0
    embedding: float = 0.0
    """What the tower gives its caller: the projected features, or the logits of a classifier."""
    layers: dict[int, float] = field(default_factory=dict)
    """Weights of all tokens after single blocks, counted from 1."""
    after_norm: bool = False
    """Class and patch tokens are taken after the final norm instead of before it."""

    def __call__(self, student: Features, teacher: Features) -> Features:
        """The mean squared error of every part, unweighted, in float32."""
        return {name: F.mse_loss(features.float(), teacher[name].float()) for name, features in student.items()}

    def total(self, parts: Features) -> Tensor:
        """The weighted sum that is trained on."""
        return sum((self.weight(name) * part for name, part in parts.items()), next(iter(parts.values())).new_zeros(()))

    def weight(self, name: str) -> float:
        """Of a part by its name, such as ``patches`` or ``layer 3``."""
        return self.layers[int(name.removeprefix("layer "))] if name.startswith("layer ") else getattr(self, name)


class FeatureTap(nn.Module):
    """An encoder as a module from images to the features that an objective compares, by name.

    Args:
        encoder: its parameters are the module's.
        objective: which features.
        recompute: blocks keep only their input for the backward pass and run again there (activation checkpointing).

    Raises:
        DgmrError: the objective names a block that the encoder does not have, or nothing at all.
    """

    def __init__(self, adapter: TowerAdapter, objective: Objective | None = None, *, recompute: bool = False) -> None:
        super().__init__()
        self.tower = adapter.tower
        self.projection = adapter.projection
        self.adapter = adapter
        self.objective = objective or Objective()
        self.recompute = recompute
        depth = len(adapter.blocks())
        if wrong := [layer for layer in self.objective.layers if not 1 <= layer <= depth]:
            raise DgmrError(f"distill.loss.layers names block {wrong[0]}; {adapter.name} has blocks 1 to {depth}")

    def forward(self, images: Tensor, *, embedding: bool = False) -> Features:
        """Asked for the ``embedding``, that too, whatever the objective."""
        wanted, adapter = self.objective, self.adapter
        found: Features = {}
        state = adapter.stem(images)
        for number, block in enumerate(adapter.blocks(), start=1):
            recomputed = self.recompute and state.requires_grad
            state = checkpoint(block, state, use_reentrant=False) if recomputed else block(state)
            if wanted.layers.get(number):
                found[f"layer {number}"] = state
        class_token, patches = adapter.features(adapter.norm(state) if wanted.after_norm else state)
        if wanted.class_token and class_token is not None:
            found["class_token"] = class_token
        if wanted.patches:
            found["patches"] = patches
        if wanted.embedding or embedding:
            found["embedding"] = adapter.embed(state)
        if not found:
            raise DgmrError(
                f"distill.loss asks for nothing that {adapter.name} has; give patches or embedding a weight"
            )
        return found
