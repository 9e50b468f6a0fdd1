"""Selection that sees the data: neurons chosen by what the MLP's output loses without them.

For one MLP with hidden activations ``h`` on the calibration tokens and the last Linear's weight ``W``, the best that recovery
can do with the neurons ``K`` is a least-squares fit, whose error depends on the Gram matrix ``G`` of the activations alone:

    error(K) = tr W (G − G_:K G_KK⁻¹ G_K:) Wᵀ

The greedy choice takes, again and again, the neuron that lowers this most. With the residual Gram ``R`` (what the chosen
neurons leave unexplained) the gain of neuron ``j`` is ``‖W R_:j‖² / R_jj``, and ``R`` follows by one Cholesky step a pick: one
factorisation gives the whole nested order and the error at every width.

Dropping ``W`` leaves pivoted Cholesky, DGMR's Gram-Schmidt over the activations in place of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.calibration import Moments, recorded_inputs, token_weights
from dgmr_tp.pruning.encoder import Encoder
from dgmr_tp.pruning.modes import evaluating
from dgmr_tp.pruning.sites import find_sites

SPENT = 1e-9
"""A neuron whose residual is this small beside the mean variance is explained by those chosen before it."""


@dataclass(frozen=True)
class Ranking:
    """All neurons of an MLP in the order in which the greedy choice takes them."""

    order: Tensor
    """int64 ``[hidden]``, first pick first."""
    error: Tensor
    """float64 ``[hidden + 1]``: the relative squared error of the best fit from the first ``k`` neurons; 1 at 0."""


def rank_neurons(gram: Tensor, weight: Tensor, *, by: str = "output", picks: int | None = None) -> Ranking:
    """Order neurons greedily.

    Args:
        gram: float64 ``[hidden, hidden]``, of the hidden activations (centred where the last Linear has a bias).
        weight: float64 ``[width, hidden]``, of the last Linear.
        by: ``output``: the error of the MLP's output; ``activation``: that of the activations themselves.
        picks: stop after so many; the neurons left follow by their variance.

    Neurons that those before them explain come last, larger variance first.
    """
    hidden = len(gram)
    left = gram.diagonal().clone()  # R_jj
    image = weight @ gram  # W R
    energy = image.square().sum(0)  # ‖W R_:j‖²
    total = float((image * weight).sum())
    spent = SPENT * float(left.mean())
    picks = hidden if picks is None else min(picks, hidden)
    factor = torch.zeros(hidden, picks, dtype=gram.dtype, device=gram.device)  # R = G − factor factorᵀ
    open_ = torch.ones(hidden, dtype=torch.bool, device=gram.device)
    order: list[int] = []
    error = [1.0]
    for step in range(picks):
        usable = open_ & (left > spent)
        gain = torch.where(usable, energy / left.clamp(min=spent or 1) if by == "output" else left, -1.0)
        pick = int(gain.argmax())
        if not usable[pick]:
            break
        scale = left[pick].sqrt()
        column = (gram[:, pick] - factor[:, :step] @ factor[pick, :step]) / scale
        direction = image[:, pick] / scale
        energy = (energy - 2 * column * (direction @ image) + column.square() * direction.square().sum()).clamp(min=0)
        image -= torch.outer(direction, column)
        factor[:, step] = column
        left = (left - column.square()).clamp(min=0)
        open_[pick] = False
        order.append(pick)
        error.append(max(0.0, error[-1] - float(direction.square().sum()) / total) if total > 0 else 0.0)
    rest = torch.nonzero(open_).flatten()
    order += rest[gram.diagonal()[rest].argsort(descending=True, stable=True)].tolist()
    error += [error[-1]] * (hidden + 1 - len(error))
    return Ranking(torch.tensor(order), torch.tensor(error, dtype=torch.float64))


@torch.no_grad()
def rank_encoder(
    encoder: Encoder,
    images: Iterable[Tensor],
    *,
    by: str = "output",
    picks: Mapping[str, int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Ranking]:
    """Rank the neurons of every MLP in the blocks of ``encoder``, in one walk over its blocks.

    Args:
        encoder: the original; unchanged.
        images: preprocessed batches on its device and in its dtype. Their states between two blocks are held in memory.
        by: see :func:`rank_neurons`.
        picks: by site name, how many neurons have to be ordered; default: all.
        progress: called with blocks done and blocks in all.

    Returns:
        By site name.

    Raises:
        DgmrError: no images, or activations that are not finite.
    """
    with evaluating(encoder.module):
        states = [encoder.stem(batch) for batch in images]
        if not states:
            raise DgmrError("selection by the data needs calibration images, got none")
        blocks, rankings = encoder.blocks(), {}
        for depth, block in enumerate(blocks):
            weight = token_weights(encoder, block(states[0]), last=depth == len(blocks) - 1)
            sites = find_sites(block.module)
            consumers = [cast(nn.Linear, block.module.get_submodule(site.consumer)) for site in sites]
            sums = [Moments() for _ in consumers]
            counted = torch.nonzero(weight).flatten()
            for place, state in enumerate(states):
                with recorded_inputs(*consumers) as seen:
                    states[place] = block(state)
                for consumer, accumulated in zip(consumers, sums, strict=True):
                    rows = seen[consumer][:, counted].flatten(0, 1)
                    accumulated.add(rows, rows[:, :0], weight[counted].repeat(len(state)))  # of h alone: y is empty
            for site, consumer, accumulated in zip(sites, consumers, sums, strict=True):
                name = f"{block.name}.{site.name}"
                mean, nothing = accumulated.mean()
                gram, _, _ = accumulated.about(mean if consumer.bias is not None else torch.zeros_like(mean), nothing)
                if not torch.isfinite(gram).all():
                    raise DgmrError(f"the activations at {name} are not finite on these images; check the weights and the preprocessing")
                rankings[name] = rank_neurons(gram, consumer.weight.double(), by=by, picks=(picks or {}).get(name))
            progress(depth + 1, len(blocks))
        return rankings


class FunctionalImportance(tp.importance.Importance):
    """torch-pruning importance from a :class:`Ranking` per MLP: the place in the greedy order, 1 first, 0 last.

    Args:
        model: the module whose MLPs were ranked, and whose groups will be scored.
        rankings: of :func:`rank_encoder`, by site name in ``model``.
        name: what a plan calls the criterion.
    """

    def __init__(self, model: nn.Module, rankings: Mapping[str, Ranking], name: str = "output") -> None:
        self.name = name
        self.rankings = {}
        for site in find_sites(model):
            if site.name in rankings:
                self.rankings[model.get_submodule(site.producers[0])] = rankings[site.name]

    def __call__(self, group: tp.Group, **_: object) -> Tensor | None:
        """Scores aligned with ``group[0].idxs``; None for a group that was not ranked."""
        ranking = self.rankings.get(group[0].dep.target.module)
        if ranking is None:
            return None
        hidden = len(ranking.order)
        scores = torch.empty(hidden, dtype=torch.float64)
        scores[ranking.order] = torch.arange(hidden - 1, -1, -1, dtype=torch.float64) / hidden
        channels = group._DG.get_out_channels(group[0].dep.target.module)
        return scores.repeat(channels // hidden)[group[0].idxs]
