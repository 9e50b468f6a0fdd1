"""Recipes: validation errors, and how ``base``, ``--set`` and names of shipped recipes resolve to one recipe.

A validation error names the line and the nearest valid key.
"""

import json
import re
from pathlib import Path

import pytest

from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.recipe import load_recipe, parse_recipe

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
ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


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
    widths = GOOD.replace("mlp_ratio: 1", "keep: [96, 48]")
    assert load_recipe(write(tmp_path, widths)).prune.sizes == {"keep-96": {"keep": 96}, "keep-48": {"keep": 48}}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mlp_ratio", "mlp_ratoi", r"line 5: unknown key prune\.mlp_ratoi\. Did you mean mlp_ratio"),
        ("images:", "image:", r"line 3: unknown key image\. Did you mean images"),
        ("dataset:", "datset:", r"line 8: unknown key evaluate\.datasets\.0\.datset\. Did you mean dataset"),
        ("images: IMAGES\n", "", r"the key images is missing"),
        ("mlp_ratio: 1", "mlp_ratio: wide", r"line 5: prune\.mlp_ratio: .*number.*'wide'"),
        ("mlp_ratio: 1", "mlp_ratio: 0", r"line 4: prune: mlp_ratio must be above 0"),
        ("mlp_ratio: 1", "mlp_ratio: 1\n  search: {images: 600}", r"line 4: prune: search belongs to a threshold"),
        ("mlp_ratio: 1", "threshold: 0.1", r"line 4: prune: threshold is for criterion: amp"),
        (
            "mlp_ratio: 1",
            "criterion: amp\n  threshold: 0.1\n  search: {images: 9}",
            r"prune.search: images = 9 make no group of candidates = 512",
        ),
        ("mlp_ratio: 1", "budget: {params: 0}", r"line 4: prune: params must be above 0, got 0"),
        (
            "mlp_ratio: 1",
            "budget: {parameters: 0.5}",
            r"line 4: prune: a budget has one or more of params, flops, latency, got",
        ),
        ("mlp_ratio: 1", "budget: {}", r"line 4: prune: a budget has one or more of params, flops, latency, got {}"),
        ("mlp_ratio: 1", "keep_ratio: 2", r"line 4: prune: keep_ratio must be at most 1, got 2"),
        (
            "root: DATA}",
            "root: DATA}\n    - {dataset: wds/x, root: OTHER}",
            r"line 6: evaluate: datasets names wds/x twice",
        ),
        (
            "mlp_ratio: 1",
            "mlp_ratio: 1\n  budget: {params: 0.5}",
            r"line 4: prune: exactly one of .* got mlp_ratio, budget",
        ),
        ("mlp_ratio: 1", "criterion: dgmr", r"line 4: prune: give one of mlp_ratio, keep_ratio, keep, budget"),
        (
            "mlp_ratio: 1",
            "mlp_ratio: 1\n  criterion: best",
            r"line 6: prune\.criterion: unknown name; use one of dgmr, .*got 'best'",
        ),
        ("IMAGES", "scenes:images", r"no section scenes"),
        ("prune:", "recover: {images: 3}\nprune:", r"line 4: recover\.images: .*10, got 3"),
        (
            "prune:",
            "distill: {steps: 1, batch_size: 3, processes: 2, base_lr: 1}\nprune:",
            r"3 cannot be divided over .* 2",
        ),
        ("model: demo", "model: {source: [", r"line \d+: this is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    with pytest.raises(DgmrError, match=message):
        load_recipe(write(tmp_path, GOOD.replace(old, new)))


def test_a_recipe_that_is_no_mapping_or_not_there(tmp_path):
    with pytest.raises(DgmrError, match="mapping"):
        load_recipe(write(tmp_path, "- just\n- a list\n"))
    with pytest.raises(DgmrError, match=r"there is no recipe .*nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_values_come_from_the_environment(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD.replace("IMAGES", "${DATA_FOR_TEST}/train"))
    monkeypatch.delenv("DATA_FOR_TEST", raising=False)
    with pytest.raises(DgmrError, match="DATA_FOR_TEST is not set"):
        load_recipe(path)
    assert load_recipe(path, to_run=False).images == "${DATA_FOR_TEST}/train"
    with pytest.raises(DgmrError, match="DATA_FOR_TEST is not set"):
        load_recipe(write(tmp_path, GOOD.replace("demo", "${DATA_FOR_TEST}")), to_run=False)
    write(tmp_path, GOOD.replace("IMAGES", "${DATA_FOR_TEST}/train"))
    monkeypatch.setenv("DATA_FOR_TEST", "/data")
    assert load_recipe(path).images == "/data/train"


def test_a_recipe_extends_another_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD + "recover: {images: 64, damping: 0.01}\n")
    child = tmp_path / "child.yaml"
    child.write_text(
        "base: base.yaml\nprune: {mlp_ratio: null, keep: 8}\nrecover: {images: 32, damping: null}\nevaluate: null\n"
    )
    recipe = load_recipe(child)
    assert recipe.name == "child" and recipe.images == "IMAGES"  # the name is not inherited
    assert recipe.prune.sizes == {"keep-8": {"keep": 8}} and recipe.evaluate is None
    assert recipe.recover.images == 32 and recipe.recover.damping == 1e-3  # null restores the default
    assert load_recipe(tmp_path / "base.yaml").recover.images == 64
    child.write_text("base: base.yaml\nprune:\n  keep: 8\n")
    with pytest.raises(DgmrError, match=r"child\.yaml, line 2: prune: exactly one of .* got mlp_ratio, keep"):
        load_recipe(child)
    child.write_text("base: base.yaml\nrecover:\n  imags: 8\n")
    with pytest.raises(DgmrError, match=r"child\.yaml, line 3: unknown key recover\.imags\. Did you mean images"):
        load_recipe(child)
    (tmp_path / "base.yaml").write_text(GOOD.replace("mlp_ratio: 1", "mlp_ratio: wide"))
    child.write_text("base: base.yaml\nseed: 1\n")
    with pytest.raises(DgmrError, match=r"base\.yaml, line 5: prune\.mlp_ratio"):
        load_recipe(child)
    child.write_text("base: child.yaml\n")
    with pytest.raises(DgmrError, match="extends itself"):
        load_recipe(child)


def test_keys_are_set_on_the_command_line(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["prune.mlp_ratio=[2, 0.5]", "recover.images=64", "evaluate=null", "seed=3"])
    assert list(recipe.prune.sizes) == ["mlp_ratio-2", "mlp_ratio-0.5"] and recipe.recover.images == 64
    assert recipe.evaluate is None and recipe.seed == 3
    for override, message in (
        ("prune.mlp_ratoi=1", r"--set prune\.mlp_ratoi: unknown key prune\.mlp_ratoi\. Did you mean mlp_ratio"),
        ("prune.mlp_ratio=0", r"mlp_ratio must be above 0, got 0"),
        ("recover.images=3", r"--set recover\.images: recover\.images: .*10, got 3"),
        ("seed", r"--set seed: write it as key=value"),
        ("seed=[", r"--set seed=\[: the value is not YAML"),
    ):
        with pytest.raises(DgmrError, match=message):
            load_recipe(path, [override])


def test_recipes_of_the_package_are_found_by_name(monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", "/somewhere")
    assert load_recipe("quickstart") == load_recipe(SHIPPED[0].parent / "quickstart.yaml")
    assert load_recipe("ViT-g-14-output").prune.criterion == "output"
    with pytest.raises(DgmrError, match=r"there is no recipe quikstart.*Did you mean quickstart\?"):
        load_recipe("quikstart")


@pytest.mark.parametrize("path", [*SHIPPED, *EXAMPLES], ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, monkeypatch):
    for name in re.findall(r"\$\{(\w+)\}", "".join(file.read_text() for file in [*SHIPPED, *EXAMPLES])):
        monkeypatch.setenv(name, "/somewhere")
    assert load_recipe(path).name == path.stem


EPOCH = 1_281_167
"""Number of training images in ImageNet-1K, on which the papers distill all encoders."""
TABLES = {
    # DGMR's released configurations: base and final learning rate, batch size, epochs, warm-up epochs, weight decay
    # (first and last), moving average, minimum crop, MLP ratio.
    "ViT-g-14": (1e-4, 1e-6, 8 * 40, 10, 1, (0.04, 0.2), None, 0.2, 1),
    "EVA02-E-14-plus": (6e-5, 1e-6, 8 * 40, 10, 2, (0.04, 0.2), None, 0.2, 1),
    "EVA02-E-14-plus-r2": (6e-5, 1e-6, 8 * 16, 20, 2, (0.04, 0.2), None, 0.2, 2),
    "DINOv2-g": (7.5e-6, 1e-7, 8 * 64, 10, 1, (0.04, 0.2), 0.997, 0.05, 1),
    # AMP's table 8, in the same order. The last entry is the threshold, 1 / temperature and the number of candidates.
    "ViT-g-14-amp": (5e-5, 1e-7, 512, 10, 1, (0.0, None), None, 0.2, (0.01, 15, 1024)),
    "ViT-bigG-14-amp": (2e-5, 1e-6, 512, 10, 1, (0.0, None), None, 0.2, (2e-4, 15, 1024)),
    "EVA02-E-14-plus-amp": (1e-5, 1e-6, 512, 10, 1, (0.0, None), None, 0.2, (2e-3, 20, 512)),
    "EVA-CLIP-8B-amp": (1e-5, 1e-6, 160, 10, 1, (0.0, None), None, 0.2, (0.02, 20, 512)),
    "DINOv2-g-amp": (7e-6, 1e-7, 512, 10, 1, (0.0, None), None, 0.05, (0.01, 20, 1024)),
}


@pytest.mark.parametrize("name", TABLES)
def test_recipes_have_the_papers_hyper_parameters(name, monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", "/somewhere")
    monkeypatch.setenv("EVA_CLIP_8B", "/somewhere")
    loaded, (base_lr, final_lr, batch, epochs, warmup_epochs, weight_decay, ema, min_crop, size) = (
        load_recipe(SHIPPED[0].parent / f"{name}.yaml"),
        TABLES[name],
    )
    distill = loaded.distill
    assert (distill.base_lr, distill.min_lr, distill.batch_size) == (base_lr, final_lr, batch)
    assert distill.steps == pytest.approx(epochs * EPOCH / batch, rel=1e-3)
    assert distill.warmup_steps == pytest.approx(warmup_epochs * EPOCH / batch, rel=1e-3)
    assert ((distill.weight_decay, distill.final_weight_decay), distill.ema, distill.min_crop) == (
        weight_decay,
        ema,
        min_crop,
    )
    assert distill.bf16 and distill.flip and (distill.loss.class_token, distill.loss.patches) == (1, 1)
    if isinstance(size, tuple):
        search = loaded.prune.search
        assert (loaded.prune.threshold, search.candidates) == (size[0], size[2])
        assert search.temperature == pytest.approx(1 / size[1], rel=1e-4) and not search.two_sided
    else:
        assert (loaded.prune.criterion, loaded.prune.mlp_ratio) == ("dgmr", size)
    assert distill.augment == ("dinov2" if name.startswith("DINO") else "clip")


def test_a_recipe_reads_back_what_it_writes(tmp_path):
    """A run directory stores its recipe with every default written out."""
    for amount in (
        "mlp_ratio: 1",
        "criterion: amp\n  threshold: 0.1\n  search: {candidates: 9}",
        "budget: {params: 0.5}",
    ):
        recipe = load_recipe(write(tmp_path, GOOD.replace("mlp_ratio: 1", amount)))
        assert parse_recipe(json.loads(recipe.model_dump_json()), tmp_path) == recipe


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = (
        GOOD.replace("IMAGES", "~/pics")
        .replace("DATA", "~/data")
        .replace("demo", "{source: ~/model, pretrained: ~/w.pt}")
    )
    recipe = load_recipe(write(tmp_path, text), ["recover.images=20"])
    assert (recipe.images, recipe.evaluate.datasets[0].root) == ("/home/me/pics", "/home/me/data")
    assert (recipe.model.source, recipe.model.pretrained) == ("/home/me/model", "/home/me/w.pt")
    assert load_recipe(tmp_path / "recipe.yaml", ["images=~/other"]).images == "/home/me/other"
