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

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import TowerAdapter, through
from dgmr_tp.pruning.calibration import Moments, recorded_inputs, token_weights, too_few
from dgmr_tp.pruning.sites import find_sites
from dgmr_tp.utils.modules import evaluating
from dgmr_tp.utils.progress import report_progress

SPENT = 1e-9
"""A neuron whose residual is this small beside the mean variance is explained by those chosen before it."""
PROBED = 128
"""Images on which it is measured how much an MLP's error matters."""
PANEL = 64
"""So many picks are gathered before the residual Gram is updated, by one matrix product."""


@dataclass(frozen=True)
class Ranking:
    """All neurons of an MLP in the order in which the greedy choice takes them."""

    order: Tensor
    """int64 ``[hidden]``, first pick first."""
    error: Tensor
    """float64 ``[hidden + 1]``: the relative squared error of the MLP's output, best fitted from the first ``k`` neurons; 1 at 0."""
    sensitivity: float = 1.0
    """The relative squared error of the tower's embedding per error of this MLP; ``sensitivity · error`` is what widths are fitted by."""

    @property
    def scores(self) -> Tensor:
        """The place in the order as a score, float64 ``[hidden]`` by neuron: 1 first, above 0 last."""
        hidden = len(self.order)
        scores = torch.empty(hidden, dtype=torch.float64)
        scores[self.order] = torch.arange(hidden, 0, -1, dtype=torch.float64) / hidden
        return scores


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
    residual = gram.clone()  # R, as it was at the start of the panel
    image = weight @ gram  # W R, likewise
    left = gram.diagonal().clone()  # R_jj now
    energy = image.square().sum(0)  # ‖W R_:j‖² now
    total = float((image * weight).sum())
    spent = SPENT * float(left.mean())
    picks = hidden if picks is None else min(picks, hidden)
    open_ = torch.ones(hidden, dtype=torch.bool, device=gram.device)
    order: list[int] = []
    error = [1.0]
    while len(order) < picks:
        # R = residual − columns columnsᵀ and W R = image − directions columnsᵀ: a panel of picks, then one matrix product each
        columns, directions = gram.new_zeros(hidden, PANEL), gram.new_zeros(len(weight), PANEL)
        taken = 0
        while taken < PANEL and len(order) < picks:
            usable = open_ & (left > spent)
            gain = torch.where(usable, energy / left.clamp(min=spent or 1) if by == "output" else left, -1.0)
            pick = int(gain.argmax())
            if not usable[pick]:
                picks = len(order)
                break
            scale, before = left[pick].sqrt(), columns[pick, :taken]
            column = (residual[:, pick] - columns[:, :taken] @ before) / scale
            direction = (image[:, pick] - directions[:, :taken] @ before) / scale
            along = direction @ image - columns[:, :taken] @ (direction @ directions[:, :taken])
            energy = (energy - 2 * column * along + column.square() * direction.square().sum()).clamp(min=0)
            left = (left - column.square()).clamp(min=0)
            columns[:, taken], directions[:, taken] = column, direction
            taken += 1
            open_[pick] = False
            order.append(pick)
            error.append(max(0.0, error[-1] - float(direction.square().sum()) / total) if total > 0 else 0.0)
        residual.addmm_(columns, columns.T, alpha=-1)
        image.addmm_(directions, columns.T, alpha=-1)
    rest = torch.nonzero(open_).flatten()
    order += rest[gram.diagonal()[rest].argsort(descending=True, stable=True)].tolist()
    error += [error[-1]] * (hidden + 1 - len(error))
    return Ranking(torch.tensor(order), torch.tensor(error, dtype=torch.float64))


