"""The re-implementation of CORP in the benchmarks against scikit-learn's ridge regression."""

import numpy as np
import pytest
import torch
from conftest import pictures, redraw, timm_tower
from corp import collect, compensate, compensated, make_plan, shrinkage_ridge
from sklearn.linear_model import Ridge

from dgmr_tp import prune
from dgmr_tp.encoders import wrap_tower
from dgmr_tp.pruning.calibration import record_inputs


@pytest.fixture
def model():
    return wrap_tower(redraw(timm_tower()))


@torch.no_grad()
def hidden_rows(model, site, images):
    layer = model.tower.get_submodule(site.consumer)
    with record_inputs(layer) as inputs:
        model.tower(images)
    return inputs[layer].flatten(0, 1).double().numpy()


def test_statistics_are_those_of_all_tokens(model):
    images = pictures(24)
    statistics = collect(model, list(images.split(8)))
    for site in model.sites:
        rows, found = hidden_rows(model, site, images), statistics[site.name]
        assert found.count == len(rows)
        assert np.allclose(found.mean, rows.mean(0), atol=1e-6)
        assert np.allclose(found.covariance, np.cov(rows.T, bias=True), atol=1e-5)
        energy = (rows**2).mean(0)
        active = np.concatenate(
            [abs(part) > 0.01 * np.sqrt((part**2).mean()) for part in np.split(rows, 3)]
        )  # per batch
        assert np.allclose(found.active_energy, energy * active.mean(0), rtol=1e-4)


def test_the_last_linear_predicts_what_ridge_regression_predicts(model):
    images, [site, *_] = pictures(24), model.sites
    statistics = collect(model, [images])[site.name]
    kept, layer = list(range(0, 192, 4)), model.tower.get_submodule(site.consumer)
    removed = sorted(set(range(192)) - set(kept))
    rows = hidden_rows(model, site, images)
    ridge = shrinkage_ridge(statistics.covariance[kept][:, kept], len(rows))
    regression = Ridge(alpha=ridge * len(rows)).fit(rows[:, kept], rows[:, removed])
    weight, bias = compensate(layer, kept, statistics)
    full = np.empty_like(rows)
    full[:, kept], full[:, removed] = rows[:, kept], regression.predict(rows[:, kept])
    expected = full @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    got = rows[:, kept] @ weight.detach().numpy().T + bias.detach().numpy()
    assert np.allclose(got, expected, atol=1e-5)
    other = Ridge(alpha=10 * ridge * len(rows)).fit(rows[:, kept], rows[:, removed])
    assert not np.allclose(other.predict(rows[:, kept]), full[:, removed], atol=1e-3)


@pytest.mark.parametrize("count", [30, 3000])
def test_the_ridge_is_oracle_approximating_shrinkage(count):
    rows = np.random.default_rng(0).standard_normal((count, 8)) * np.arange(1, 9)
    covariance = np.cov(rows.T, bias=True)
    p, square = 8, np.trace(covariance @ covariance)
    intensity = ((1 - 2 / p) * square + np.trace(covariance) ** 2) / (
        (count + 1 - 2 / p) * (square - np.trace(covariance) ** 2 / p)
    )
    assert intensity < 1
    expected = intensity * np.trace(covariance) / p
    assert shrinkage_ridge(torch.from_numpy(covariance), count) == pytest.approx(expected)
    assert shrinkage_ridge(torch.eye(8).double(), count) == 1  # a multiple of the identity needs nothing else


def test_a_compensated_tower_is_nearer_to_the_dense_one(model):
    statistics = collect(model, [pictures(100)])
    plan = make_plan(model, statistics, {site.name: 48 for site in model.sites})
    scores = statistics[model.sites[0].name].active_energy
    kept = list(plan.sites[model.sites[0].name].kept)
    assert scores[kept].min() >= np.delete(scores.numpy(), kept).max()
    tower, cut = compensated(model, plan, statistics), prune(model.tower, plan=plan).model
    with torch.no_grad():
        dense, near, far = (each(pictures(30, seed=9)) for each in (model.tower, tower, cut))
    assert (near - dense).norm() < 0.8 * (far - dense).norm()
