"""What the student is asked for: the teacher's class token and patch tokens before the final norm.

Both papers: mean squared error on the class token plus mean squared error on the patch tokens, weights 1 : 1
(arXiv 2603.08100 eq. 8; arXiv 2506.08591, its EVA path).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.pruning import Encoder, last_state

Features = tuple[Tensor | None, Tensor]


class FeatureTap(nn.Module):
    """An encoder as a module from images to ``(class token, patch tokens)`` of its last block."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.tower = encoder.module
        self.walk = encoder

    def forward(self, images: Tensor) -> Features:
        return self.walk.features(last_state(self.walk, images))


def feature_loss(student: Features, teacher: Features, class_weight: float = 1.0, patch_weight: float = 1.0) -> Tensor:
    """``class_weight · MSE(class token) + patch_weight · MSE(patch tokens)``, each a mean over all its numbers.

    A tower without a class token has the second part alone.
    """
    loss = patch_weight * F.mse_loss(student[1], teacher[1])
    if student[0] is not None and teacher[0] is not None:
        loss = loss + class_weight * F.mse_loss(student[0], teacher[0])
    return loss
