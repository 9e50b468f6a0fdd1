"""Closed-form recovery against least squares on the stacked activations, and its guarantees."""

import copy

import numpy as np
import pytest
import timm
import torch
from conftest import pictures, redraw, timm_tower
from families import VIT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dgmr_tp.compression.prune import prune
from dgmr_tp.encoders import adapt
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import MLPPruner, last_state, recover
from dgmr_tp.pruning.adapter import run_blocks
from dgmr_tp.pruning.calibration import token_weights
from dgmr_tp.pruning.recovery import Moments, _gain, _refit_layer, refit


def reference(h, y, w, weight, bias, damping):
    """Solve the same objective with numpy, as one least-squares problem over all rows."""
    w = w / w.sum()
    rows, targets = h * np.sqrt(w)[:, None], y * np.sqrt(w)[:, None]
    if bias is not None:
        rows = np.concatenate([rows, np.sqrt(w)[:, None]], axis=1)
        variance = np.average((h - np.average(h, axis=0, weights=w)) ** 2, axis=0, weights=w).mean()
    else:
        variance = np.average(h**2, axis=0, weights=w).mean()
    penalty = np.sqrt(damping * variance)
    prior = np.zeros((h.shape[1], rows.shape[1]))
    prior[:, : h.shape[1]] = penalty * np.eye(h.shape[1])
    solution = np.linalg.lstsq(
        np.concatenate([rows, prior]), np.concatenate([targets, penalty * weight.T]), rcond=None
    )[0]
    return solution[: h.shape[1]].T, (solution[-1] if bias is not None else None)


def problem(seed, n=300, k=12, d=5):
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((n, k)) @ rng.standard_normal((k, k)) + 3
    y = h[:, : k // 2] @ rng.standard_normal((k // 2, d)) + rng.standard_normal((n, d))
    return h, y, rng.random(n) + 0.1, rng.standard_normal((d, k)), rng.standard_normal(d)


def moments_of(h, y, w, parts=4):
    moments = Moments()
    for piece in np.array_split(np.arange(len(h)), parts):
        moments.add(*(torch.from_numpy(a[piece]) for a in (h, y, w)))
    return moments


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-4, 1e-2, 1.0]), st.booleans())
def test_refit_minimises_the_stated_objective(seed, damping, with_bias):
    h, y, w, weight, bias = problem(seed)
    bias = bias if with_bias else None
    got, got_bias = refit(
        moments_of(h, y, w), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias), damping
    )
    expected, expected_bias = reference(h, y, w, weight, bias, damping)
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-8)
    assert (got_bias is None) == (bias is None)
    if bias is not None:
        assert np.allclose(got_bias, expected_bias, rtol=1e-6, atol=1e-8)
    other, _ = reference(h, y, np.ones_like(w), weight, bias, damping)
    assert not np.allclose(got, other, rtol=1e-6, atol=1e-8)


def test_products_in_float32_keep_the_variance_of_a_channel_with_a_large_mean():
    rng = np.random.default_rng(0)
    h, y = (rng.standard_normal((4000, 600)) + 1000).astype(np.float32), rng.standard_normal((4000, 3)) - 300
    y, w = (y + h[:, :3]).astype(np.float32), (rng.random(4000) + 0.1).astype(np.float32)
    moments = moments_of(h, y, w)
    joint = np.cov(np.concatenate([h, y], 1).astype(np.float64).T, aweights=w.astype(np.float64), bias=True)
    hh, yh, yy = moments.second_moments(*moments.means())
    assert np.abs(hh.numpy() - joint[:600, :600]).max() < 1e-5
    assert np.abs(yh.numpy() - joint[600:, :600]).max() < 1e-5
    assert yy == pytest.approx(np.trace(joint[600:, 600:]), rel=1e-5)
    assert np.allclose(moments.means()[0], np.average(h, axis=0, weights=w.astype(np.float64)), rtol=1e-7)
    raw = (h * w[:, None]).T @ h / w.sum() - np.outer(*2 * [np.average(h, axis=0, weights=w)])
    assert np.abs(raw - joint[:600, :600]).max() > 0.01, "without the shift the test would not see the rounding"


