"""AMP (arXiv 2603.08100): neuron scores from a label-free entropy, and MLP widths from a binary search on it.

Works on a :class:`TowerAdapter` and groups of unlabeled images. Returns scores by site, and the neurons that a search
keeps.

The objective is the entropy of the similarities between the images of a group (equations 5 to 7). For embeddings ``z``
of unit length,

    p_ij = softmax_j(z_i·z_j / τ),    E = −mean_i Σ_j p_ij log p_ij

``E`` grows with the number of images in a group. The group size is therefore part of the method and does not depend on
the number of processes: each process takes whole groups.

Differences from the released code: the embedding is the tower's own output, projection included; ``log_softmax`` runs
in float32; and the blocks before the searched one run once per block instead of once per trial.
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
from dgmr_tp.pruning.adapter import TowerAdapter, last_state, run_blocks
from dgmr_tp.pruning.calibration import gate_inputs
from dgmr_tp.pruning.pruner import cut_sites
from dgmr_tp.pruning.sites import Site
from dgmr_tp.utils.distributed import all_reduce_sum, own_share
from dgmr_tp.utils.modules import evaluating
from dgmr_tp.utils.progress import report_progress

TEMPERATURE = 1 / 15
"""Temperature τ of the similarities. The paper uses 1/15 for OpenCLIP-g and -G, and 1/20 for EVA-CLIP and DINOv2."""
MAX_TRIALS = 6
"""Maximum number of bisection steps per site. The search ends within 1/64 of the neurons."""
GRADIENT_BATCH = 8
"""Number of images in one backward pass. For EVA-CLIP-E each image's graph takes 2.7 GB."""
NON_FINITE_ERROR = (
    "the objective is not finite on these images. Check the weights, the preprocessing and the temperature."
)

Group = Sequence[Tensor]
"""Preprocessed images of one similarity matrix, as batches that fit into memory."""
Objective = Callable[[Tensor, int], Tensor]
"""Maps a group's embeddings ``[images, embedding]`` and the group's index to a scalar that pruning should not raise."""


def entropy(temperature: float = TEMPERATURE) -> Objective:
    """Return the paper's objective: the entropy of the image similarities, in nats."""

    def objective(embeddings: Tensor, group: int) -> Tensor:
        unit = F.normalize(embeddings.float(), dim=-1)
        log_p = F.log_softmax(unit @ unit.T / temperature, dim=-1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    return objective


def contrastive(texts: Sequence[Tensor], temperature: float = TEMPERATURE) -> Objective:
    """Return the objective with captions: CLIP's symmetric cross-entropy between images and texts.

    Args:
        texts: for each group, the embeddings of the captions ``[images, embedding]`` in the order of the images.
        temperature: of the similarities.
    """

    def objective(embeddings: Tensor, group: int) -> Tensor:
        text = F.normalize(texts[group].float().to(embeddings.device), dim=-1)
        logits = F.normalize(embeddings.float(), dim=-1) @ text.T / temperature
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return objective


def gate_scores(
    adapter: TowerAdapter, groups: Sequence[Group], objective: Objective | None = None
) -> dict[str, Tensor]:
    """Return the first-order importance of every hidden neuron (equations 1 to 4): ``mean_images |Σ_tokens h ∂E/∂h|``.

    The sum over the tokens is the gradient at a gate of ones on the hidden activations, so that no activations are
    stored for it. The gradient of the objective at the embeddings is computed first, without a graph of the tower. A
    group therefore need not fit into memory with its graph.

    Args:
        adapter: the dense tower. It is unchanged.
        groups: calibration images. Under torch.distributed, the same in every process.
        objective: Default: :func:`entropy`.

    Returns:
        By site name, float64 ``[hidden]``. Higher scores are kept first.

    Raises:
        DgmrError: the objective is not finite on these images.
    """
    consumers = {site.name: cast(nn.Linear, adapter.tower.get_submodule(site.consumer)) for site in adapter.sites}
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in consumers.items()}
    images = 0
    with evaluating(adapter.tower), _frozen(adapter.tower), torch.enable_grad():
        for batch, embedding_gradient, scale in _embedding_gradients(adapter, groups, objective or entropy()):
            with gate_inputs(*consumers.values()) as gates, adapter.autocast():
                embeddings = adapter.embed(last_state(adapter, batch))
            gate_list = [gates[layer] for layer in consumers.values()]
            gradients = torch.autograd.grad(embeddings, gate_list, embedding_gradient.to(embeddings))
            for name, gradient in zip(consumers, gradients, strict=True):
                sums[name] += gradient.flatten(1).double().abs().sum(0).cpu() / scale
            images += len(batch)
    total = all_reduce_sum(torch.tensor(float(images)))
    return {name: all_reduce_sum(summed) / total for name, summed in sums.items()}


