"""AMP (arXiv 2603.08100): neurons scored by what they do to a label-free entropy, widths found by binary search.

The objective is the entropy of the similarities between the images of a group (equations 5 to 7): for embeddings ``z`` of unit
length, ``p_ij = softmax_j(z_i·z_j / τ)`` and ``E = −mean_i Σ_j p_ij log p_ij``. It grows with the number of candidates, so
the size of a group is part of the method, whatever the number of processes: every process takes whole groups.

Differences from the released code: the embedding is the tower's own output (after the projection), ``log_softmax`` in float32, and
what comes before the block under trial is computed once per block instead of once per trial.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, log2
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import TowerAdapter, last_state, through
from dgmr_tp.pruning.calibration import gated_inputs
from dgmr_tp.pruning.plan import Plan, SitePlan, weight_sha256
from dgmr_tp.pruning.pruner import MLPPruner
from dgmr_tp.pruning.sites import Site, find_sites
from dgmr_tp.utils.distributed import all_reduce_sum, own_share
from dgmr_tp.utils.modules import evaluating
from dgmr_tp.utils.progress import report_progress

TEMPERATURE = 1 / 15
"""τ of OpenCLIP-g and -G in the paper; 1/20 for EVA-CLIP and DINOv2."""
TRIALS = 6
"""Trials a block: the finest width is a 64th of the neurons."""

NOT_FINITE = "the objective is not finite on these images; check the weights, the preprocessing and the temperature"
AT_A_TIME = 8
"""Images whose graph is held: of EVA-CLIP-E 2.7 GB each."""
Group = Sequence[Tensor]
"""Preprocessed images of one group of candidates, in batches that fit into memory."""
Objective = Callable[[Tensor, int], Tensor]
"""Takes the embeddings ``[images, embedding]`` of a group and the group's number to a scalar that pruning should not raise."""


def entropy(temperature: float = TEMPERATURE) -> Objective:
    """The paper's objective, in nats; uses images alone."""

    def objective(embeddings: Tensor, group: int) -> Tensor:
        unit = F.normalize(embeddings.float(), dim=-1)
        log_p = F.log_softmax(unit @ unit.T / temperature, dim=-1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    return objective


def contrastive(texts: Sequence[Tensor], temperature: float = TEMPERATURE) -> Objective:
    """The variant with text: CLIP's symmetric cross-entropy between images and their captions.

    Args:
        texts: for each group the captions' embeddings ``[images, embedding]``, in the order of the images.
    """

    def objective(embeddings: Tensor, group: int) -> Tensor:
        text = F.normalize(texts[group].float().to(embeddings.device), dim=-1)
        logits = F.normalize(embeddings.float(), dim=-1) @ text.T / temperature
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return objective


def gate_scores(
    adapter: TowerAdapter, groups: Sequence[Group], objective: Objective | None = None
) -> dict[str, Tensor]:
    """First-order importance of every hidden neuron (equations 1 to 4): ``mean_images |Σ_tokens h ∂E/∂h|``.

    A gate of ones on the hidden activations has exactly that sum as its gradient, so no activation is kept for it. The
    gradient at the embeddings is found first, from embeddings alone: a group never has to fit into memory with its graph.

    Args:
        encoder: the original; unchanged.
        groups: calibration images; with torch.distributed initialised, the same in every process.
        objective: default: :func:`entropy`.

    Returns:
        By site name, float64 ``[hidden]``, higher is kept.
    """
    consumers = {site.name: cast(nn.Linear, adapter.tower.get_submodule(site.consumer)) for site in adapter.sites}
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in consumers.items()}
    images = 0
    with evaluating(adapter.tower), _frozen(adapter.tower), torch.enable_grad():
        for batch, pull, scale in _pulls(adapter, groups, objective or entropy()):
            with gated_inputs(*consumers.values()) as gates:
                embeddings = adapter.embed(last_state(adapter, batch))
            found = torch.autograd.grad(embeddings, [gates[layer] for layer in consumers.values()], pull.to(embeddings))
            for name, gradient in zip(consumers, found, strict=True):
                sums[name] += gradient.flatten(1).double().abs().sum(0).cpu() / scale
            images += len(batch)
    total = all_reduce_sum(torch.tensor(float(images)))
    return {name: all_reduce_sum(summed) / total for name, summed in sums.items()}


