"""The quickstart recipe: the accuracies that the README states."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command

from dgmr_tp import open_model, prune
from dgmr_tp.data import scenes
from dgmr_tp.evaluation.zero_shot import evaluate
from dgmr_tp.pipeline.stages.scenes import SCENE_SEEDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    result = run_command("run", ROOT / "recipes" / "quickstart.yaml", "-o", directory)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return directory


def top1(directory, size, label):
    """Return the top-1 accuracy that a run measured."""
    stage_folder = "export" if label == "onnx" else "evaluate"
    return json.loads((directory / stage_folder / size / f"{label}-wds_scenes.json").read_text())["metrics"]["acc1"]


def test_the_teacher_is_good(quickstart):
    directory = quickstart
    assert top1(directory, "dense", "dense") >= 0.9
    retrieval = json.loads((directory / "evaluate/dense/dense-wds_captions.json").read_text())["metrics"]
    assert retrieval["text_retrieval_recall@5"] >= 0.8


def test_at_hidden_equal_to_width(quickstart):
    directory = quickstart
    teacher = top1(directory, "dense", "dense")
    assert top1(directory, "mlp_ratio-1", "recovered") >= 0.97 * teacher
    assert top1(directory, "mlp_ratio-1", "distilled") >= teacher - 0.005
    assert top1(directory, "mlp_ratio-1", "onnx") == top1(directory, "mlp_ratio-1", "distilled")


def test_distillation_closes_half_of_the_gap_at_a_quarter_of_the_width(quickstart):
    teacher = top1(quickstart, "dense", "dense")
    recovered, distilled = (top1(quickstart, "mlp_ratio-0.25", label) for label in ("recovered", "distilled"))
    assert recovered < teacher - 0.01, "there is no gap to close"
    assert distilled - recovered >= 0.5 * (teacher - recovered)


def test_random_selection_loses_twenty_points(tmp_path):
    scenes.write_classification(tmp_path / "classes", 500, seed=77)
    dense = open_model("demo")
    models = {"dense": dense, "random": prune(dense, criterion="random", mlp_ratio=1, seed=0).model}
    scores = {}
    for name, model in models.items():
        options = {"dataset": "wds/x", "root": tmp_path / "classes", "output": tmp_path / f"{name}.json", "name": name}
        scores[name] = evaluate(model.module, model.preprocess, model.tokenizer, **options)["acc1"]
    assert scores["dense"] - scores["random"] >= 0.2


def test_the_images_of_the_quickstart_are_not_those_of_the_training():
    assert not {1, 2} & set(SCENE_SEEDS.values()) and len(set(SCENE_SEEDS.values())) == len(SCENE_SEEDS)
    assert not np.array_equal(scenes.Scene.draw(1, 0).image(), scenes.Scene.draw(SCENE_SEEDS["classes"], 0).image())
