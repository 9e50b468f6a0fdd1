"""Keep counts: exact integers, multiples, and budgets that are met and used."""

from fractions import Fraction
from math import floor

import pytest
import torch
from conftest import pictures, redraw, timm_tower
from families import FAMILIES, FORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.oneshot import block_sites, make_plan
from dgmr_tp.pruning import MLPPruner, Site, Tower
from dgmr_tp.pruning.allocation import keep_counts
from dgmr_tp.pruning.cost import Cost, flop_cost, flops, parameter_cost, parameters


def site(name, hidden, width=64):
    return Site(name, (f"{name}.fc1",), f"{name}.fc2", width, hidden, False, True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30000), st.integers(1, 30000), st.sampled_from([1, 2, 8, 64, 128]))
def test_round_to_gives_the_largest_multiple_and_never_zero(hidden, keep, round_to):
    keep = min(keep, hidden)
    [count] = keep_counts([site("a", hidden, width=keep)], mlp_ratio=1, round_to=round_to).values()
    if keep == hidden or hidden < round_to:
        assert count == hidden
    else:
        assert count % round_to == 0 and 0 < count <= hidden
        assert count == max(round_to, floor(keep / round_to) * round_to)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 9)), min_size=1, max_size=5), st.floats(0.05, 1), st.sampled_from([1, 8]))
def test_a_budget_is_met_and_the_next_larger_share_would_break_it(layers, share, round_to):
    sites = [site(str(i), hidden) for i, (hidden, _) in enumerate(layers)]
    neuron = {str(i): cost for i, (_, cost) in enumerate(layers)}
    total = 10 + sum(hidden * cost for hidden, cost in layers)
    costs = {"params": Cost(total, neuron)}

    def spent(counts):
        return total - sum((s.hidden - counts[s.name]) * neuron[s.name] for s in sites)

    try:
        counts = keep_counts(sites, budget={"params": share}, round_to=round_to, costs=costs)
    except DgmrError:
        smallest = {s.name: s.hidden if s.hidden == 1 else min(s.hidden, round_to) for s in sites}
        assert spent(smallest) > Fraction(str(share)) * total
        return
    limit = Fraction(str(share)) * total
    assert spent(counts) <= limit
    widest = max(s.hidden for s in sites)
    if round_to == 1 and counts != {s.name: s.hidden for s in sites}:
        steps = [{s.name: max(1, s.hidden * step // widest) for s in sites} for step in range(widest + 1)]
        assert counts in steps
        larger = next(step for step in steps[steps.index(counts) :] if step != counts)
        assert spent(larger) > limit


@pytest.fixture(scope="module", params=FORMS)
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "model"
    FAMILIES[request.param](directory)
    opened = open_model(str(directory))
    opened.module.eval()
    return opened


def measured_flops(opened):
    """Counted in a real forward pass."""
    with FlopCounterMode(display=False) as counter:
        Tower(opened.encoder)(pictures(1).requires_grad_(True))
    return counter.get_total_flops()


def test_costs_per_neuron_are_what_pruning_saves(model):
    sites, tower = block_sites(model), model.encoder.module
    size, work = parameter_cost(tower, sites), flop_cost(tower, sites, 32)
    assert work.total == flops(tower, 32) == measured_flops(model)
    keep = {s.name: s.hidden // 3 + i for i, s in enumerate(sites)}
    pruned, _, _ = prune(model, keep=keep)
    cut = {s.name: s.hidden - keep[s.name] for s in sites}
    assert parameters(pruned.encoder.module) == size.total - sum(size.neuron[name] * cut[name] for name in cut)
    assert measured_flops(pruned) == work.total - sum(work.neuron[name] * cut[name] for name in cut)


@pytest.mark.parametrize("budget", [{"params": 0.7}, {"flops": 0.75}, {"params": 0.9, "flops": 0.8}])
def test_a_tower_pruned_to_a_budget_costs_that_much(model, budget):
    pruned, _, _ = prune(model, budget=budget)
    before, after = model.encoder.module, pruned.encoder.module
    shares = {"params": parameters(after) / parameters(before), "flops": measured_flops(pruned) / measured_flops(model)}
    assert all(shares[key] <= share for key, share in budget.items())
    assert any(shares[key] > share - 0.01 for key, share in budget.items())


def test_a_budget_may_be_a_number():
    tower = redraw(timm_tower())
    pruner = MLPPruner(tower, budget={"params": 70_000})
    pruner.apply(pruner.plan())
    assert 69_000 < parameters(tower) <= 70_000


@pytest.mark.parametrize(
    ("amount", "says"),
    [
        ({"budget": {"params": 0.001}}, r"budget params = 0\.001 cannot be met.*still costs"),
        ({"budget": {"watts": 0.5}}, r"unknown budget 'watts'; known here: params"),
        ({"budget": {"flops": 0.5}}, r"unknown budget 'flops'"),  # a bare module has no image size
        ({"budget": {"params": -1}}, r"budget params = -1"),
        ({"keep": 100, "round_to": 64}, r"keep = 100 .* no multiple of round_to = 64"),
        ({"mlp_ratio": 1, "round_to": 0}, r"round_to = 0"),
        ({"mlp_ratio": 1, "budget": {"params": 0.5}}, r"exactly one"),
    ],
)
def test_impossible_amounts_are_refused(amount, says):
    with pytest.raises(DgmrError, match=says):
        make_plan(redraw(timm_tower()), **amount)


def test_costs_are_counted_without_memory_or_a_change():
    """A model on the meta device is counted as one with weights is; mode and weights stay."""
    tower = redraw(timm_tower()).train()
    before = [parameter.clone() for parameter in tower.parameters()]
    with torch.device("meta"):
        shadow = timm_tower()
    assert flops(tower, 32) == flops(shadow, 32) > 0
    assert tower.training and all(torch.equal(a, b) for a, b in zip(before, tower.parameters(), strict=True))