@contextmanager
def weight_gradients(
    adapter: TowerAdapter, groups: Sequence[Group], objective: Objective | None = None
) -> Iterator[None]:
    """While the context lasts, the MLPs' parameters have ``.grad`` of the objective: what torch-pruning's Taylor criterion reads."""
    parameters = [p for site in adapter.sites for p in adapter.tower.get_submodule(site.name).parameters()]
    before = [(p, p.grad, p.requires_grad) for p in adapter.tower.parameters()]
    try:
        adapter.tower.requires_grad_(False)
        with evaluating(adapter.tower), torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
                parameter.grad = None
            for batch, pull, scale in _pulls(adapter, groups, objective or entropy()):
                embeddings = adapter.embed(last_state(adapter, batch))
                embeddings.backward((pull / scale).to(embeddings))
        for parameter in parameters:  # in every process, also in one without a group
            parameter.grad = all_reduce_sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        yield
    finally:
        for parameter, gradient, flag in before:
            parameter.grad = gradient
            parameter.requires_grad_(flag)


@dataclass
class Search:
    """Where a search for widths stands; a search that was interrupted goes on from it."""

    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By site name, ascending, the last block first."""
    baseline: float | None = None
    """The objective of the encoder as it is now."""
    image_blocks: int = 0
    """Images times blocks evaluated so far."""


@torch.no_grad()
def search_widths(
    adapter: TowerAdapter,
    scores: Mapping[str, Tensor],
    groups: Sequence[Group],
    *,
    threshold: float,
    two_sided: bool = False,
    objective: Objective | None = None,
    trials: int = TRIALS,
    state: Search | None = None,
    remember: Callable[[Search], None] = lambda state: None,
) -> Search:
    """AMP's Algorithm 1: from the last block to the first, the smallest width that raises the objective by no more than ``threshold``.

    In each trial the best ``(low + high) // 2`` neurons stay; if ``E − E₀ ≤ threshold`` (signed: a fall always passes) the upper end
    moves down, else the lower end up. What was accepted stays cut in the trials of earlier blocks, and its objective is
    their ``E₀``, so the thresholds add up over the blocks.

    Args:
        encoder: cut in place, MLP by MLP: pass a copy.
        scores: of :func:`gate_scores`, or any others.
        groups: images to search on, which should be no images that the result is judged by; the same in every process.
        threshold: ΔE, in the objective's unit.
        two_sided: test ``|E − E₀|`` instead. Where cutting makes embeddings alike, the entropy falls, and the paper's test lets
            everything pass.
        trials: a site.
        state: of an interrupted search with the same arguments.
        remember: called with the state after each site.

    Returns:
        The final state; a site that no trial could narrow keeps all.

    Raises:
        DgmrError: the objective is not finite on these images.
    """
    objective = objective or entropy()
    state = state or Search()
    blocks, sites = adapter.blocks(), adapter.sites

    def passes(change: float) -> bool:
        return (abs(change) if two_sided else change) <= threshold

    with evaluating(adapter.tower):
        for name, kept in state.kept.items():
            put(adapter.tower, name, _cut(adapter.tower.get_submodule(name), kept))
        if state.baseline is None:
            state.baseline = _judged(adapter, _before(adapter, groups, 0, state), 0, objective, state)
        states: list[tuple[int, list[Tensor]]]
        for depth in reversed(range(len(blocks))):
            here = [
                site for site in sites if site.name.startswith(f"{blocks[depth].name}.") and site.name not in state.kept
            ]
            states = []  # the last ones go before the next come
            states = _before(adapter, groups, depth, state) if here else []
            for site in reversed(here):
                order = scores[site.name].argsort(descending=True, stable=True).tolist()
                _search_site(
                    adapter,
                    site,
                    order,
                    partial(_judged, adapter, states, depth, objective, state),
                    passes,
                    trials,
                    state,
                )
                remember(state)
                report_progress("search", len(state.kept), len(sites))
    return state


def _search_site(
    adapter: TowerAdapter,
    site: Site,
    order: list[int],
    judged: Callable[[], float],
    passes: Callable[[float], bool],
    trials: int,
    state: Search,
) -> None:
    dense = adapter.tower.get_submodule(site.name)
    low, high, accepted, baseline = 0, site.hidden, dense, cast(float, state.baseline)
    for _ in range(trials):
        middle = (low + high) // 2
        if middle == low:
            break
        trial = _cut(dense, tuple(sorted(order[:middle])))
        put(adapter.tower, site.name, trial)
        found = judged()
        if passes(found - baseline):
            high, accepted, state.baseline = middle, trial, found
        else:
            low = middle
    put(adapter.tower, site.name, accepted)
    state.kept[site.name] = tuple(sorted(order[:high]))


def _cut(mlp: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """A copy of an MLP with some of its neurons."""
    mlp = copy.deepcopy(mlp)
    [site] = find_sites(mlp)
    MLPPruner(mlp, sites=[site]).apply(
        Plan("", "", {site.name: SitePlan(site.width, site.hidden, kept, weight_sha256(mlp, site))})
    )
    return mlp


def put(module: nn.Module, path: str, child: nn.Module) -> None:
    """Set the submodule at a dotted ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)


