"""Selection that sees the data: against least squares solved anew for every candidate, LAPACK, and the tower's own activations."""

import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
from conftest import pictures, redraw, run_command, timm_tower, write_recipe
from families import FAMILIES, FORMS, plain_output
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import lapack
from torch import nn

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.encoders import as_encoder
from dgmr_tp.oneshot import make_plan
from dgmr_tp.pruning import FunctionalImportance, MLPPruner, find_sites, rank_encoder
from dgmr_tp.pruning.functional import rank_neurons
from dgmr_tp.streaming import prune_streaming


def problem(seed, neurons=8, tokens=60, width=4):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, neurons)) @ rng.standard_normal((neurons, neurons))
    return hidden, rng.standard_normal((width, neurons))


def best_fit_error(hidden, weight, kept):
    """What is left of the output after the best least-squares fit from some of the neurons."""
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
    whole, part = ranked(hidden, weight), ranked(hidden, weight, picks=3)
    assert part.order[:3].tolist() == whole.order[:3].tolist() and sorted(part.order.tolist()) == list(range(8))
    assert torch.equal(part.error[:4], whole.error[:4]) and part.error[4] == part.error[3] > whole.error[4]


def test_the_gram_is_that_of_the_towers_own_activations(tower):
    """The first block by hand: its hidden activations on all tokens, weighted and centred, and the order they give."""
    encoder = as_encoder(tower)
    images = pictures(12)
    rankings = rank_encoder(encoder, images.split(5))
    assert list(rankings) == [f"{block.name}.mlp" for block in encoder.blocks()]
    block = encoder.blocks()[0]
    seen = {}
    [site] = find_sites(block.module)
    consumer = block.module.get_submodule(site.consumer)
    consumer.register_forward_pre_hook(lambda m, a: seen.update(h=a[0]))
    with torch.no_grad():
        block(encoder.stem(images))
    hidden = seen["h"].flatten(0, 1).double().numpy()
    weights = np.tile(np.array([0.5] + [0.5 / 16] * 16), 12)
    weights /= weights.sum()
    centred = hidden - weights @ hidden
    gram = torch.from_numpy(centred.T @ (centred * weights[:, None]))
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
    dense = plain_output(model.encoder.module, new)
    left = {}
    for criterion in ("output", "random"):
        pruned, plan, table = prune(model, calibration, criterion=criterion, keep_ratio=0.15)
        assert plan.criterion.lower() == criterion
        left[criterion] = sum(row.recovered_error for row in table) / len(table)
        assert torch.isfinite(plain_output(pruned.encoder.module, new) - dense).all()
    assert left["output"] < left["random"]


def test_it_works_in_a_stock_pruner():
    tower = redraw(timm_tower(init_values=None))
    rankings = rank_encoder(as_encoder(tower), [pictures(40)])
    pruned = copy.deepcopy(tower)
    ignored = [m for name, m in pruned.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not name.endswith("mlp.fc1")]
    pruner = tp.pruner.BasePruner(
        pruned,
        (pictures(1),),
        importance=FunctionalImportance(pruned, rankings),
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
    plan = MLPPruner(tower, FunctionalImportance(tower, rankings), keep=48).plan()
    assert all(list(plan.sites[name].kept) == sorted(ranking.order[:48].tolist()) for name, ranking in rankings.items())


def test_without_images_it_says_what_to_give(tmp_path):
    tower = redraw(timm_tower())
    with pytest.raises(DgmrError, match=r"criterion output looks at calibration images.*--recover IMAGES"):
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
    rank_encoder(as_encoder(tower), [pictures(12)])
    assert tower.training and all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


def test_a_recipe_and_the_command_line_take_it(tmp_path):
    recipe = write_recipe(
        tmp_path / "small.yaml", prune={"mlp_ratio": 0.25, "criterion": "output"}, distill=None, evaluate=None, export=None
    )
    done = run_command("run", recipe, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    plan = (tmp_path / "run" / "prune" / "mlp_ratio-0.25" / "model" / "plan.json").read_text()
    assert '"criterion": "output"' in plan
    images = tmp_path / "run" / "scenes" / "all" / "images"
    told = run_command(
        "plan", "--criterion", "output", "--mlp-ratio", "0.25", "--images", images, "--count", "60", "-o", tmp_path / "plan.json"
    )
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "plan.json").read_text() == plan
    refused = run_command("prune", "--criterion", "output", "-o", tmp_path / "out")
    assert refused.returncode == 2 and "looks at calibration images" in refused.stderr and refused.stderr.count("\n") == 1