@contextmanager
def weight_gradients(
    adapter: TowerAdapter, groups: Sequence[Group], objective: Objective | None = None
) -> Iterator[None]:
    """Set ``.grad`` of the MLPs' parameters to the gradient of the objective, for torch-pruning's Taylor criterion.

    The context restores gradients and ``requires_grad`` at the end. The arguments are those of :func:`gate_scores`.
    """
    parameters = [p for site in adapter.sites for p in adapter.tower.get_submodule(site.name).parameters()]
    before = [(p, p.grad, p.requires_grad) for p in adapter.tower.parameters()]
    try:
        adapter.tower.requires_grad_(False)
        with evaluating(adapter.tower), torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
                parameter.grad = None
            for batch, embedding_gradient, scale in _embedding_gradients(adapter, groups, objective or entropy()):
                with adapter.autocast():
                    embeddings = adapter.embed(last_state(adapter, batch))
                embeddings.backward((embedding_gradient / scale).to(embeddings))
        for parameter in parameters:  # a process without a group takes part in the sum
            parameter.grad = all_reduce_sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        yield
    finally:
        for parameter, gradient, flag in before:
            parameter.grad = gradient
            parameter.requires_grad_(flag)


@dataclass
class SearchState:
    """Progress of a search for widths. An interrupted search resumes from it."""

    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Kept neurons of each finished site, ascending, by site name. The last block comes first."""
    baseline: float | None = None
    """Objective of the tower with the finished sites pruned."""
    image_blocks: int = 0
    """Number of images times blocks evaluated so far."""


@torch.no_grad()
def search_widths(
    adapter: TowerAdapter,
    scores: Mapping[str, Tensor],
    groups: Sequence[Group],
    *,
    threshold: float,
    two_sided: bool = False,
    objective: Objective | None = None,
    trials: int = MAX_TRIALS,
    state: SearchState | None = None,
    remember: Callable[[SearchState], None] = lambda state: None,
) -> SearchState:
    """Search, for each site, the smallest width that raises the objective by at most ``threshold`` (AMP's Algorithm 1).

    Sites are searched from the last block to the first. Each trial keeps the best ``(low + high) // 2`` neurons. If
    ``E − E₀ ≤ threshold``, the upper end of the interval moves to the trial, else the lower end. The test is signed: a
    lower objective always passes. The accepted width stays for the trials of earlier blocks, and its objective is their
    ``E₀``. The thresholds therefore add up over the sites.

    Args:
        adapter: the dense tower. Its MLPs are replaced in place by pruned copies.
        scores: by site name, ``[hidden]``, from :func:`gate_scores` or elsewhere.
        groups: search images, distinct from those that evaluate the result. The same in every process.
        threshold: maximum ``E − E₀``, in the unit of the objective.
        two_sided: test ``|E − E₀|`` instead. If pruning makes embeddings alike, the entropy falls, and the paper's
            signed test accepts every width.
        objective: Default: :func:`entropy`.
        trials: maximum number of trials per site.
        state: state of an interrupted search with the same arguments.
        remember: called with the state after each site.

    Returns:
        The final state. A site without an accepted trial keeps all neurons.

    Raises:
        DgmrError: the objective is not finite on these images.
    """
    objective = objective or entropy()
    state = state or SearchState()
    blocks, sites = adapter.blocks(), adapter.sites

    def passes(change: float) -> bool:
        return (abs(change) if two_sided else change) <= threshold

    with evaluating(adapter.tower):
        for site in sites:
            if site.name in state.kept:
                mlp = _pruned_copy(adapter.tower.get_submodule(site.name), site, state.kept[site.name])
                adapter.tower.set_submodule(site.name, mlp)
        if state.baseline is None:
            state.baseline = _evaluate(adapter, _states_before(adapter, groups, 0, state), 0, objective, state)
        states: list[tuple[int, list[Tensor]]]
        for depth in reversed(range(len(blocks))):
            block_sites = [
                site for site in sites if site.name.startswith(f"{blocks[depth].name}.") and site.name not in state.kept
            ]
            states = []  # free the states of the block after this one first
            states = _states_before(adapter, groups, depth, state) if block_sites else []
            for site in reversed(block_sites):
                order = scores[site.name].argsort(descending=True, stable=True).tolist()
                # No variable for the partial: it would keep the states alive while the next ones are computed.
                _search_site(
                    adapter,
                    site,
                    order,
                    partial(_evaluate, adapter, states, depth, objective, state),
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
    evaluate: Callable[[], float],
    passes: Callable[[float], bool],
    trials: int,
    state: SearchState,
) -> None:
    """Search the width of one site and record it in ``state``. ``order`` is the site's neurons, best first."""
    dense_mlp = adapter.tower.get_submodule(site.name)
    low, high, accepted, baseline = 0, site.hidden, dense_mlp, cast(float, state.baseline)
    for _ in range(trials):
        middle = (low + high) // 2
        if middle == low:
            break
        trial = _pruned_copy(dense_mlp, site, tuple(sorted(order[:middle])))
        adapter.tower.set_submodule(site.name, trial)
        value = evaluate()
        if passes(value - baseline):
            high, accepted, state.baseline = middle, trial, value
        else:
            low = middle
    adapter.tower.set_submodule(site.name, accepted)
    state.kept[site.name] = tuple(sorted(order[:high]))


def _pruned_copy(mlp: nn.Module, site: Site, kept: tuple[int, ...]) -> nn.Module:
    """Return a copy of the MLP of ``site`` with the neurons ``kept``."""
    mlp = copy.deepcopy(mlp)
    local_site = site.relative_to(site.name)
    cut_sites(mlp, [local_site], {local_site.name: kept})
    return mlp


def _states_before(
    adapter: TowerAdapter, groups: Sequence[Group], depth: int, state: SearchState
) -> list[tuple[int, list[Tensor]]]:
    """Return the states before block ``depth`` of this process's groups, each with the index of its group."""
    blocks = adapter.blocks()[:depth]
    with adapter.autocast():
        states = [
            (index, [run_blocks(blocks, adapter.stem(batch)) for batch in group]) for index, group in own_share(groups)
        ]
    state.image_blocks += depth * sum(len(batch) for group in groups for batch in group)
    return states


def _evaluate(
    adapter: TowerAdapter,
    states: list[tuple[int, list[Tensor]]],
    depth: int,
    objective: Objective,
    state: SearchState,
) -> float:
    """Return the objective from states before block ``depth``, averaged over the groups of all processes."""
    blocks = adapter.blocks()
    totals = torch.zeros(3, dtype=torch.float64)  # sum of the objective, groups, images
    for index, batches in states:
        with adapter.autocast():
            embeddings = torch.cat([adapter.embed(run_blocks(blocks[depth:], tokens)) for tokens in batches])
        totals += torch.tensor([float(objective(embeddings, index)), 1, len(embeddings)], dtype=torch.float64)
    totals = all_reduce_sum(totals)
    state.image_blocks += int(totals[2]) * (len(blocks) - depth)
    value = float(totals[0] / totals[1])
    if not isfinite(value):
        raise DgmrError(NON_FINITE_ERROR)
    return value


def _embedding_gradients(
    adapter: TowerAdapter, groups: Sequence[Group], objective: Objective
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield the images of this process's groups with the gradient of the objective at their embeddings.

    At most :data:`GRADIENT_BATCH` images are yielded at a time, because their graph spans all blocks. The gradient is
    multiplied by a power of two, the third value, so that half precision can represent it.
    """
    for index, group in own_share(groups):
        with torch.no_grad(), adapter.autocast():
            embeddings = torch.cat([adapter.embed(last_state(adapter, batch)) for batch in group])
        embeddings = embeddings.float().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(embeddings, index), embeddings)
        largest = float(gradient.abs().max())
        if not isfinite(largest):
            raise DgmrError(NON_FINITE_ERROR)
        scale = 2.0 ** round(-log2(largest or 1.0))
        gradients = (gradient * scale).split([len(batch) for batch in group])
        for images, image_gradients in zip(group, gradients, strict=True):
            pairs = zip(images.split(GRADIENT_BATCH), image_gradients.split(GRADIENT_BATCH), strict=True)
            yield from ((*pair, scale) for pair in pairs)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of all parameters to False. The context restores the flags at the end."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
