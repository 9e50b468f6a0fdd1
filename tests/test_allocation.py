"""Keep counts: exact integers, multiples, and budgets that are met and not wasted."""

import copy
import itertools
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from compress import block_sites, make_plan, rank
from conftest import pictures, redraw, timm_tower
from families import FAMILIES, FORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.pruning import ImageEncoder, MLPPruner, Site, find_sites
from dgmr_tp.pruning.allocation import fitted_widths, keep_counts
from dgmr_tp.pruning.cost import Cost, flop_cost, flops, parameter_cost, parameters
from dgmr_tp.pruning.latency import relative_time, widths_for_latency
from dgmr_tp.pruning.pruner import resize


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
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 9)), min_size=1, max_size=5),
    st.floats(0.05, 1),
    st.sampled_from([1, 8]),
)
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
    """Count a real forward pass. Attention runs unfused, because the counter does not know every fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ImageEncoder(opened.adapter)(pictures(1).requires_grad_(True))
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (32, 32)])
def test_flops_of_a_tower_are_those_of_its_images(size):
    tower = timm_tower(img_size=size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, *size).requires_grad_(True))
    assert flops(tower, size) == flop_cost(tower, find_sites(tower), size).total == counter.get_total_flops()


def test_costs_per_neuron_are_what_pruning_saves(model):
    sites, tower = block_sites(model), model.tower
    size, work = parameter_cost(tower, sites), flop_cost(tower, sites, 32)
    assert work.total == flops(tower, 32) == measured_flops(model)
    keep = {s.name: s.hidden // 3 + i for i, s in enumerate(sites)}
    pruned, _, _ = prune(model, keep=keep)
    cut = {s.name: s.hidden - keep[s.name] for s in sites}
    assert parameters(pruned.tower) == size.total - sum(size.neuron[name] * cut[name] for name in cut)
    assert measured_flops(pruned) == work.total - sum(work.neuron[name] * cut[name] for name in cut)


@pytest.mark.parametrize("budget", [{"params": 0.7}, {"flops": 0.75}, {"params": 0.9, "flops": 0.8}])
def test_a_tower_pruned_to_a_budget_costs_that_much(model, budget):
    pruned, _, _ = prune(model, budget=budget)
    before, after = model.tower, pruned.tower
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
        ({"budget": {"watts": 0.5}}, r"unknown budget 'watts'\. Use one of params"),
        ({"budget": {"flops": 0.5}}, r"unknown budget 'flops'"),  # a bare tower has no image size
        ({"budget": {"params": -1}}, r"budget params = -1"),
        ({"keep": 100, "round_to": 64}, r"keep = 100 .* not a multiple of round_to = 64"),
        ({"mlp_ratio": 1, "round_to": 0}, r"round_to = 0"),
        ({"mlp_ratio": 1, "budget": {"params": 0.5}}, r"exactly one"),
    ],
)
def test_impossible_amounts_are_refused(amount, says):
    with pytest.raises(DgmrError, match=says):
        make_plan(redraw(timm_tower()), **amount)


def test_costs_are_counted_without_memory_or_a_change():
    """A tower on the meta device has the same count as one with weights. Mode and weights do not change."""
    tower = redraw(timm_tower()).train()
    before = [parameter.clone() for parameter in tower.parameters()]
    with torch.device("meta"):
        shadow = timm_tower()
    assert flops(tower, 32) == flops(shadow, 32) > 0
    assert tower.training and all(torch.equal(a, b) for a, b in zip(before, tower.parameters(), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 3), st.floats(0.2, 0.9), st.booleans())
def test_fitted_widths_lose_least_of_all_that_fit(seed, count, share, two_limits):
    """Compared with all combinations of widths, on convex curves.

    The result is the optimum if all neurons have the same cost, and else within one neuron per limit of it.
    """
    rng = np.random.default_rng(seed)
    sites = [site(str(i), int(rng.integers(4, 10))) for i in range(count)]
    loss = {
        s.name: rng.uniform(0.1, 5) * np.append(np.sort(rng.uniform(0, 1, s.hidden)).cumsum()[::-1], 0) for s in sites
    }
    same = bool(rng.integers(2)) and not two_limits
    price = {s.name: 1 if same else int(rng.integers(1, 4)) for s in sites}
    costs = {"params": Cost(10 + sum(s.hidden * price[s.name] for s in sites), price)}
    budget = {"params": share}
    if two_limits:
        other = {s.name: int(rng.integers(1, 4)) for s in sites}
        costs["flops"], budget["flops"] = (
            Cost(5 + sum(s.hidden * other[s.name] for s in sites), other),
            float(rng.uniform(0.3, 0.9)),
        )

    def fits(kept):
        cut = {s.name: s.hidden - k for s, k in zip(sites, kept, strict=True)}
        return all(costs[key].without(cut) <= Fraction(str(part)) * costs[key].total for key, part in budget.items())

    def lost(kept):
        return sum(loss[s.name][k] for s, k in zip(sites, kept, strict=True))

    everything = list(itertools.product(*(range(1, s.hidden + 1) for s in sites)))
    if not any(map(fits, everything)):
        with pytest.raises(DgmrError, match="cannot be met"):
            fitted_widths(sites, loss, budget=budget, costs=costs)
        return
    kept = tuple(fitted_widths(sites, loss, budget=budget, costs=costs).values())
    assert fits(kept)
    best = min(lost(k) for k in everything if fits(k))
    one_neuron = max(max(loss[s.name][:-1] - loss[s.name][1:]) for s in sites)
    assert lost(kept) <= best + (0 if same else len(budget) * one_neuron) + 1e-9
    lost_by = {s.name: [loss[s.name][k - 1] - loss[s.name][k] for k in range(1, s.hidden + 1)] for s in sites}
    assert all(np.diff(gains).max() <= 1e-9 for gains in lost_by.values())  # the curves are convex


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 8, 64]), st.floats(0.05, 1))
def test_fitted_widths_are_multiples_whatever_the_widths_and_the_curves(seed, round_to, share):
    rng = np.random.default_rng(seed)
    sites = [site(str(i), int(rng.integers(2, 700))) for i in range(4)]
    loss = {s.name: np.sort(rng.exponential(size=s.hidden + 1) ** 3)[::-1] for s in sites}
    costs = {"params": Cost(sum(s.hidden for s in sites), {s.name: 1 for s in sites})}
    try:
        kept = fitted_widths(sites, loss, budget={"params": share}, costs=costs, round_to=round_to)
    except DgmrError:
        return
    assert sum(kept.values()) <= share * costs["params"].total
    assert all(kept[s.name] % round_to == 0 or kept[s.name] == s.hidden for s in sites)
    assert all(kept[s.name] >= min(s.hidden, max(round_to, s.hidden / 64 // round_to * round_to)) for s in sites)


def test_fitted_widths_respect_multiples_the_floor_and_curves_with_bumps():
    sites = [site("a", 640), site("b", 640), site("c", 640)]
    flat, steep = np.linspace(1, 0, 641), np.geomspace(1000, 0.001, 641)
    bumpy = np.maximum(steep / 10, (np.arange(641) < 300) * 5.0)
    costs = {"params": Cost(1920, {"a": 1, "b": 1, "c": 1})}
    for round_to in (1, 8, 64):
        kept = fitted_widths(
            sites, {"a": flat, "b": steep, "c": bumpy}, budget={"params": 0.5}, costs=costs, round_to=round_to
        )
        assert all(count % round_to == 0 for count in kept.values()) and 960 - 2 * round_to < sum(kept.values()) <= 960
        assert kept["a"] < kept["b"] and kept["a"] >= max(10, round_to) and kept["c"] >= 300
    assert (
        fitted_widths(sites, {"a": flat * 0, "b": steep, "c": flat * 0}, budget={"params": 0.4}, costs=costs)["a"] == 10
    )
    with pytest.raises(
        DgmrError, match=r"budget params = 0.01 cannot be met: with the fewest neurons the tower still costs 30"
    ):
        fitted_widths(sites, {"a": flat, "b": flat, "c": flat}, budget={"params": 0.01}, costs=costs)
    with pytest.raises(DgmrError, match=r"unknown budget 'watts'"):
        fitted_widths(sites, {"a": flat, "b": flat, "c": flat}, budget={"watts": 0.5}, costs=costs)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_budget_of_latency_is_met_by_the_clock_even_where_flops_mislead(share):
    """The simulated time has a constant, is lower at multiples of 8, and is three times the FLOPs for one MLP."""
    tower = redraw(timm_tower())
    sites = find_sites(tower)
    rankings = rank(tower, "output", [pictures(40)])
    loss = {name: (ranking.sensitivity * ranking.error).numpy() for name, ranking in rankings.sites.items()}
    slowness = {site.name: 3 if index == 1 else 1 for index, site in enumerate(sites)}
    total = sum(192 * slowness[site.name] for site in sites)
    calls = []

    def clock(counts):
        calls.append(dict(counts))
        return (
            0.2
            + 0.8
            * sum(slowness[name] * (count if count % 8 == 0 else count * 1.1) for name, count in counts.items())
            / total
        )

    def fit(cost):
        return fitted_widths(sites, loss, budget={"latency": share}, costs={"latency": cost}, round_to=4)

    counts = widths_for_latency(share, fit, tower, sites, 32, round_to=4, time_of=clock)
    assert 0.9 * share < clock(counts) <= share
    assert len(calls) <= 8 and all(count % 4 == 0 for count in counts.values())
    with pytest.raises(
        DgmrError, match=r"budget latency = 0.1 cannot be met: with the fewest neurons the tower still takes 0.2"
    ):
        widths_for_latency(0.1, fit, tower, sites, 32, time_of=clock)
    for wrong in (0, 1, 3.5):
        with pytest.raises(DgmrError, match="share of the dense tower's time"):
            widths_for_latency(wrong, fit, tower, sites, 32)


def test_the_clock_runs_a_tower_of_these_widths_and_leaves_the_original_alone(monkeypatch):
    tower = redraw(timm_tower()).train()
    before = copy.deepcopy(tower.state_dict())
    towers = []
    monkeypatch.setattr(
        "dgmr_tp.pruning.latency.resize", lambda narrow, counts: (resize(narrow, counts), towers.append(narrow))
    )
    counts = {site.name: 16 * (index + 1) for index, site in enumerate(find_sites(tower))}
    assert 0 < relative_time(tower, counts, 32) < 10
    assert {site.name: site.hidden for site in find_sites(towers[0])} == counts
    assert (
        not any(parameter.is_meta for parameter in towers[0].parameters())
        and torch.isfinite(towers[0](pictures(2))).all()
    )
    assert tower.training and all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    with torch.device("meta"):
        shadow = timm_tower()
    with pytest.raises(DgmrError, match="opened without weights"):
        widths_for_latency(0.5, lambda cost: counts, shadow, find_sites(shadow), 32)


@pytest.mark.parametrize("amount", [{"keep": 2.5}, {"keep": True}, {"keep": {"*": 2.5}}, {"keep": 2, "round_to": 1.5}])
def test_counts_that_are_not_integers_are_refused(amount):
    with pytest.raises(DgmrError, match="integer"):
        keep_counts([Site("a", ("a.fc1",), "a.fc2", 8, 32, False, True)], **amount)
