"""AMP: the entropy, the importance against autograd, and the search against one that runs the whole tower per trial."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torch_pruning as tp
from compress import block_sites, make_plan, search
from conftest import call_command, pictures, redraw, timm_tower, write_recipe
from families import FAMILIES, FORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from scipy.special import softmax
from torch import nn

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.encoders import adapt
from dgmr_tp.pruning import MLPPruner, PrecomputedScores
from dgmr_tp.pruning.amp import contrastive, entropy, gate_scores, search_widths
from dgmr_tp.utils.progress import listen_to_progress


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1 / 200, 1))
def test_the_entropy_is_that_of_softmaxed_cosines(seed, temperature):
    embeddings = np.random.default_rng(seed).standard_normal((12, 5))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = np.mean([scipy.stats.entropy(row) for row in softmax(unit @ unit.T / temperature, axis=1)])
    got = float(entropy(temperature)(torch.from_numpy(embeddings), 0))
    assert np.isfinite(got) and got == pytest.approx(expected, abs=2e-4)


def test_the_variant_with_text_is_clips_loss():
    images, texts = torch.randn(9, 6), torch.randn(9, 6)
    expected = ClipLoss()(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), torch.tensor(15.0))
    assert torch.allclose(contrastive([texts])(images, 0), expected, atol=1e-5)
    assert not torch.allclose(contrastive([texts.flip(0)])(images, 0), expected, atol=1e-2)


def by_autograd(model, images, objective):
    """Return |Σ_tokens h ∂E/∂h| from stored activations and one backward pass over the whole group."""
    sites = block_sites(model)
    kept = {}
    handles = []
    for site in sites:

        def keep(module, arguments, name=site.name):
            kept[name] = arguments[0].requires_grad_(True) if arguments[0].is_leaf else arguments[0]
            kept[name].retain_grad()

        handles.append(model.tower.get_submodule(site.consumer).register_forward_pre_hook(keep))
    state = model.adapter.stem(images)
    for block in model.adapter.blocks():
        state = block(state)
    objective(model.adapter.embed(state), 0).backward()
    for handle in handles:
        handle.remove()
    return {name: (h * h.grad).flatten(1, -2).sum(1).abs().mean(0).double() for name, h in kept.items()}


@pytest.mark.parametrize("family", FORMS)
def test_importance_is_plain_autograds(family, tmp_path):
    FAMILIES[family](tmp_path / "model")
    model = open_model(str(tmp_path / "model"))
    model.module.eval()
    images, objective = pictures(24), entropy(1 / 5)
    expected = by_autograd(model.copy(), images, objective)
    got = gate_scores(model.adapter, [images.split(7)], objective)
    assert list(got) == list(expected)
    for name, scores in expected.items():
        assert torch.allclose(got[name], scores, rtol=1e-3, atol=1e-4 * float(scores.max())), name
        assert scores.std() > 0.1 * scores.mean()
    two = gate_scores(model.adapter, [[images[:12]], [images[12:]]], objective)  # the entropy depends on the groups
    assert not any(torch.allclose(two[name], got[name], rtol=1e-2) for name in got)
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_taylor_is_torch_prunings():
    tower, images = redraw(timm_tower()), pictures(40)
    stock = copy.deepcopy(tower)
    entropy()(stock(images), 0).backward()
    ignored = [
        m for name, m in stock.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not name.endswith("mlp.fc1")
    ]
    options = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "ignored_layers": ignored}
    taylor = tp.importance.TaylorImportance()
    tp.pruner.BasePruner(stock, (pictures(1),), importance=taylor, pruning_ratio=1 - 48.5 / 192, **options).step()
    plan = prune(tower, [images[:25], images[25:]], criterion="taylor", keep=48).plan
    other = make_plan(tower, "amp", [images], keep=48)
    for name, site in plan.sites.items():
        kept = tower.get_submodule(name).fc1.weight[list(site.kept)]
        assert torch.equal(stock.get_submodule(name).fc1.weight, kept)
        assert site.kept != other.sites[name].kept
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("criterion", ["taylor", "amp", "output"])
def test_bf16_weights_give_much_the_same(criterion):
    tower, images = redraw(timm_tower()), pictures(40)
    full = make_plan(tower, criterion, [images], keep=48)
    half = make_plan(copy.deepcopy(tower).bfloat16(), criterion, [images.bfloat16()], keep=48)
    for name, site in full.sites.items():
        assert len(set(site.kept) & set(half.sites[name].kept)) > (36 if criterion != "output" else 24)  # 12 by chance


def test_small_gradients_do_not_vanish_in_half_precision():
    tower, images = redraw(timm_tower()).half(), pictures(16).half()
    small = lambda embeddings, group: 1e-6 * entropy()(embeddings, group)  # noqa: E731
    for name, scores in gate_scores(adapt(tower), [[images]], small).items():
        large = gate_scores(adapt(tower), [[images]])[name]
        assert (scores > 0).all() and torch.allclose(scores, 1e-6 * large, rtol=0.05, atol=1e-8 * float(large.max()))


def brute_force(tower, scores, groups, threshold, trials, two_sided=False):
    """Run Algorithm 1 without reuse: each trial prunes a copy of the dense tower and runs all of it."""
    names = list(scores)
    keep = {name: len(scores[name]) for name in names}
    forwards = 0

    def evaluate(widths):
        nonlocal forwards
        plan = MLPPruner(tower, PrecomputedScores(tower, scores, "amp"), keep=widths).plan()
        pruned = prune(tower, plan=plan).model
        forwards += sum(len(batch) for group in groups for batch in group)
        with torch.no_grad():
            return float(
                np.mean([float(entropy()(torch.cat([pruned(batch) for batch in group]), 0)) for group in groups])
            ), plan

    before, plan = evaluate(keep)
    for name in reversed(names):
        low, high = 0, keep[name]
        accepted = before
        for _ in range(trials):
            middle = (low + high) // 2
            value, trial_plan = evaluate({**keep, name: middle})
            change = value - before
            if (abs(change) if two_sided else change) <= threshold:
                high, accepted, plan = middle, value, trial_plan
            else:
                low = middle
        keep[name], before = high, accepted
    return plan, forwards


@pytest.mark.parametrize(("threshold", "two_sided"), [(0.0, False), (1e-4, False), (1e-4, True), (-1.0, False)])
def test_the_search_finds_what_brute_force_finds(threshold, two_sided):
    tower, images = redraw(timm_tower()), pictures(48)
    expected, forwards = brute_force(
        tower,
        gate_scores(adapt(tower), [[images[:24]], [images[24:]]]),
        [[images[:24]], [images[24:]]],
        threshold,
        6,
        two_sided,
    )
    result = search(tower, images.split(8), threshold=threshold, two_sided=two_sided, candidates=24)
    assert {name: site.kept for name, site in result.plan.sites.items()} == {
        name: site.kept for name, site in expected.sites.items()
    }
    widths = {len(site.kept) for site in result.plan.sites.values()}
    assert widths == {192} if threshold < 0 else len(widths) == 3  # some trials pass and some do not
    assert 0 < result.image_blocks < forwards * 3  # blocks before the searched one run once


def test_the_plan_gives_the_searchs_own_model():
    tower, groups = redraw(timm_tower()), [[pictures(24)]]
    adapter = adapt(copy.deepcopy(tower))
    state = search_widths(adapter, gate_scores(adapt(tower), groups), groups, threshold=1e-4)
    result = search(tower, groups[0], threshold=1e-4, candidates=24)
    again = prune(tower, plan=result.plan).model
    assert state.kept == {name: site.kept for name, site in result.plan.sites.items()}
    assert all(
        torch.equal(a, b) for a, b in zip(adapter.tower.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        assert result.entropy == pytest.approx(float(entropy()(again(pictures(24)), 0)), abs=1e-5)


def test_a_search_that_was_interrupted_goes_on(tmp_path):
    tower, images, journal = redraw(timm_tower()), pictures(24), tmp_path / "search.json"
    whole = search(tower, [images], threshold=1e-4, candidates=24)

    class Enough(Exception):
        pass

    def stop(title, done, total):
        if done == 2:
            raise Enough

    with pytest.raises(Enough), listen_to_progress(stop):
        search(tower, [images], threshold=1e-4, candidates=24, journal=journal)
    assert len(json.loads(journal.read_text())["state"]["kept"]) == 2
    seen = []
    with listen_to_progress(lambda title, done, total: seen.append(done)):
        resumed = search(tower, [images], threshold=1e-4, candidates=24, journal=journal)
    assert seen == [3] and resumed == whole
    other = search(
        tower, [images], threshold=-1, candidates=24, journal=journal
    )  # another threshold starts a new search
    assert other.plan != whole.plan
    with pytest.raises(Enough), listen_to_progress(stop):
        search(tower, [images], threshold=1e-4, candidates=24, journal=journal)
    elsewhere = [pictures(24, seed=3)]
    fresh = search(tower, elsewhere, threshold=1e-4, candidates=24)
    assert search(tower, elsewhere, threshold=1e-4, candidates=24, journal=journal) == fresh


def test_the_search_takes_another_objective():
    tower, images, texts = (
        redraw(timm_tower()),
        pictures(24),
        torch.randn(24, 10, generator=torch.Generator().manual_seed(1)),
    )
    result = search(tower, [images], threshold=1e-4, candidates=24, objective=contrastive([texts]))
    with torch.no_grad():
        value = contrastive([texts])(prune(tower, plan=result.plan).model(images), 0)
    assert result.entropy == pytest.approx(float(value), abs=1e-4)
    assert result.plan != search(tower, [images], threshold=1e-4, candidates=24).plan


def test_what_is_missing_or_broken_is_said():
    tower = redraw(timm_tower())
    with pytest.raises(
        DgmrError, match=r"compares groups of 512 images, got 20\. Give more images or fewer candidates"
    ):
        search(tower, [pictures(20)], threshold=1e-4)
    with pytest.raises(DgmrError, match=r"criterion taylor looks at calibration images"):
        make_plan(tower, "taylor", keep=8)
    images = pictures(20)
    images[2] = torch.inf
    with pytest.raises(DgmrError, match=r"objective is not finite"):
        search(tower, [images], threshold=1e-4, candidates=20)


@pytest.mark.slow
def test_the_command_and_a_recipe_search(tmp_path):
    options = {"images": 60, "candidates": 20, "temperature": 0.05, "two_sided": True}
    recipe = write_recipe(
        tmp_path / "amp.yaml",
        prune={"threshold": 0.05, "criterion": "amp", "search": options},
        distill=None,
        evaluate=None,
        export=None,
    )
    done = call_command("run", recipe, "-o", tmp_path / "run", "--until", "prune")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "prune" / "threshold-0.05"
    figures = json.loads((folder / "manifest.json").read_text())["figures"]
    assert figures["entropy"] > 0 and figures["image_forwards"] > 60
    images = tmp_path / "run" / "scenes" / "all" / "images"
    numbers = (
        "--calibration-images",
        "60",
        "--candidates",
        "20",
        "--temperature",
        "0.05",
        "--two-sided",
        "--threshold",
        "0.05",
    )
    result = call_command("amp", "--images", images, *numbers, "-o", tmp_path / "plan.json")
    assert result.returncode == 0 and "forward passes of an image" in result.stdout, result.stderr
    assert (tmp_path / "plan.json").read_text() == (folder / "model" / "plan.json").read_text()
    refused = call_command("amp", "--images", images, "--calibration-images", "60", "-o", tmp_path / "other.json")
    assert (
        refused.returncode == 2 and "groups of 512 images, got 60" in refused.stderr and refused.stderr.count("\n") == 1
    )


WORKER = """
import sys, torch, json
sys.path.insert(0, sys.argv[1])
from conftest import pictures, redraw, timm_tower
from compress import search
from dgmr_tp.encoders import adapt
from dgmr_tp.pruning.amp import gate_scores, weight_gradients
torch.distributed.init_process_group("gloo")
tower, images = redraw(timm_tower()), pictures(60)
groups = [[g] for g in images.split(20)]
scores = gate_scores(adapt(tower), groups)
with weight_gradients(adapt(tower), groups):
    gradient = float(tower.blocks[1].mlp.fc1.weight.grad.abs().sum())
with weight_gradients(adapt(tower), groups[:1]):  # one group for two processes
    lonely = float(tower.blocks[1].mlp.fc1.weight.grad.abs().sum())
result = search(tower, [images], threshold=1e-4, candidates=20)
if torch.distributed.get_rank() == 0:
    kept = {name: site.kept for name, site in result.plan.sites.items()}
    first = {name: s[:5].tolist() for name, s in scores.items()}
    blocks = result.image_blocks
    print(json.dumps({"kept": kept, "scores": first, "gradient": gradient, "lonely": lonely, "blocks": blocks}))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    results = []
    for processes in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            script,
        ]
        done = subprocess.run(
            [*map(str, command), str(tmp_path.cwd() / "tests")], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    one, two = results
    assert one["kept"] == two["kept"] and one["blocks"] == two["blocks"]
    for figure in ("gradient", "lonely"):
        assert one[figure] == pytest.approx(two[figure], rel=1e-4)
    for name, scores in one["scores"].items():
        assert two["scores"][name] == pytest.approx(scores, rel=1e-4)