def test_without_damping_the_solution_nearest_to_the_kept_columns_is_taken():
    h, y, w, weight, bias = problem(0)
    h[:, 3] = h[:, 4]  # duplicates
    h[:, 7] = 0  # dead
    got, got_bias = refit(moments_of(h, y, w), torch.from_numpy(weight), torch.from_numpy(bias), 0.0)
    root = np.sqrt(w)[:, None]
    centered, target = (root * (a - np.average(a, axis=0, weights=w)) for a in (h, y))
    best = np.linalg.lstsq(centered, target - centered @ weight.T, rcond=1e-10)[0].T + weight
    assert np.allclose(got, best, rtol=1e-5, atol=1e-7)
    assert np.allclose(got[:, 7], weight[:, 7])
    prediction = h @ got.numpy().T + got_bias.numpy()
    assert np.allclose(np.average(prediction - y, axis=0, weights=w), 0, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_fewer_rows_than_neurons(damping):
    h, y, w, weight, bias = problem(1, n=8)
    got, got_bias = refit(moments_of(h, y, w), torch.from_numpy(weight), torch.from_numpy(bias), damping)
    assert torch.isfinite(got).all()
    if damping == 0:
        assert np.allclose(h @ got.numpy().T + got_bias.numpy(), y, atol=1e-6)


def test_all_neurons_dead_leaves_the_mean():
    y = np.random.default_rng(0).standard_normal((50, 3))
    got, bias = refit(moments_of(np.zeros((50, 4)), y, np.ones(50)), torch.ones(3, 4), torch.zeros(3), 1e-3)
    assert torch.equal(got, torch.ones(3, 4, dtype=torch.float64))
    assert np.allclose(bias, y.mean(0))


def test_error_of_moments_is_the_error_of_the_rows():
    h, y, w, weight, bias = problem(2)
    rows = ((y - h @ weight.T - bias) ** 2).sum(1)
    variance = ((y - np.average(y, axis=0, weights=w)) ** 2).sum(1)
    expected = np.average(rows, weights=w) / np.average(variance, weights=w)
    assert np.isclose(moments_of(h, y, w).relative_error(torch.from_numpy(weight), torch.from_numpy(bias)), expected)


def test_token_weights(tower):
    adapter = adapt(tower)
    state = adapter.stem(pictures(2)).detach()
    middle = token_weights(adapter, state, last=False)
    assert torch.allclose(middle, torch.tensor([0.5] + [0.5 / 16] * 16, dtype=torch.float64))
    last = token_weights(adapter, state, last=True)
    assert torch.equal(last, torch.tensor([1.0] + [0.0] * 16, dtype=torch.float64))


def test_token_weights_of_a_tower_that_averages_its_patches():
    adapter = adapt(redraw(timm_tower(class_token=False, global_pool="avg")))
    state = adapter.stem(pictures(2)).detach()
    for last in (False, True):
        assert torch.allclose(token_weights(adapter, state, last=last), torch.full((16,), 1 / 16, dtype=torch.float64))


def pruned_pair(tower, keep):
    pruned = copy.deepcopy(tower)
    pruner = MLPPruner(pruned, keep=keep)
    pruner.apply(pruner.plan())
    return adapt(tower), adapt(pruned)


def drift(dense, pruned, images):
    with torch.no_grad():
        a, b = (adapter.embed(last_state(adapter, images)) for adapter in (dense, pruned))
    return float((a - b).norm() / a.norm())


def test_recovery_brings_the_embedding_back_on_new_images(tower):
    dense, pruned = pruned_pair(tower, keep=48)
    cut = drift(dense, pruned, pictures(40, seed=9))
    report = recover(dense, pruned, pictures(300).split(50))
    assert [entry.site for entry in report] == [f"{block.name}.mlp" for block in dense.blocks()]
    assert all(entry.recovered_error < entry.cut_error or entry.fit_rejected for entry in report)
    assert drift(dense, pruned, pictures(40, seed=9)) < 0.7 * cut


def linears(block):
    return [layer for layer in block.module.mlp.modules() if isinstance(layer, nn.Linear)]


def scale_of(block):
    return next(tensor for name, tensor in block.module.named_parameters() if name in ("ls_2.gamma", "ls2.gamma"))


@pytest.mark.parametrize("depth", [0, 1])
def test_recovered_layer_solves_the_least_squares_problem_of_its_block(tower, depth):
    """The reference computes the residual stream target of the block and solves one weighted least-squares problem."""
    dense, pruned = pruned_pair(tower, keep=48)
    images = pictures(40)
    recover(dense, pruned, [images], damping=1e-2)
    cut = pruned_pair(tower, keep=48)[1]
    block, last = cut.blocks()[depth], linears(cut.blocks()[depth])[-1]
    with torch.no_grad():
        state, dense_state = dense.stem(images), dense.stem(images)
        for before, dense_before in zip(
            pruned.blocks()[:depth], dense.blocks()[:depth], strict=True
        ):  # recovered already
            state, dense_state = before(state), dense_before(dense_state)
        weight, bias = last.weight.detach().double().numpy(), last.bias.detach().double().numpy()
        recorded = {}
        last.register_forward_pre_hook(lambda m, a: recorded.update(h=a[0]))
        last.weight.zero_(), last.bias.zero_()
        missing = (dense.blocks()[depth](dense_state) - block(state)) / scale_of(block)
    fitted = [i for i in range(40) if i % 10 != 9]
    h, y = (tensor[fitted].flatten(0, 1).double().numpy() for tensor in (recorded["h"], missing))
    w = np.tile(np.array([0.5] + [0.5 / 16] * 16), 36)
    expected, expected_bias = reference(h, y, w, weight, bias, 1e-2)
    got = linears(pruned.blocks()[depth])[-1]
    assert np.allclose(got.weight.detach(), expected, atol=1e-4)
    assert np.allclose(got.bias.detach(), expected_bias, atol=1e-4)
    assert not np.allclose(got.weight.detach(), weight, atol=1e-2)
    unscaled, _ = reference(h, y * scale_of(block).detach().numpy(), w, weight, bias, 1e-2)
    assert not np.allclose(got.weight.detach(), unscaled, atol=1e-2)


def test_later_blocks_make_good_what_earlier_ones_lost(tower):
    """A second block that lost one neuron corrects part of the error of a first block that lost almost all."""
    drifts = []
    for sites in (("0",), ("0", "1")):
        keep = {
            f"{dense_block.name}.mlp": 8 if str(i) == "0" else 191
            for i, dense_block in enumerate(adapt(tower).blocks()[:2])
        }
        dense, pruned = pruned_pair(
            tower, keep={name: count for name, count in keep.items() if name.split(".")[-2] in sites}
        )
        recover(dense, pruned, pictures(300).split(50))
        drifts.append(drift(dense, pruned, pictures(40, seed=9)))
    assert drifts[1] < 0.97 * drifts[0]


@pytest.mark.parametrize("name", ["eva02_enormous_patch14_clip_224", "vit_giant_patch14_dinov2"])
def test_behind_a_norm_the_dense_mlp_is_the_target(name):
    """EVA-CLIP-E has a norm between MLP and residual stream, DINOv2-g has a LayerScale."""
    tower = redraw(timm.create_model(name, **VIT))
    dense, pruned = pruned_pair(tower, keep=24)
    block, images = pruned.blocks()[1], pictures(20)
    consumer = linears(block)[-1]
    with torch.no_grad():
        gain = _gain(block, consumer, block(dense.stem(images)))
    if "dinov2" in name:
        assert torch.allclose(gain, scale_of(block).detach().double(), atol=1e-6)
    else:
        assert gain is None
    cut = drift(dense, pruned, pictures(40, seed=9))
    assert all(entry.recovered_error < entry.cut_error for entry in recover(dense, pruned, pictures(300).split(50)))
    assert drift(dense, pruned, pictures(40, seed=9)) < 0.8 * cut


@pytest.mark.parametrize(("images", "few"), [(40, True), (400, True), (480, False)])
def test_the_last_block_is_fitted_on_all_tokens_where_those_that_the_head_reads_are_too_few(monkeypatch, images, few):
    """The MLP keeps 100 neurons, the head reads one token per image, and a tenth of the images is held out."""
    tower, calibration, new_images = redraw(timm_tower()), pictures(images), pictures(100, seed=1)
    fitted, _, table = prune(tower, [calibration], criterion="l2", keep=100)
    monkeypatch.setattr("dgmr_tp.pruning.recovery._images_needed", lambda *_: 0)
    by_class_token = prune(tower, [calibration], criterion="l2", keep=100).model

    def error(model):
        with torch.no_grad():
            expected, got = (adapt(each).features(last_state(adapt(each), new_images))[1] for each in (tower, model))
        return float((got - expected).square().mean())

    assert (error(fitted) < 0.5 * error(by_class_token)) == few
    assert [row.images_needed for row in table] == [None] * (len(table) - 1) + [444 if few else None]
    assert torch.equal(fitted.blocks[-1].mlp.fc2.weight, by_class_token.blocks[-1].mlp.fc2.weight) != few


@pytest.mark.parametrize(("keep", "needed"), [(1, 100), (20, 100), (23, 102), (100, 444), (101, 448)])
def test_the_number_of_images_that_is_named_is_the_smallest_that_is_enough(keep, needed):
    """Ten held-out tokens judge, which 100 images have."""
    tower = redraw(timm_tower())

    def last_site(images):
        return prune(tower, [pictures(images)], criterion="l2", keep=keep).table[-1]

    assert last_site(40).images_needed == last_site(needed - 1).images_needed == needed
    assert last_site(needed).images_needed is None


def test_towers_whose_tokens_are_used_are_fitted_on_all_of_them():
    state = torch.randn(2, 17, 48)
    tower = adapt(redraw(timm_tower()))
    assert (token_weights(tower, state, last=True) > 0).sum() == 1
    tower.gives_tokens = True
    assert torch.equal(token_weights(tower, state, last=True), token_weights(tower, state, last=False))


@pytest.mark.parametrize("honest", [True, False])
def test_a_layer_whose_held_out_error_does_not_fall_keeps_its_cut_weights(honest):
    """If not honest, the held-out targets are those of the cut weights, and the other images have different ones."""
    h, y, w, weight, bias = problem(3)
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight)), layer.bias.copy_(torch.from_numpy(bias))
        before = copy.deepcopy(layer.state_dict())
        held_out = moments_of(h, y if honest else h @ weight.T + bias + 0.1 * y, w)
        entry = _refit_layer("blocks.0.mlp", layer, torch.ones(5).double(), moments_of(h, y, w), held_out, damping=1e-3)
    assert entry.fit_rejected != honest
    assert (entry.recovered_error < entry.cut_error) == honest
    assert torch.equal(layer.weight, before["weight"]) != honest
    assert torch.equal(layer.bias, before["bias"]) != honest


