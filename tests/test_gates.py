"""Gated MLPs in every notation: a neuron is a gate row and a value row, which are pruned together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import redraw
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from torch import nn

from dgmr_tp import DgmrError, MLPPruner
from dgmr_tp.compression.criteria import CRITERIA, names_needing
from dgmr_tp.pruning import find_sites
from dgmr_tp.pruning.selection import select_diverse_rows

WIDTH, HIDDEN, KEEP = 16, 24, 13


class W12(nn.Module):
    """SwiGLU of DINOv2's repository."""

    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Functional(W12):
    """SwiGLU like xformers': the operator reads the weights, and the Linears are not called."""

    def forward(self, x):
        gate, value = F.linear(x, self.w12.weight, self.w12.bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, self.w3.weight, self.w3.bias)


class FunctionalSplit(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        hidden = F.silu(F.linear(x, self.w1.weight, self.w1.bias)) * F.linear(x, self.w2.weight, self.w2.bias)
        return F.linear(hidden, self.w3.weight, self.w3.bias)


class FGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.out = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.out(F.glu(self.both(x), dim=-1))


class Interleaved(FGlu):
    def forward(self, x):
        gate, value = self.both(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.out(F.silu(gate) * value)


class LlamaNamed(nn.Module):
    """SwiGLU whose last layer is ``w2`` instead of ``w3``."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


GATES = {
    "Llama's names": LlamaNamed,
    "packed": lambda: SwiGLUPacked(WIDTH, 2 * HIDDEN),
    "packed, gate last": lambda: GluMlp(WIDTH, 2 * HIDDEN),
    "packed, normed": lambda: GluMlp(WIDTH, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "split": lambda: SwiGLU(WIDTH, HIDDEN),
    "split, normed": lambda: SwiGLU(WIDTH, HIDDEN, norm_layer=nn.LayerNorm),
    "split, RMS-normed": lambda: SwiGLU(WIDTH, HIDDEN, norm_layer=RmsNorm),
    "w12": W12,
    "w12, functional": Functional,
    "w1 and w2, functional": FunctionalSplit,
}


@pytest.fixture(params=GATES)
def model(request):
    return redraw(nn.ModuleDict({"mlp": GATES[request.param]()}))


def rows_of(model, site):
    """Return the concatenated gate and value row of each neuron."""
    weights = [model.get_submodule(path).weight.detach() for path in site.producers]
    return torch.cat(weights if len(weights) == 2 else weights[0].chunk(2), dim=1)


def test_the_site_is_one_neuron_for_two_rows(model):
    [site] = find_sites(model)
    assert (site.name, site.width, site.hidden) == ("mlp", WIDTH, HIDDEN)
    assert site.fused == (len(site.producers) == 1)
    assert site.exact == (not any(isinstance(child, nn.LayerNorm | RmsNorm) for child in model.modules()))


def test_dgmr_judges_the_pair_and_both_halves_keep_the_same_neurons(model):
    [site] = find_sites(model)
    pruned = copy.deepcopy(model)
    pruner = MLPPruner(pruned, keep=KEEP)
    plan = pruner.plan()
    expected = sorted(select_diverse_rows(rows_of(model, site).numpy()).order[:KEEP].tolist())
    assert list(plan.sites["mlp"].kept) == expected
    pruner.apply(plan)
    assert torch.equal(rows_of(pruned, site), rows_of(model, site)[expected])
    assert not torch.equal(rows_of(pruned, site), rows_of(model, site)[:KEEP])


@pytest.mark.parametrize("criterion", names_needing("weights"))
def test_the_pruned_gate_computes_what_the_kept_neurons_compute(model, criterion):
    [site] = find_sites(model)
    pruned = copy.deepcopy(model)
    pruner = MLPPruner(pruned, CRITERIA[criterion].importance(), keep=KEEP)
    pruner.apply(plan := pruner.plan())
    tokens = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    got = pruned["mlp"](tokens)
    assert got.shape == (5, WIDTH) and torch.isfinite(got).all()
    if site.exact:
        kept = torch.zeros(HIDDEN, dtype=torch.bool)
        kept[list(plan.sites["mlp"].kept)] = True
        consumer = model.get_submodule(site.consumer)
        consumer.weight.data[:, ~kept] = 0
        assert torch.allclose(got, model["mlp"](tokens), atol=1e-6)
        consumer.weight.data[:, kept.nonzero()[0]] = 0
        assert not torch.allclose(got, model["mlp"](tokens), atol=1e-6)


@pytest.mark.parametrize("spelling", [FGlu, Interleaved])
def test_a_spelling_that_torch_pruning_misreads_is_refused_with_the_way_out(spelling):
    with pytest.raises(DgmrError, match=r"makes gate and value in one Linear.*chunk"):
        MLPPruner(redraw(nn.ModuleDict({"mlp": spelling()})), keep=KEEP)
