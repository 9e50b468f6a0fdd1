"""Recipes: what a person writes wrong is named with its line and the nearest right key."""

import json
from pathlib import Path

import pytest

from dgmr_tp.errors import DgmrError
from dgmr_tp.recipe import load_recipe, parse_recipe

GOOD = """\
name: test
model: demo
images: IMAGES
prune:
  mlp_ratio: 1
evaluate:
  datasets:
    - {dataset: wds/x, root: DATA}
"""
SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_good_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.model.source == "demo" and recipe.prune.sizes == {"mlp_ratio-1": {"mlp_ratio": 1.0}}
    assert recipe.distill is None and recipe.recover is None


def test_budgets_are_sizes_with_their_limits_in_the_name(tmp_path):
    text = GOOD.replace("mlp_ratio: 1", "budget: [{params: 0.5}, {params: 0.4, flops: 2.0e+9}]\n  round_to: 8")
    assert load_recipe(write(tmp_path, text)).prune.sizes == {
        "params-0.5": {"budget": {"params": 0.5}, "round_to": 8},
        "params-0.4-flops-2e+09": {"budget": {"params": 0.4, "flops": 2e9}, "round_to": 8},
    }


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mlp_ratio", "mlp_ratoi", r"line 5: unknown key prune\.mlp_ratoi; did you mean mlp_ratio"),
        ("images:", "image:", r"line 3: unknown key image; did you mean images"),
        ("dataset:", "datset:", r"line 8: unknown key evaluate\.datasets\.0\.datset; did you mean dataset"),
        ("images: IMAGES\n", "", r"the key images is missing"),
        ("mlp_ratio: 1", "mlp_ratio: wide", r"line 5: prune\.mlp_ratio: .*number.*'wide'"),
        ("mlp_ratio: 1", "mlp_ratio: 0", r"line 4: prune: mlp_ratio must be above 0"),
        ("mlp_ratio: 1", "mlp_ratio: 1\n  search: {images: 600}", r"line 4: prune: search is about a threshold"),
        ("mlp_ratio: 1", "threshold: 0.1", r"line 4: prune: threshold is for criterion: amp"),
        (
            "mlp_ratio: 1",
            "criterion: amp\n  threshold: 0.1\n  search: {images: 9}",
            r"prune.search: images = 9 make no group of candidates = 512",
        ),
        ("mlp_ratio: 1", "budget: {params: 0}", r"line 4: prune: params must be above 0, got 0"),
        ("mlp_ratio: 1", "mlp_ratio: 1\n  budget: {params: 0.5}", r"line 4: prune: give one of"),
        ("mlp_ratio: 1", "criterion: dgmr", r"line 4: prune: give one of mlp_ratio, keep_ratio, budget"),
        ("mlp_ratio: 1", "mlp_ratio: 1\n  criterion: best", r"line 6: prune\.criterion: .*'dgmr'.*got 'best'"),
        ("IMAGES", "scenes:images", r"no section scenes"),
        ("prune:", "recover: {images: 3}\nprune:", r"line 4: recover\.images: .*10, got 3"),
        ("prune:", "distill: {steps: 1, batch_size: 3, processes: 2, base_lr: 1}\nprune:", r"3 cannot be divided over .* 2"),
        ("model: demo", "model: {source: [", r"line \d+: this is no YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, says):
    with pytest.raises(DgmrError, match=says):
        load_recipe(write(tmp_path, GOOD.replace(old, new)))


def test_a_recipe_that_is_no_mapping_or_not_there(tmp_path):
    with pytest.raises(DgmrError, match="mapping"):
        load_recipe(write(tmp_path, "- just\n- a list\n"))
    with pytest.raises(DgmrError, match="cannot read"):
        load_recipe(tmp_path / "nothing.yaml")


def test_values_come_from_the_environment(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD.replace("IMAGES", "${DATA_FOR_TEST}/train"))
    monkeypatch.delenv("DATA_FOR_TEST", raising=False)
    with pytest.raises(DgmrError, match="DATA_FOR_TEST is not set"):
        load_recipe(path)
    monkeypatch.setenv("DATA_FOR_TEST", "/data")
    assert load_recipe(path).images == "/data/train"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, monkeypatch):
    for name in ("CIFAR10_DIR", "IMAGENET_DIR", "CIFAR10_CLIP", "EVA_CLIP_8B", "INTERNVIT_6B"):
        monkeypatch.setenv(name, "/somewhere")
    assert load_recipe(path).name == path.stem


def test_a_recipe_reads_back_what_it_writes(tmp_path):
    """A run directory keeps its recipe with every default written out."""
    for amount in ("mlp_ratio: 1", "criterion: amp\n  threshold: 0.1\n  search: {candidates: 9}", "budget: {params: 0.5}"):
        recipe = load_recipe(write(tmp_path, GOOD.replace("mlp_ratio: 1", amount)))
        assert parse_recipe(json.loads(recipe.model_dump_json()), tmp_path) == recipe