@pytest.mark.parametrize("right", ["first", "second"])
def test_images_held_out_choose_between_two_targets(right):
    h, y, w, weight, bias = problem(4)
    other = y + 5 * np.random.default_rng(5).standard_normal(y.shape) * np.linspace(-1, 1, len(y))[:, None]
    first, second = (y, other) if right == "first" else (other, y)
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight)), layer.bias.copy_(torch.from_numpy(bias))
        fit, held_out = (
            moments_of(h, np.concatenate([first, second], axis=1), w),
            moments_of(h, np.concatenate([first, y], axis=1), w),
        )
        _refit_layer("blocks.0.mlp", layer, torch.ones(5).double(), fit, held_out, damping=1e-3)
    expected, _ = reference(h, y, w, weight, bias, 1e-3)
    wrong, _ = reference(h, other, w, weight, bias, 1e-3)
    assert np.allclose(layer.weight.detach(), expected, atol=1e-4) and not np.allclose(expected, wrong, atol=1e-2)


def test_half_precision_keeps_faint_channels_finite():
    """For a LayerScale near zero the refit would need weights above 65504, the maximum of float16."""
    tower = redraw(timm_tower())
    with torch.no_grad():
        for block in adapt(tower).blocks():
            scale_of(block)[::3] = 1e-7
    dense, pruned = pruned_pair(tower.half(), keep=24)
    report = recover(dense, pruned, [pictures(60).half()])
    assert any(not entry.fit_rejected for entry in report)
    assert all(torch.isfinite(parameter).all() for parameter in pruned.tower.parameters())
    assert all(np.isfinite(entry.recovered_error) for entry in report)
    layer = nn.Linear(12, 5).half()
    h, y, w, *_ = problem(3)
    moments = moments_of(h, 1e9 * y, w)
    entry = _refit_layer("blocks.0.mlp", layer, torch.ones(5).double(), moments, moments, damping=1e-3)
    assert entry.fit_rejected and torch.isfinite(layer.weight).all(), (
        "weights were written that the dtype cannot represent"
    )


