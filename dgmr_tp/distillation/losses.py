"""Distillation losses: which features of student and teacher are compared, by which function, with which weight.

Both papers compare the class token and the patch tokens before the final norm, weighted 1 : 1 (arXiv 2603.08100 eq. 8;
arXiv 2506.08591, EVA path). The OpenCLIP path of arXiv 2506.08591 compares patch tokens after the norm and the
projected class token, which is the embedding. Its Swin path also compares the logits, which are the embedding of a
tower with a classifier. The losses ``cosine`` and ``neighbors`` compare what an embedding index uses of an embedding,
which is its direction and its similarities to other embeddings.

To add a loss, add an entry to :data:`LOSSES`. A recipe gives it a weight under ``distill.loss.terms``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import TowerAdapter
from dgmr_tp.utils.config import Config, NameIn
from dgmr_tp.utils.knn import TEMPERATURE

Features = dict[str, Tensor]
"""Features of a batch by name: ``class_token`` ``[batch, width]``, ``patches`` ``[batch, patches, width]``,
``embedding``
``[batch, embedding]``, and ``layer N``, the state after block N."""


@dataclass(frozen=True)
class TeacherBank:
    """Teacher's outputs for a fixed set of training images, computed before the first step."""

    embeddings: Tensor
    """``[images, embedding]``, unit norm, in the order of the images."""
    deviations: Features
    """Standard deviation of every channel of each feature over images and tokens, ``[width]``."""


NO_BANK = TeacherBank(torch.empty(0, 0), {})
"""For losses that need none."""


