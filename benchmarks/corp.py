"""CORP's pruning of MLPs, for the comparison in ``methods.py`` (arXiv 2602.05243, its part on MLPs).

Written from the paper's formulas. For the hidden activations ``x`` of an MLP on all tokens of the calibration images:

- *Selection*: keep the neurons with the largest active energy, ``E[x²] · P(|x| > 0.01 · rms)``. The root
  mean square is that of all activations of the MLP in a batch.
- *Compensation*: predict the removed activations from the kept ones, ``x_P ≈ B x_S + c`` with
  ``B = Σ_PS (Σ_SS + λ I)⁻¹`` and ``c = μ_P − B μ_S``. Folded into the last Linear: ``W' = W_S + W_P B`` and
  ``b' = b + W_P c``.
- *Ridge*: ``λ = ρ · tr(Σ_SS) / p``, at least 1e-3, where ``ρ`` is the intensity of oracle approximating shrinkage.

All activations are those of the dense tower, so that errors of earlier blocks are not corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgmr_tp import prune
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.pruning import Plan, SitePlan, last_state
from dgmr_tp.pruning.calibration import record_inputs

ACTIVE_THRESHOLD = 0.01
MIN_RIDGE = 1e-3


@dataclass
class Activations:
    """Statistics of the hidden activations of one MLP, float64."""

    count: int
    """Number of tokens."""
    mean: Tensor
    """``[hidden]``."""
    covariance: Tensor
    """``[hidden, hidden]``."""
    active_energy: Tensor
    """Score of each neuron, ``[hidden]``."""


@torch.no_grad()
def collect(model: OpenedModel, batches: list[Tensor]) -> dict[str, Activations]:
    """Return the statistics of every MLP of the dense model, by site name."""
    consumers = {site.name: model.tower.get_submodule(site.consumer) for site in model.sites}
    sums: dict[str, list[Tensor]] = {}
    count = 0
    for batch in batches:
        with record_inputs(*consumers.values()) as inputs:
            last_state(model.adapter, batch)
        for name, layer in consumers.items():
            hidden = inputs[layer].flatten(0, -2).double()
            count += len(hidden) if layer is next(iter(consumers.values())) else 0
            is_active = hidden.abs() > ACTIVE_THRESHOLD * hidden.square().mean().sqrt()
            terms = [hidden.sum(0), hidden.T @ hidden, is_active.double().sum(0)]
            sums[name] = [a + b for a, b in zip(sums[name], terms, strict=True)] if name in sums else terms
    return {name: activations(count, *parts) for name, parts in sums.items()}


def activations(count: int, total: Tensor, gram: Tensor, num_active: Tensor) -> Activations:
    """Return the statistics from sums over ``count`` tokens."""
    mean = total / count
    active_energy = gram.diagonal() / count * num_active / count
    return Activations(count, mean, gram / count - torch.outer(mean, mean), active_energy)


def make_plan(model: OpenedModel, statistics: Mapping[str, Activations], keep: Mapping[str, int]) -> Plan:
    """Return the plan that keeps the neurons with the largest active energy."""
    sites = {}
    for site in model.sites:
        kept = sorted(statistics[site.name].active_energy.topk(keep[site.name]).indices.tolist())
        sites[site.name] = SitePlan(site.width, site.hidden, tuple(kept), model.weight_hashes[site.name])
    return Plan(model.name, "corp", sites)


def shrinkage_ridge(covariance: Tensor, count: int) -> float:
    """Return λ by oracle approximating shrinkage (Chen et al. 2010, equation 23)."""
    size = len(covariance)
    trace, trace_of_square = float(covariance.trace()), float(covariance.square().sum())
    numerator = (1 - 2 / size) * trace_of_square + trace**2
    denominator = (count + 1 - 2 / size) * (trace_of_square - trace**2 / size)
    intensity = min(1.0, numerator / denominator) if denominator > 0 else 1.0
    return max(MIN_RIDGE, intensity * trace / size)


def compensate(layer: nn.Linear, kept: list[int], statistics: Activations) -> tuple[Tensor, Tensor]:
    """Return weight ``[width, kept]`` and bias ``[width]`` of the last Linear with the compensation folded in.

    Args:
        layer: last Linear of the dense MLP.
        kept: indices of the kept neurons.
        statistics: of the MLP.
    """
    removed = sorted(set(range(layer.in_features)) - set(kept))
    covariance, mean = statistics.covariance, statistics.mean
    within = covariance[kept][:, kept]
    ridge = shrinkage_ridge(within, statistics.count) * torch.eye(len(kept)).to(within)
    prediction = torch.linalg.solve(within + ridge, covariance[kept][:, removed]).T
    offset = mean[removed] - prediction @ mean[kept]
    weight = layer.weight.double()
    return weight[:, kept] + weight[:, removed] @ prediction, layer.bias.double() + weight[:, removed] @ offset


@torch.no_grad()
def compensated(model: OpenedModel, plan: Plan, statistics: Mapping[str, Activations]) -> nn.Module:
    """Return a copy of the tower, pruned by ``plan`` and compensated."""
    tower = prune(model.tower, plan=plan).model
    for site in model.sites:
        weight, bias = compensate(
            model.tower.get_submodule(site.consumer), list(plan.sites[site.name].kept), statistics[site.name]
        )
        layer = tower.get_submodule(site.consumer)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return tower
