"""Neuron selection on calibration images: keep the neurons that the MLP's output needs.

Let ``h`` be an MLP's hidden activations on the calibration tokens, ``W`` the weight of its last Linear, and
``G = Σ h hᵀ`` the Gram matrix of the activations. The best recovery from a set ``K`` of kept neurons is a least-squares
fit. Its error depends on ``G`` and ``W`` only:

    error(K) = tr W (G − G_:K G_KK⁻¹ G_K:) Wᵀ

The greedy selection picks, step by step, the neuron that reduces this error most. Let ``R = G − G_:K G_KK⁻¹ G_K:`` be
the residual Gram matrix of the picks so far. Neuron ``j`` then reduces the error by ``‖W R_:j‖² / R_jj``, and ``R`` is
updated by one Cholesky step per pick. One factorization therefore gives the whole nested order and the error at every
width.

Without ``W``, the gain is ``R_jj``. This is pivoted Cholesky: DGMR's Gram-Schmidt on the activations instead of the
weights. Both rules are in :data:`SELECTION_RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import Block, TowerAdapter, check_embeddings, run_blocks, stem_states
from dgmr_tp.pruning.calibration import (
    Moments,
    at_least_float32,
    has_fewer_tokens,
    record_inputs,
    sample_tokens,
    token_weights,
)
from dgmr_tp.pruning.sites import sites_inside
from dgmr_tp.utils.modules import check_weights, evaluating, full_float32
from dgmr_tp.utils.progress import report_progress

RESIDUAL_TOLERANCE = 1e-9
"""Residual variance, relative to the mean variance, at which a neuron counts as a linear function of earlier picks."""
GRAM_ROUNDING = 1e-6
"""The same, relative to the neuron's own variance. Products in float32 round to about 1e-7."""
TOKENS_PER_NEURON = 16
"""Number of tokens, over all images, that the Gram matrix of an MLP is computed from, per neuron.

Tokens of one image resemble each other. On DINOv2 ViT-S/14, half of the tokens rank as well as all.
"""
NUM_SENSITIVITY_IMAGES = 64
"""Number of images on which the sensitivity of the embedding to an MLP's error is measured."""
PIVOT_BLOCK = 64
"""Number of picks between two updates of the residual Gram matrix.

Each update is one matrix product. The picks of a block are read from the device together.
"""


def _output_gain(energy: Tensor, variance: Tensor) -> Tensor:
    return energy / variance


def _activation_gain(energy: Tensor, variance: Tensor) -> Tensor:
    return variance


SELECTION_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "output": _output_gain,
    "activation": _activation_gain,
}
"""Selection rules by name. A rule maps ``‖W R_:j‖²`` and ``R_jj``, both ``[hidden]``, to the gain of each neuron ``j``.

``output`` minimizes the error of the MLP's output, ``activation`` that of the hidden activations.
"""


@dataclass(frozen=True)
class Ranking:
    """All neurons of an MLP in the order of the greedy selection."""

    order: Tensor
    """int64 ``[hidden]``, first pick first."""
    error: Tensor
    """float64 ``[hidden + 1]``: relative squared error of the MLP's output from the first ``k`` picks, 1 at 0."""
    sensitivity: float = 1.0
    """Relative squared error of the tower's embedding per unit of this MLP's error.

    ``sensitivity · error`` is the loss that :func:`~dgmr_tp.pruning.allocation.fitted_widths` minimizes.
    """

    @property
    def scores(self) -> Tensor:
        """Ranks as scores, float64 ``[hidden]`` by neuron: 1 for the first pick, ``1 / hidden`` for the last."""
        hidden = len(self.order)
        scores = torch.empty(hidden, dtype=torch.float64)
        scores[self.order] = torch.arange(hidden, 0, -1, dtype=torch.float64) / hidden
        return scores