def _before(
    adapter: TowerAdapter, groups: Sequence[Group], depth: int, state: Search
) -> list[tuple[int, list[Tensor]]]:
    """The states before block ``depth`` of this process's groups, each with its group's number."""
    found = []
    for number, group in own_share(groups):
        found.append((number, [through(adapter.blocks()[:depth], adapter.stem(batch)) for batch in group]))
    state.image_blocks += depth * sum(len(batch) for group in groups for batch in group)
    return found


def _judged(
    adapter: TowerAdapter, states: list[tuple[int, list[Tensor]]], depth: int, objective: Objective, state: Search
) -> float:
    """The objective from states before block ``depth`` on, mean over the groups of all processes."""
    values = torch.zeros(3, dtype=torch.float64)  # sum, groups, images
    for number, batches in states:
        joined = torch.cat([adapter.embed(through(adapter.blocks()[depth:], tokens)) for tokens in batches])
        values += torch.tensor([float(objective(joined, number)), 1, len(joined)], dtype=torch.float64)
    values = all_reduce_sum(values)
    state.image_blocks += int(values[2]) * (len(adapter.blocks()) - depth)
    found = float(values[0] / values[1])
    if not isfinite(found):
        raise DgmrError(NOT_FINITE)
    return found


def _pulls(
    adapter: TowerAdapter, groups: Sequence[Group], objective: Objective
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The images of this process's groups, a few at a time because their graph goes through all blocks, with the gradient of the
    objective at their embeddings times a power of two, which half precision needs to hold it."""
    for number, group in own_share(groups):
        with torch.no_grad():
            embeddings = torch.cat([adapter.embed(last_state(adapter, batch)) for batch in group])
        embeddings = embeddings.float().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(embeddings, number), embeddings)
        largest = float(gradient.abs().max())
        if not isfinite(largest):
            raise DgmrError(NOT_FINITE)
        scale = 2.0 ** round(-log2(largest or 1.0))
        for images, pull in zip(group, (gradient * scale).split([len(batch) for batch in group]), strict=True):
            yield from ((*pair, scale) for pair in zip(images.split(AT_A_TIME), pull.split(AT_A_TIME), strict=True))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