def test_recovery_touches_nothing_but_the_last_linears(tower):
    dense, pruned = pruned_pair(tower, keep=48)
    pruned.tower.train()
    before = copy.deepcopy(pruned.tower.state_dict())
    original = copy.deepcopy(dense.tower.state_dict())
    recover(dense, pruned, [pictures(30)])
    changed = {name for name, tensor in pruned.tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.rsplit(".", 2)[1] in ("c_proj", "fc2") and ".mlp." in name for name in changed) and changed
    assert all(torch.equal(tensor, original[name]) for name, tensor in dense.tower.state_dict().items())
    assert pruned.tower.training and not dense.tower.training


def test_batches_do_not_matter(tower):
    weights = []
    for split in (7, 40):
        dense, pruned = pruned_pair(tower, keep=24)
        recover(dense, pruned, pictures(40).split(split))
        weights.append(torch.cat([parameter.flatten() for parameter in pruned.tower.parameters()]))
    assert torch.allclose(*weights, atol=1e-4)


def test_bf16_recovers(tower):
    dense, pruned = pruned_pair(tower.bfloat16(), keep=48)
    report = recover(dense, pruned, [pictures(100).bfloat16()])
    assert all(parameter.dtype == torch.bfloat16 for parameter in pruned.tower.parameters())
    assert any(entry.recovered_error < 0.8 * entry.cut_error for entry in report)