def _selection_rule(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name not in SELECTION_RULES:
        raise DgmrError(f"unknown selection rule {name!r}. Use one of {', '.join(SELECTION_RULES)}.")
    return SELECTION_RULES[name]


def rank_neurons(gram: Tensor, weight: Tensor, *, by: str = "output", picks: int | None = None) -> Ranking:
    """Order the neurons of one MLP by greedy selection.

    Args:
        gram: float64 ``[hidden, hidden]``, the Gram matrix of the hidden activations, centered if the last Linear has a
            bias.
        weight: float64 ``[width, hidden]``, the weight of the last Linear.
        by: a name in :data:`SELECTION_RULES`.
        picks: number of greedy picks. The remaining neurons follow by variance, larger first. Default: all.

    Returns:
        The order and the errors. Neurons that are linear functions of earlier picks come last, larger variance first.

    Raises:
        DgmrError: ``by`` is unknown.
    """
    hidden, picks = len(gram), len(gram) if picks is None else min(picks, len(gram))
    greedy = _Greedy(gram, weight, _selection_rule(by))
    total = float((greedy.projected * weight).sum())
    order: list[int] = []
    error = [1.0]
    while len(order) < picks:
        chosen, reductions = (values.tolist() for values in greedy.pick_block(min(PIVOT_BLOCK, picks - len(order))))
        count = sum(reduction >= 0 for reduction in reductions)
        order += chosen[:count]
        for reduction in reductions[:count]:
            error.append(max(0.0, error[-1] - reduction / total) if total > 0 else 0.0)
        if count < len(chosen):
            break
    remaining = torch.nonzero(greedy.available).flatten()
    order += remaining[gram.diagonal()[remaining].argsort(descending=True, stable=True)].tolist()
    error += [error[-1]] * (hidden + 1 - len(error))
    return Ranking(torch.tensor(order), torch.tensor(error, dtype=torch.float64))


class _Greedy:
    """State of the greedy selection of :func:`rank_neurons`."""

    def __init__(self, gram: Tensor, weight: Tensor, gain_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.gain_of = gain_of
        self.residual = gram.clone()
        """``R`` before the current block of picks."""
        self.projected = weight @ gram
        """``W R`` before the current block of picks."""
        self.variance = gram.diagonal().clone()
        """``R_jj`` after each pick."""
        self.energy = self.projected.square().sum(0)
        """``‖W R_:j‖²`` after each pick."""
        self.available = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        self.tolerance = torch.maximum(GRAM_ROUNDING * self.variance, RESIDUAL_TOLERANCE * self.variance.mean())

    def pick_block(self, count: int) -> tuple[Tensor, Tensor]:
        """Pick ``count`` neurons. Nothing in here waits for the device.

        Returns:
            The picks, int64 ``[count]``, and by how much each reduces the squared error, ``[count]``. A reduction of −1
            means that no neuron was left above the tolerance, and that there was no pick. These are the last ones.
        """
        # Inside a block, R = residual − columns columnsᵀ and W R = projected − directions columnsᵀ.
        columns = self.residual.new_zeros(len(self.residual), count)
        directions = self.residual.new_zeros(len(self.projected), count)
        picks, reductions = [], []
        for done in range(count):
            usable = self.available & (self.variance > self.tolerance)
            gain = torch.where(usable, self.gain_of(self.energy, self.variance), -1.0)
            pick = gain.argmax(0, keepdim=True)  # a tensor, because a number would have to be read from the device
            is_usable = usable[pick]
            coefficients = columns[pick, :done].flatten()
            scale = torch.where(is_usable, self.variance[pick].sqrt(), torch.inf)  # without a pick, column = 0
            # R is symmetric, and its rows are contiguous.
            column = (self.residual[pick].flatten() - columns[:, :done] @ coefficients) / scale
            direction = (self.projected[:, pick].flatten() - directions[:, :done] @ coefficients) / scale
            reduction = direction.square().sum()
            along = direction @ self.projected - columns[:, :done] @ (direction @ directions[:, :done])
            self.energy = (self.energy - 2 * column * along + column.square() * reduction).clamp(min=0)
            self.variance = (self.variance - column.square()).clamp(min=0)
            columns[:, done], directions[:, done] = column, direction
            self.available.index_copy_(0, pick, self.available[pick] & ~is_usable)
            picks.append(pick)
            reductions.append(torch.where(is_usable, reduction, -1.0))
        self.residual.addmm_(columns, columns.T, alpha=-1)
        self.projected.addmm_(directions, columns.T, alpha=-1)
        return torch.cat(picks), torch.cat(reductions)


@torch.no_grad()
def rank_tower(
    adapter: TowerAdapter,
    images: Iterable[Tensor],
    *,
    by: str = "output",
    picks: Mapping[str, int] | None = None,
) -> dict[str, Ranking]:
    """Rank the neurons of every MLP of a tower on calibration images. The blocks run once.

    Also measures the sensitivity of the embedding to each MLP. On the first :data:`NUM_SENSITIVITY_IMAGES` images, the
    MLP keeps the first eighth of its ranking, is fitted to its dense output, and the remaining blocks run in
    :attr:`TowerAdapter.precision`.

    Args:
        adapter: the dense tower. It is unchanged.
        images: preprocessed batches ``[batch, 3, height, width]`` on the tower's device and in its dtype. The states of
            all images between two blocks are held in memory.
        by: a name in :data:`SELECTION_RULES`.
        picks: by site name, the number of neurons to order. Sensitivities are then not measured. Default: order all.

    Returns:
        Rankings by site name.

    Raises:
        DgmrError: ``by`` is unknown, there are no images, the activations are not finite, or all embeddings are equal.
    """
    _selection_rule(by)
    check_weights(adapter.tower)
    with evaluating(adapter.tower), full_float32():
        states = stem_states(adapter, images)
        if not states:
            raise DgmrError("selection on calibration images got none. Give at least one batch.")
        blocks, rankings = adapter.blocks(), {}
        embeddings = None if picks else _embeddings(adapter, _first_images(states), 0)
        spread = None if embeddings is None else float((embeddings - embeddings.mean(0)).square().sum())
        if spread == 0:
            raise DgmrError(
                "the embedding is the same for all these images, so the sensitivity to each MLP cannot be measured. "
                "Give other images, or more."
            )
        for depth, block in enumerate(blocks):
            sites = sites_inside(adapter.sites, block.name)
            consumers = [cast(nn.Linear, block.module.get_submodule(site.consumer)) for site in sites]
            states_before = _first_images(states)
            moments = _run_block(adapter, block, consumers, states, last=depth == len(blocks) - 1)
            for site, consumer, site_moments in zip(sites, consumers, moments, strict=True):
                name = f"{block.name}.{site.name}"
                mean, mean_target = site_moments.means()
                mean = mean if consumer.bias is not None else torch.zeros_like(mean)
                gram, _, _ = site_moments.second_moments(mean, mean_target)
                if not torch.isfinite(gram).all():
                    raise DgmrError(
                        f"the activations at {name} are not finite on these images. Check the weights and the "
                        "preprocessing."
                    )
                ranking = rank_neurons(gram, consumer.weight.double(), by=by, picks=(picks or {}).get(name))
                if embeddings is not None:
                    needed = int((ranking.error > 0).sum())  # this many neurons reproduce the output exactly
                    kept = ranking.order[: max(1, min(site.hidden, needed) // 8)].to(gram.device)
                    mlp_error, embedding_error = float(ranking.error[len(kept)]), 0.0
                    if mlp_error > 0:
                        with _fitted_from(consumer, gram, mean, kept):
                            difference = _embeddings(adapter, states_before, depth) - embeddings
                        embedding_error = float(difference.square().sum()) / cast(float, spread)
                    sensitivity = embedding_error / mlp_error if mlp_error > 0 else 0.0
                    ranking = replace(ranking, sensitivity=sensitivity)
                rankings[name] = ranking
            report_progress("rank", depth + 1, len(blocks))
        return rankings


def _run_block(
    adapter: TowerAdapter, block: Block, consumers: list[nn.Linear], states: list[Tensor], *, last: bool
) -> list[Moments]:
    """Replace the states before a block by those after it. Returns the moments of the inputs of each consumer.

    The moments are of :data:`TOKENS_PER_NEURON` tokens. Every batch has other ones.
    """
    moments = [Moments() for _ in consumers]
    num_images, widest = sum(map(len, states)), max((consumer.in_features for consumer in consumers), default=0)
    weight, generator = torch.empty(0), torch.Generator().manual_seed(0)
    for index, state in enumerate(states):
        with record_inputs(*consumers) as inputs:
            states[index] = block(state)
        if index == 0:
            weight = token_weights(adapter, states[0], last=last)
            if has_fewer_tokens(weight, num_images, widest):
                weight = token_weights(adapter, states[0], last=False)
        sampled = sample_tokens(weight, math.ceil(TOKENS_PER_NEURON * widest / num_images), generator)
        tokens = torch.nonzero(sampled).flatten()
        for consumer, site_moments in zip(consumers, moments, strict=True):
            rows = at_least_float32(inputs[consumer][:, tokens]).flatten(0, 1)
            site_moments.add(rows, rows[:, :0], sampled[tokens].repeat(len(state)))
    return moments


def _first_images(states: list[Tensor]) -> list[Tensor]:
    """Return the states of the first :data:`NUM_SENSITIVITY_IMAGES` images."""
    first, remaining = [], NUM_SENSITIVITY_IMAGES
    for state in states:
        first.append(state[:remaining])
        remaining -= len(first[-1])
        if not remaining:
            break
    return first


def _embeddings(adapter: TowerAdapter, states: Iterable[Tensor], depth: int) -> Tensor:
    """Run the tower from states before block ``depth``. Returns float64 ``[images, embedding]``."""
    with adapter.autocast():
        embeddings = [adapter.embed(run_blocks(adapter.blocks()[depth:], state)).double() for state in states]
    return check_embeddings(torch.cat(embeddings), "the calibration images")


@contextmanager
def _fitted_from(layer: nn.Linear, gram: Tensor, mean: Tensor, kept: Tensor) -> Iterator[None]:
    """Fit ``layer`` to its own output from the neurons ``kept`` alone. The context restores it at the end."""
    weight, bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
    gram_kept = gram[kept][:, kept]
    # The floor is for neurons that are all constant.
    ridge = max(RESIDUAL_TOLERANCE * float(gram_kept.diagonal().mean()), torch.finfo(gram_kept.dtype).tiny)
    gram_kept.diagonal().add_(ridge)
    target = weight.double() @ gram[:, kept]
    fitted = torch.linalg.solve(gram_kept, target.T).T
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
