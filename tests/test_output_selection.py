"""Selection on calibration images, against least squares per candidate, LAPACK, and the tower's own activations."""

import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
from compress import block_sites, make_plan, opened, rank
from conftest import call_command, pictures, redraw, timm_tower, write_recipe
from families import FAMILIES, FORMS, plain_output
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import lapack
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.cli import app
from dgmr_tp.compression.rankings import Rankings
from dgmr_tp.compression.streaming import prune_streaming
from dgmr_tp.encoders import adapt
from dgmr_tp.pruning import MLPPruner, PrecomputedScores, find_sites, last_state, output_selection, rank_tower
from dgmr_tp.pruning.calibration import sample_tokens, token_weights
from dgmr_tp.pruning.cost import parameters
from dgmr_tp.pruning.output_selection import SELECTION_RULES, _Greedy, rank_neurons


def problem(seed, neurons=8, tokens=60, width=4):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, neurons)) @ rng.standard_normal((neurons, neurons))
    return hidden, rng.standard_normal((width, neurons))


def best_fit_error(hidden, weight, kept):
    """Return the squared error of the output after the best least-squares fit from the neurons ``kept``."""
    output = hidden @ weight.T
    if not kept:
        return float((output**2).sum())
    fitted = np.linalg.lstsq(hidden[:, kept], output, rcond=None)[0]
    return float(((output - hidden[:, kept] @ fitted) ** 2).sum())