@pytest.mark.parametrize("images", [10, 19, 20])
def test_few_images_recover_every_block(images):
    """One or two images are held out. The head reads one token of each, and the last block has 16 neurons."""
    tower = redraw(timm_tower())
    dense, pruned = pruned_pair(tower, keep=8)
    cut = copy.deepcopy(pruned)
    report = recover(dense, pruned, [pictures(images)])
    for entry, block, cut_block in zip(report, pruned.blocks(), cut.blocks(), strict=True):
        assert entry.cut_error > 0.01 and not entry.fit_rejected and entry.recovered_error < entry.cut_error
        assert not torch.equal(linears(block)[-1].weight, linears(cut_block)[-1].weight)
    with torch.no_grad():  # the error of the last block, on all tokens of the held-out images
        held_out = pictures(images)[9::10]
        state, target = run_blocks(pruned.blocks()[:-1], pruned.stem(held_out)), last_state(dense, held_out)
        after = cut.blocks()[-1](state)
        consumer = linears(cut.blocks()[-1])[-1]
        consumer.weight.zero_(), consumer.bias.zero_()
        output = target - cut.blocks()[-1](state)
    weight = token_weights(dense, target, last=False)[:, None] / len(held_out)
    error = (weight * (target - after).square()).sum()
    variance = (weight * (output - (weight * output).sum((0, 1))).square()).sum()
    assert report[-1].cut_error == pytest.approx(float(error / variance), rel=1e-4)


def test_held_out_images_without_differences_are_refused(tower):
    images = pictures(10).repeat(10, 1, 1, 1)[[*range(9), 0] * 10]
    with pytest.raises(DgmrError, match=r"resblocks.2.mlp|blocks.2.mlp is the same for all held-out .* Give different"):
        recover(*pruned_pair(tower, keep=8), [images])


def test_error_of_a_constant_target():
    h, y = torch.randn(50, 4), torch.ones(50, 3)
    moments = moments_of(h.numpy(), y.numpy(), np.ones(50))
    assert moments.relative_error(torch.zeros(3, 4).double(), torch.ones(3).double()) == 0
    assert moments.relative_error(torch.zeros(3, 4).double(), torch.zeros(3).double()) == np.inf


def test_too_few_images_are_refused(tower):
    with pytest.raises(DgmrError, match="at least 10"):
        recover(*pruned_pair(tower, keep=48), [pictures(9)])


def test_non_finite_activations_are_refused(tower):
    images = pictures(20)
    images[3] = torch.inf
    with pytest.raises(DgmrError, match="not finite"):
        recover(*pruned_pair(tower, keep=48), [images])


def test_prune_in_one_call_leaves_the_original(tower):
    before = copy.deepcopy(tower.state_dict())
    model, plan, table = prune(tower, pictures(60).split(20), mlp_ratio=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    assert [row.num_kept for row in table] == [48] * 3
    assert {row.site for row in table} == set(plan.sites)
    assert all(row.recovered_error is not None for row in table)
    again = prune(tower, pictures(60).split(20), plan=plan)
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_pixels_that_are_not_preprocessed_are_refused(tower):
    pixels = torch.randint(0, 255, (16, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(DgmrError, match=r"a batch of images holds uint8 values, which are not preprocessed"):
        prune(tower, [pixels], keep=8)