@torch.no_grad()
def rank_tower(
    adapter: TowerAdapter,
    images: Iterable[Tensor],
    *,
    by: str = "output",
    picks: Mapping[str, int] | None = None,
) -> dict[str, Ranking]:
    """Rank the neurons of every MLP in the blocks of ``adapter``, in one walk over its blocks.

    How much an MLP's error matters is measured: on the first :data:`PROBED` images, an eighth of its neurons
    stays, best fitted, and the blocks behind it say what that does to the embedding. With ``picks`` it is not.

    Args:
        encoder: the original; unchanged.
        images: preprocessed batches on its device and in its dtype. Their states between two blocks are held in memory.
        by: see :func:`rank_neurons`.
        picks: by site name, how many neurons have to be ordered; default: all.

    Returns:
        By site name.

    Raises:
        DgmrError: no images, or activations that are not finite.
    """
    with evaluating(adapter.tower):
        states = [adapter.stem(batch) for batch in images]
        if not states:
            raise DgmrError("selection by the data needs calibration images, got none")
        blocks, rankings = adapter.blocks(), {}
        answers = None if picks else _embeddings(adapter, _first(states), 0)
        spread = None if answers is None else float((answers - answers.mean(0)).square().sum())
        if spread == 0:
            raise DgmrError(
                "the embedding is the same for all these images, so nothing shows which MLP matters; give other ones, or more"
            )
        for depth, block in enumerate(blocks):
            after, sites = block(states[0]), find_sites(block.module)
            weight = token_weights(adapter, after, last=depth == len(blocks) - 1)
            if too_few(weight, sum(map(len, states)), max(site.hidden for site in sites)):
                weight = token_weights(adapter, after, last=False)
            consumers = [cast(nn.Linear, block.module.get_submodule(site.consumer)) for site in sites]
            sums = [Moments() for _ in consumers]
            counted = torch.nonzero(weight).flatten()
            before = _first(states)
            for place, state in enumerate(states):
                with recorded_inputs(*consumers) as seen:
                    states[place] = block(state)
                for consumer, accumulated in zip(consumers, sums, strict=True):
                    rows = seen[consumer][:, counted].flatten(0, 1)
                    accumulated.add(rows, rows[:, :0], weight[counted].repeat(len(state)))  # of h alone: y is empty
            for site, consumer, accumulated in zip(sites, consumers, sums, strict=True):
                name = f"{block.name}.{site.name}"
                mean, nothing = accumulated.mean()
                mean = mean if consumer.bias is not None else torch.zeros_like(mean)
                gram, _, _ = accumulated.about(mean, nothing)
                if not torch.isfinite(gram).all():
                    raise DgmrError(
                        f"the activations at {name} are not finite on these images; check the weights and the preprocessing"
                    )
                ranking = rank_neurons(gram, consumer.weight.double(), by=by, picks=(picks or {}).get(name))
                if answers is not None:
                    needed = int((ranking.error > 0).sum())  # so many rebuild the output whole
                    kept = ranking.order[: max(1, min(site.hidden, needed) // 8)].to(gram.device)
                    lost, changed = float(ranking.error[len(kept)]), 0.0
                    if lost > 0:
                        with _fitted_from(consumer, gram, mean, kept):
                            changed = float((_embeddings(adapter, before, depth) - answers).square().sum()) / cast(
                                float, spread
                            )
                    ranking = replace(ranking, sensitivity=changed / lost if lost > 0 else 0.0)
                rankings[name] = ranking
            report_progress("rank", depth + 1, len(blocks))
        return rankings


def _first(states: list[Tensor]) -> list[Tensor]:
    """The states of the first images, :data:`PROBED` at most."""
    first, left = [], PROBED
    for state in states:
        first.append(state[:left])
        left -= len(first[-1])
        if not left:
            break
    return first


def _embeddings(adapter: TowerAdapter, states: Iterable[Tensor], depth: int) -> Tensor:
    """What the tower gives for states before its block ``depth``, float64 ``[images, embedding]``."""
    return torch.cat([adapter.embed(through(adapter.blocks()[depth:], state)).double() for state in states])


@contextmanager
def _fitted_from(layer: nn.Linear, gram: Tensor, mean: Tensor, kept: Tensor) -> Iterator[None]:
    """While the context lasts, ``layer`` reads the neurons ``kept`` alone, fitted to its answer on the calibration tokens."""
    weight, bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
    inner = gram[kept][:, kept]
    inner.diagonal().add_(
        max(SPENT * float(inner.diagonal().mean()), torch.finfo(inner.dtype).tiny)
    )  # all of them may be constant
    target = weight.double() @ gram[:, kept]
    fitted = torch.linalg.solve(inner, target.T).T
    try:
        layer.weight.zero_()
        layer.weight[:, kept] = fitted.to(layer.weight.dtype)
        if bias is not None:
            layer.bias.add_((weight.double() @ mean - fitted @ mean[kept]).to(bias.dtype))
        yield
    finally:
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