def ranked(hidden, weight, **options):
    gram = torch.from_numpy(hidden.T @ hidden / len(hidden))
    return rank_neurons(gram, torch.from_numpy(weight), **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_every_pick_lowers_the_best_fits_error_most(seed):
    hidden, weight = problem(seed)
    ranking = ranked(hidden, weight)
    total, kept = best_fit_error(hidden, weight, []), []
    for step, pick in enumerate(ranking.order.tolist()):
        errors = {j: best_fit_error(hidden, weight, [*kept, j]) for j in range(hidden.shape[1]) if j not in kept}
        assert errors[pick] <= min(errors.values()) + 1e-7 * total
        kept.append(pick)
        assert ranking.error[step + 1] == pytest.approx(errors[pick] / total, abs=1e-8)
    assert ranking.error[0] == 1 and sorted(kept) == list(range(8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_by_activation_it_is_pivoted_cholesky(seed):
    hidden, weight = problem(seed)
    _, pivots, _, _ = lapack.dpstrf(np.asfortranarray(hidden.T @ hidden / len(hidden)), lower=1)
    assert ranked(hidden, weight, by="activation").order.tolist() == (pivots - 1).tolist()


def test_dead_and_duplicate_neurons_come_last():
    hidden, weight = problem(0)
    hidden[:, 3] = 0
    hidden[:, 5] = hidden[:, 6]
    for by in ("output", "activation"):
        order = ranked(hidden, weight, by=by).order.tolist()
        assert order[-1] == 3 and len({5, 6} & set(order[-2:])) == 1
        assert ranked(hidden, weight, by=by).error[6] < 1e-9


def test_the_first_picks_are_the_same_when_only_they_are_asked_for():
    hidden, weight = problem(1)
    full, part = ranked(hidden, weight), ranked(hidden, weight, picks=3)
    assert part.order[:3].tolist() == full.order[:3].tolist() and sorted(part.order.tolist()) == list(range(8))
    assert torch.equal(part.error[:4], full.error[:4]) and part.error[4] == part.error[3] > full.error[4]


@pytest.mark.parametrize("rule", SELECTION_RULES.values())
def test_no_pick_waits_for_the_device(rule):
    """A tensor without values raises an error where a program reads one. On a GPU that would be a wait."""
    with FakeTensorMode():
        gram, weight = torch.empty(90, 90, dtype=torch.float64), torch.empty(4, 90, dtype=torch.float64)
        with pytest.raises(DataDependentOutputException):
            float(gram.mean())
        chosen, reductions = _Greedy(gram, weight, rule).pick_block(64)
    assert chosen.shape == reductions.shape == (64,)


def test_the_gram_is_that_of_the_towers_own_activations(tower):
    """The reference for the first block uses its hidden activations on all tokens, weighted and centered."""
    adapter = adapt(tower)
    images = pictures(12)
    rankings = rank_tower(adapter, images.split(5))
    assert list(rankings) == [f"{block.name}.mlp" for block in adapter.blocks()]
    block = adapter.blocks()[0]
    recorded = {}
    [site] = find_sites(block.module)
    consumer = block.module.get_submodule(site.consumer)
    consumer.register_forward_pre_hook(lambda m, a: recorded.update(h=a[0]))
    with torch.no_grad():
        block(adapter.stem(images))
    hidden = recorded["h"].flatten(0, 1).double().numpy()
    weights = np.tile(np.array([0.5] + [0.5 / 16] * 16), 12)
    weights /= weights.sum()
    centered = hidden - weights @ hidden
    gram = torch.from_numpy(centered.T @ (centered * weights[:, None]))
    expected = rank_neurons(gram, consumer.weight.detach().double())
    got = rankings[f"{block.name}.mlp"]
    assert got.order[:30].tolist() == expected.order[:30].tolist()
    assert torch.allclose(got.error, expected.error, atol=1e-5)
    unweighted = torch.from_numpy(np.cov(hidden.T))
    assert rank_neurons(unweighted, consumer.weight.detach().double()).order[:30].tolist() != got.order[:30].tolist()


@pytest.mark.parametrize("family", FORMS)
def test_after_recovery_it_beats_selection_that_does_not_look(family, tmp_path):
    FAMILIES[family](tmp_path / "model")
    model = open_model(str(tmp_path / "model"))
    model.module.eval()
    calibration, new = pictures(200).split(50), pictures(40, seed=9)
    dense = plain_output(model.tower, new)
    left = {}
    for criterion in ("output", "random"):
        pruned, plan, table = prune(model, calibration, criterion=criterion, keep_ratio=0.15)
        assert plan.criterion.lower() == criterion
        left[criterion] = sum(row.recovered_error for row in table) / len(table)
        assert torch.isfinite(plain_output(pruned.tower, new) - dense).all()
    assert left["output"] < left["random"]


def test_it_works_in_a_stock_pruner():
    tower = redraw(timm_tower(init_values=None))
    rankings = rank_tower(adapt(tower), [pictures(40)])
    scores = {name: ranking.scores for name, ranking in rankings.items()}
    pruned = copy.deepcopy(tower)
    ignored = [
        m for name, m in pruned.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not name.endswith("mlp.fc1")
    ]
    pruner = tp.pruner.BasePruner(
        pruned,
        (pictures(1),),
        importance=PrecomputedScores(pruned, scores, "output"),
        pruning_ratio=1 - 48.5 / 192,
        ignored_layers=ignored,
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()
    for name, ranking in rankings.items():
        kept = sorted(ranking.order[:48].tolist())
        assert torch.equal(pruned.get_submodule(name).fc1.weight, tower.get_submodule(name).fc1.weight[kept])
    plan = MLPPruner(tower, PrecomputedScores(tower, scores, "output"), keep=48).plan()
    assert all(list(plan.sites[name].kept) == sorted(ranking.order[:48].tolist()) for name, ranking in rankings.items())


def test_more_picks_than_a_panel_change_nothing(monkeypatch):
    hidden, weight = problem(3, neurons=40, tokens=200)
    full = {by: ranked(hidden, weight, by=by) for by in ("output", "activation")}
    monkeypatch.setattr("dgmr_tp.pruning.output_selection.PIVOT_BLOCK", 7)
    for by, expected in full.items():
        got = ranked(hidden, weight, by=by)
        assert got.order.tolist() == expected.order.tolist() and torch.allclose(got.error, expected.error, atol=1e-12)


@pytest.mark.parametrize("family", FORMS)
def test_sensitivity_is_what_a_cut_of_one_mlp_does_to_the_embedding(family, tmp_path, monkeypatch):
    """The reference prunes each MLP alone to an eighth, refits it with numpy on all tokens, and runs the tower."""
    monkeypatch.setattr(output_selection, "TOKENS_PER_NEURON", 10**6)
    FAMILIES[family](tmp_path / "model")
    model = open_model(str(tmp_path / "model"))
    model.module.eval()
    images = pictures(64)  # no more than NUM_SENSITIVITY_IMAGES
    batches = images.split(30)
    rankings = rank_tower(model.adapter, batches)
    with torch.no_grad():
        dense = model.adapter.embed(last_state(model.adapter, images)).double()
    for site in block_sites(model):
        ranking = rankings[site.name]
        kept = ranking.order[: min(site.hidden, int((ranking.error > 0).sum())) // 8].sort().values
        changed = model.copy()
        layer = changed.tower.get_submodule(site.consumer)
        recorded = []
        handle = layer.register_forward_pre_hook(
            lambda m, a, recorded=recorded: recorded.append(a[0].detach().double())
        )
        with torch.no_grad():
            last_state(changed.adapter, images)
        handle.remove()
        tokens = recorded[0].shape[1]
        place = [block.name for block in model.adapter.blocks()].index(site.name.rpartition(".mlp")[0] or site.name)
        with torch.no_grad():
            state = model.adapter.stem(images)
            for block in model.adapter.blocks()[: place + 1]:
                state = block(state)
            weight = token_weights(model.adapter, state, last=place == len(rankings) - 1)
            if int((weight > 0).sum()) * len(images) < site.hidden:
                weight = token_weights(model.adapter, state, last=False)
        root = weight.sqrt().repeat(len(images))[:, None]
        assert len(weight) == tokens
        hidden = recorded[0].flatten(0, 1)
        mean = (root**2 * hidden).sum(0) / (root**2).sum() if layer.bias is not None else 0 * hidden[0]
        centered = (root * (hidden - mean)).numpy()
        target = centered @ layer.weight.detach().double().numpy().T
        fit = torch.from_numpy(np.linalg.lstsq(centered[:, kept], target, rcond=None)[0].T)
        with torch.no_grad():
            if layer.bias is not None:
                layer.bias += (layer.weight.double() @ mean - fit @ mean[kept]).float()
            layer.weight.zero_()
            layer.weight[:, kept] = fit.float()
            embedding = changed.adapter.embed(last_state(changed.adapter, images)).double()
        relative = float((embedding - dense).square().sum() / (dense - dense.mean(0)).square().sum())
        assert ranking.sensitivity == pytest.approx(relative / float(ranking.error[len(kept)]), rel=0.02)


def test_rankings_on_disk_give_the_plans_of_a_fresh_search_at_any_size(tmp_path):
    images = pictures(60).split(20)
    tower = redraw(timm_tower())
    rank(tower, "output", images).save(tmp_path / "r.safetensors")
    stored = Rankings.read(tmp_path / "r.safetensors")
    for amount in ({"budget": {"params": 0.7}}, {"keep_ratio": 0.25}, {}, {"keep": 24, "round_to": 8}):
        plan = stored.plan(opened(tower), **amount)
        assert plan == make_plan(tower, "output", images, **amount)
        assert prune(tower, plan=plan).plan == plan
    widths = [len(site.kept) for site in stored.plan(opened(tower), budget={"params": 0.7}).sites.values()]
    assert len(set(widths)) > 1
    with torch.device("meta"):
        shadow = timm_tower()
    assert stored.plan(opened(shadow), budget={"params": 0.7}) == stored.plan(opened(tower), budget={"params": 0.7})
    with pytest.raises(DgmrError, match="another encoder or checkpoint"):
        stored.plan(opened(redraw(timm_tower(), seed=5)), keep=8)
    with pytest.raises(DgmrError, match="exactly one of"):
        stored.plan(opened(tower), budget={"params": 0.7}, keep=8)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for path in ("bad.safetensors", "missing.safetensors"):
        with pytest.raises(DgmrError, match=rf"cannot read the rankings .*{path}.*dgmr-tp rank"):
            Rankings.read(tmp_path / path)
    with pytest.raises(DgmrError, match="criterion l2 needs no ranking"):
        rank(tower, "l2", images)


def test_fitted_widths_recover_better_than_equal_ones(tmp_path):
    """Compared at the same number of parameters, on a tower whose MLPs have outputs of different scale."""
    tower = redraw(timm_tower())
    with torch.no_grad():
        for index, block in enumerate(tower.blocks):
            block.mlp.fc2.weight *= 3 if index == 0 else 0.3
    images, new = pictures(160).split(40), pictures(60, seed=9)
    with torch.no_grad():
        dense = tower(new)
    fitted = prune(tower, images, criterion="output", budget={"params": 0.6})
    keep = sum(len(site.kept) for site in fitted.plan.sites.values()) // len(fitted.plan.sites)
    equal = prune(tower, images, criterion="output", keep=keep)
    assert parameters(fitted.model) <= parameters(equal.model) * 1.01
    with torch.no_grad():
        errors = [float((pruned(new) - dense).square().mean()) for pruned in (fitted.model, equal.model)]
    assert errors[0] < 0.9 * errors[1]


def test_few_images_do_not_make_the_last_block_worthless():
    """The head reads one token per image.

    With few images, as few neurons reproduce these tokens exactly, which must not prune the block to its minimum.
    """
    tower = redraw(timm_tower())
    for images in (24, 26, 60):
        widths = [
            len(site.kept)
            for site in make_plan(tower, "output", [pictures(images)], budget={"params": 0.6}).sites.values()
        ]
        assert min(widths) > 20, widths
    with pytest.raises(DgmrError, match="the embedding is the same for all these images"):
        make_plan(tower, "output", [pictures(1)], budget={"params": 0.6})


def test_without_images_it_says_what_to_give(tmp_path):
    tower = redraw(timm_tower())
    with pytest.raises(DgmrError, match=r"criterion output looks at calibration images.*--images or --recover"):
        make_plan(tower, "output", keep=8)
    with pytest.raises(DgmrError, match=r"got none"):
        make_plan(tower, "activation", [], keep=8)
    images = pictures(20)
    images[3] = torch.inf
    with pytest.raises(DgmrError, match=r"not finite"):
        make_plan(tower, "output", [images], keep=8)
    with pytest.raises(DgmrError, match=r"streaming does not do"):
        prune_streaming("demo", tmp_path / "out", criterion="output", keep=8)


def test_the_original_stays_as_it_is(tower):
    before = copy.deepcopy(tower.train().state_dict())
    rank_tower(adapt(tower), [pictures(12)])
    assert tower.training and all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


@pytest.mark.slow
def test_a_recipe_and_the_command_line_take_it(tmp_path):
    """A run makes two sizes from one ranking, and the commands make the same plans from their own file."""
    budgets = [{"params": 0.6}, {"params": 0.5, "flops": 0.52}]
    recipe = write_recipe(
        tmp_path / "small.yaml",
        prune={"budget": budgets, "criterion": "output"},
        distill=None,
        evaluate=None,
        export=None,
    )
    done = call_command("run", recipe, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank/all: done") == 1
    images, ranked = tmp_path / "run" / "scenes" / "all" / "images", tmp_path / "ranked.safetensors"
    result = call_command("rank", "--images", images, "--calibration-images", "60", "-o", ranked)
    assert result.returncode == 0 and "transformer.resblocks.5.mlp" in result.stdout, result.stderr
    plan_path = tmp_path / "plan.json"
    for name, limits in (("params-0.6", "params=0.6"), ("params-0.5-flops-0.52", "params=0.5,flops=0.52")):
        result = call_command("plan", "--rankings", ranked, "--budget", limits, "-o", plan_path)
        assert result.returncode == 0, result.stderr
        assert plan_path.read_text() == (tmp_path / "run" / "prune" / name / "model" / "plan.json").read_text()
    both = call_command("plan", "--rankings", ranked, "--budget", "params=0.6", "--budget", "params=0.5,flops=0.52")
    assert both.returncode == 0 and "params=0.6" in both.stdout and "params=0.5,flops=0.52" in both.stdout, both.stderr
    for command, says in (
        (("prune", "--criterion", "output", "-o", tmp_path / "out"), "looks at calibration images"),
        (("plan", "--rankings", ranked, "--budget", "params"), "Write it as params=0.5"),
        (("plan", "--rankings", ranked, "--images", images), "Leave out --images"),
        (
            ("plan", "--rankings", ranked, "--budget", "params=0.6", "--budget", "params=0.5", "-o", plan_path),
            "--out writes one plan",
        ),
        (("prune", "--budget", "params=0.6", "--budget", "params=0.5", "-o", tmp_path / "out"), "Give one --budget"),
        (
            ("prune", "--rankings", ranked, "--plan", plan_path, "-o", tmp_path / "out"),
            "--plan and --rankings both choose",
        ),
        (("rank", "--images", images, "-o", ranked), "exists already"),
    ):
        with pytest.raises(DgmrError, match=says):
            app([*map(str, command)], standalone_mode=False)


def test_the_default_looks_at_images_where_there_are_some():
    tower, images = redraw(timm_tower()), pictures(30).split(10)
    assert prune(tower, images, keep=16).plan == make_plan(tower, "output", images, keep=16)
    assert prune(tower, keep=16).plan == make_plan(tower, "dgmr", keep=16)


def test_an_unknown_selection_rule_is_refused(tower):
    hidden, weight = problem(0)
    with pytest.raises(DgmrError, match=r"unknown selection rule 'typo'\. Use one of output, activation"):
        ranked(hidden, weight, by="typo")
    with pytest.raises(DgmrError, match="unknown selection rule 'typo'"):
        rank_tower(adapt(tower), [pictures(12)], by="typo")


def test_a_sample_of_tokens_keeps_every_weight_on_average():
    weight = torch.tensor([0.5, *[0.05] * 10, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample_tokens(weight, 4, generator) for _ in range(4000)])
    assert ((draws > 0).sum(1) == 4).all() and (draws[:, 0] == 0.5).all()
    assert torch.allclose(draws.sum(1), weight.sum())
    assert torch.allclose(draws.mean(0), weight, atol=0.01) and len(draws.unique(dim=0)) > 50
    assert sample_tokens(weight, 11, generator) is weight
    one = torch.stack([sample_tokens(weight, 1, generator) for _ in range(100)])
    assert (one[:, 0] == 0.5).all() and ((one > 0).sum(1) == 2).all(), "the class token was dropped"
    even = torch.full((8,), 0.125, dtype=torch.float64)
    assert (sample_tokens(even, 2, generator) > 0).sum() == 2


@torch.no_grad()
def test_few_tokens_of_many_images_rank_as_all_do(tower, monkeypatch):
    images = list(pictures(256).split(32))
    monkeypatch.setattr(output_selection, "TOKENS_PER_NEURON", 10**6)
    everything = rank(tower, images=images)
    monkeypatch.setattr(output_selection, "TOKENS_PER_NEURON", 8)
    sampled = rank(tower, images=images)
    kept = lambda rankings: {name: set(site.order[:48].tolist()) for name, site in rankings.sites.items()}  # noqa: E731
    shared = [len(kept(everything)[name] & kept(sampled)[name]) / 48 for name in everything.sites]
    assert sum(shared) / len(shared) > 0.6  # 48 random neurons of 192 would share a quarter
    assert kept(everything) != kept(sampled), "all tokens were used"