@dataclass(frozen=True)
class Loss:
    """One term of the distillation loss."""

    feature: str
    """The feature that is compared: ``class_token``, ``patches`` or ``embedding``."""
    function: Callable[..., Tensor]
    """Maps the student's and the teacher's feature, in float32, to a scalar."""
    balanced: bool = False
    """With ``loss.balanced``, both features are first divided by the teacher's standard deviation of each channel."""
    needs_bank: bool = False
    """Pass the embeddings of the :class:`TeacherBank` as the third argument."""


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − the mean cosine similarity of the rows of ``student`` and ``teacher``, ``[batch, width]``."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def neighbor_divergence(student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """Return the mean KL divergence of the student's distribution over the bank from the teacher's.

    The distribution of an embedding is the softmax of its cosine similarities to the bank, divided by
    the temperature of the k-NN classifiers, 0.07. The bank has the teacher's embeddings, so that the loss measures new
    queries in an old index.

    Args:
        student: ``[batch, embedding]``.
        teacher: ``[batch, embedding]``.
        bank: ``[images, embedding]``, unit norm.
    """
    ours, theirs = (
        F.log_softmax(F.normalize(embeddings, dim=-1) @ bank.T / TEMPERATURE, dim=-1)
        for embeddings in (student, teacher)
    )
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


LOSSES: dict[str, Loss] = {
    **{name: Loss(name, F.mse_loss, balanced=True) for name in ("class_token", "patches", "embedding")},
    "cosine": Loss("embedding", cosine_distance),
    "neighbors": Loss("embedding", neighbor_divergence, needs_bank=True),
}
"""Terms of the distillation loss by name. These have separate recipe keys, others go under ``terms``."""


class DistillationLoss(Config):
    """Distillation loss: a weighted sum of terms between student and teacher features. A weight of 0 drops a term."""

    class_token: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the class token. A tower without a class token has no such term."""
    patches: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the patch tokens."""
    embedding: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error of the tower's output: the embedding, or the logits of a classifier."""
    cosine: float = Field(default=0.0, ge=0)
    """Weight of 1 − the mean cosine similarity of the embeddings."""
    neighbors: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence of the softmax of the similarities to the teacher's embeddings of 2,048 training
    images, at temperature 0.07. It asks for the neighbors that the teacher finds in an index."""
    layers: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of the mean squared errors of all tokens after single blocks, by block number. Blocks count from 1."""
    terms: dict[Annotated[str, NameIn(LOSSES)], Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of further losses, by their name in ``dgmr_tp.distillation.losses.LOSSES``."""
    after_norm: bool = False
    """Take class token and patch tokens after the final norm instead of before it."""
    balanced: bool = False
    """Divide each channel by the teacher's standard deviation of it, so that a few large channels do not dominate the
    mean squared errors. A factor for the whole feature would only change the weight of its term, because a mean squared
    error treats all directions alike."""

    @model_validator(mode="after")
    def _check_weights(self) -> DistillationLoss:
        if double := sorted(self.terms.keys() & type(self).model_fields.keys()):
            raise ValueError(f"terms names {double[0]}, which is a separate key. Use loss.{double[0]}")
        if not self.losses:
            raise ValueError(f"every weight is 0. Give a weight to one of {', '.join((*LOSSES, 'layers'))}")
        if self.balanced and not any(loss.balanced for loss in self.losses.values()):
            raise ValueError("balanced scales mean squared errors, but none of them has a weight. Set it to false")
        return self

    @property
    def losses(self) -> dict[str, Loss]:
        """The terms with a weight, by name. Blocks come first, in the order in which they run."""
        names = [f"layer {number}" for number in sorted(self.layers)]
        layers = {name: Loss(name, F.mse_loss, balanced=True) for name in names}
        return {name: loss for name, loss in {**layers, **LOSSES}.items() if self.weight(name)}

    @property
    def features(self) -> set[str]:
        """Names of the features that the terms compare."""
        return {loss.feature for loss in self.losses.values()}

    @property
    def needs_bank(self) -> bool:
        """Whether a term needs a :class:`TeacherBank`."""
        return self.balanced or any(loss.needs_bank for loss in self.losses.values())

    def __call__(self, student: Features, teacher: Features, bank: TeacherBank = NO_BANK) -> dict[str, Tensor]:
        """Compute every term, unweighted and in float32, by name. Terms whose feature the tower lacks are left out.

        Args:
            student: features of a batch.
            teacher: features of the same batch.
            bank: required if the loss ``needs_bank``.
        """
        terms = {}
        for name, loss in self.losses.items():
            if loss.feature not in student:
                continue
            pair = [features[loss.feature].float() for features in (student, teacher)]
            if self.balanced and loss.balanced:
                pair = [feature / bank.deviations[loss.feature] for feature in pair]
            terms[name] = loss.function(*pair, *([bank.embeddings] if loss.needs_bank else []))
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms, which is minimized."""
        return sum((self.weight(name) * term for name, term in terms.items()), next(iter(terms.values())).new_zeros(()))

    def weight(self, name: str) -> float:
        """Return the weight of a term by its name, such as ``patches`` or ``layer 3``."""
        if name.startswith("layer "):
            return self.layers[int(name.removeprefix("layer "))]
        if name in type(self).model_fields:
            return getattr(self, name)
        return self.terms.get(name, 0.0)


class FeatureTap(nn.Module):
    """A tower as a module from images to the features that a loss compares, by name.

    Args:
        adapter: runs the tower; the tower's parameters become this module's.
        loss: says which features are needed. Default: class token and patch tokens.
        recompute: keep only the input of each block for the backward pass, and run the block again there (activation
            checkpointing).

    Raises:
        DgmrError: the loss names a block that the tower does not have, or only features that the tower does not have.
    """

    def __init__(self, adapter: TowerAdapter, loss: DistillationLoss | None = None, *, recompute: bool = False) -> None:
        super().__init__()
        self.tower = adapter.tower
        self.projection = adapter.projection
        self.adapter = adapter
        loss = loss or DistillationLoss()
        self.needed, self.after_norm = loss.features, loss.after_norm
        self.recompute = recompute
        depth = len(adapter.blocks())
        if wrong := [layer for layer in loss.layers if not 1 <= layer <= depth]:
            raise DgmrError(
                f"distill.loss.layers names block {wrong[0]}, but {adapter.name} has blocks 1 to {depth}. "
                "Name one of these."
            )

    def forward(self, images: Tensor, *, embedding: bool = False) -> Features:
        """Return the features of ``images``; with ``embedding``, the embedding too, whatever the loss compares."""
        needed, adapter = self.needed, self.adapter
        features: Features = {}
        state = adapter.stem(images)
        for number, block in enumerate(adapter.blocks(), start=1):
            recomputed = self.recompute and state.requires_grad
            state = checkpoint(block, state, use_reentrant=False) if recomputed else block(state)
            if f"layer {number}" in needed:
                features[f"layer {number}"] = state
        class_token, patches = adapter.features(adapter.norm(state) if self.after_norm else state)
        if "class_token" in needed and class_token is not None:
            features["class_token"] = class_token
        if "patches" in needed:
            features["patches"] = patches
        if "embedding" in needed or embedding:
            features["embedding"] = adapter.embed(state)
        if not features:
            raise DgmrError(
                f"distill.loss compares no feature that {adapter.name} has. Give patches or embedding a weight."
            )
        return features
