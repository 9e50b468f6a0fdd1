"""k-NN accuracy equals scikit-learn's votes, for any block size and number of processes."""

import json
import os
import subprocess

import pytest
import torch
from conftest import BIN, call_command, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dgmr_tp import DgmrError, open_model
from dgmr_tp.data import scenes
from dgmr_tp.data.images import Images
from dgmr_tp.evaluation.knn import NEIGHBORS, knn_accuracy
from dgmr_tp.pipeline.run import Run
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.knn import nearest, nearest_classes


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 40), st.integers(0, 1000))
def test_votes_are_scikit_learns(size, count, block, seed):
    random = torch.Generator().manual_seed(seed)
    bank, queries = (torch.randn(n, 5, generator=random, dtype=torch.float64) for n in (size, 20))
    classes = torch.randint(4, (size,), generator=random)
    weigh = lambda distance: torch.exp((1 - torch.from_numpy(distance)) / 0.07).numpy()  # noqa: E731
    reference = KNeighborsClassifier(min(count, size), metric="cosine", weights=weigh, algorithm="brute").fit(
        bank, classes
    )
    assert nearest_classes(bank, classes, queries, count).tolist() == reference.predict(queries).tolist()
    similar, index = nearest(bank, queries, count, block)
    distance, rows = reference.kneighbors(queries)
    assert torch.allclose(similar, 1 - torch.from_numpy(distance), atol=1e-9) and index.tolist() == rows.tolist()


def test_the_temperature_decides_between_one_close_and_many_far():
    """A similarity of 0.914 has exp(−0.086 / 0.07) = 0.29 votes of a similarity of 1. Four outvote it, three do not."""
    bank, classes = torch.tensor([[1.0, 0.0]] + 4 * [[0.9, 0.4]]), torch.tensor([0, 1, 1, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert nearest_classes(bank, classes, query).item() == 1
    assert nearest_classes(bank[:4], classes[:4], query).item() == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("knn")
    scenes.write_classification(root / "train", 260, seed=11)
    scenes.write_classification(root / "test", 50, seed=12)
    return root


def test_the_accuracy_of_an_encoder_is_the_one_computed_by_hand(folders):
    opened = open_model("demo")
    train, test = Images.find(folders / "train"), Images.find(folders / "test")
    test.records = [r for r in test.records if r.class_name() in {r.class_name() for r in train.records}]
    figures = knn_accuracy(ImageEncoder(opened.adapter), opened.preprocess, train=train, test=test, batch_size=32)
    with torch.no_grad():
        embed = lambda images: opened.module.visual(torch.stack([opened.preprocess(r.read()) for r in images.records]))  # noqa: E731
        bank, queries = embed(train), embed(test)
    labels = [int(r.class_name()) for r in test.records]
    for count in NEIGHBORS:
        predictions = nearest_classes(
            bank, torch.tensor([int(r.class_name()) for r in train.records]), queries, count
        ).tolist()
        assert figures[f"knn@{count}"] == pytest.approx(
            sum(a == b for a, b in zip(predictions, labels, strict=True)) / len(labels)
        )
    assert 0.1 < figures["knn@10"] < 1
    few = Images.find(folders / "train")
    few.records = few.records[:15]
    test.records = [r for r in test.records if r.class_name() in {r.class_name() for r in few.records}]
    assert list(knn_accuracy(ImageEncoder(opened.adapter), opened.preprocess, train=few, test=test)) == ["knn@10"]


def test_images_that_do_not_decode_are_left_out_and_named(folders, tmp_path):
    for i, record in enumerate(Images.find(folders / "test").records):
        (tmp_path / "images" / record.class_name()).mkdir(parents=True, exist_ok=True)
        record.read().save(tmp_path / "images" / record.class_name() / f"{i}.png")
    damaged = tmp_path / "images" / record.class_name() / "damaged.png"
    damaged.write_bytes(b"no image")
    options = [
        "--knn-train",
        tmp_path / "images",
        "--knn-test",
        tmp_path / "images",
        "--workers",
        1,
        "-o",
        tmp_path / "found",
    ]
    done = call_command("eval", "demo", *options)
    assert done.returncode == 0, done.stderr
    assert (
        f"1 of 51 images of {tmp_path / 'images'} do not decode and are left out; the first: {damaged}: " in done.stdout
    )
    assert json.loads((tmp_path / "found" / "demo-knn.json").read_text())["images_left_out"] == 2  # of both sides


def test_images_without_a_class_and_unknown_classes_are_named(folders, tmp_path):
    for name in ("train/cat", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "b.png")
    train, test, none = Images.find(tmp_path / "train"), Images.find(tmp_path / "test"), Images.find(tmp_path / "flat")
    embed = lambda images: images.flatten(1)  # noqa: E731
    with pytest.raises(DgmrError, match=r"has the class 'dog', which is missing in .*train"):
        knn_accuracy(embed, lambda image: torch.ones(3, 2, 2), train=train, test=test)
    with pytest.raises(DgmrError, match=r"b\.png has no class"):
        knn_accuracy(embed, lambda image: torch.ones(3, 2, 2), train=train, test=none)


def test_a_recipe_evaluates_an_encoder_without_text_tower_by_knn(tmp_path):
    knn = {"train": "scenes:images", "test": "scenes:classes"}
    small = {"images": 400, "classes": 20, "captions": 10}
    run = Run(recipe(scenes=small, evaluate={"knn": knn}, distill=None, export=None), tmp_path / "run")
    run.run(say=lambda line: None)
    original, sized = run.run_directory.figures("evaluate/dense"), run.run_directory.figures("evaluate/mlp_ratio-1")
    assert 0 < original["dense"]["k-NN"]["knn@20"] <= 1
    assert sized["recovered"]["k-NN"]["knn@10"] >= sized["pruned"]["k-NN"]["knn@10"]
    with pytest.raises(DgmrError, match="nothing is evaluated; give datasets, knn or head"):
        recipe(evaluate={})


@pytest.mark.slow
def test_two_processes_give_one_processes_numbers(folders, tmp_path):
    options = ["demo", "--knn-train", folders / "train", "--knn-test", tmp_path / "test"]
    train_classes = {r.class_name() for r in Images.find(folders / "train").records}
    for i, record in enumerate(r for r in Images.find(folders / "test").records if r.class_name() in train_classes):
        (tmp_path / "test" / record.class_name()).mkdir(parents=True, exist_ok=True)
        record.read().save(tmp_path / "test" / record.class_name() / f"{i}.png")
    one = call_command("eval", *options, "-o", tmp_path / "one")
    assert one.returncode == 0 and "knn@20" in one.stdout, one.stderr
    program = [
        str(BIN / "torchrun"),
        "--nproc_per_node",
        "2",
        str(BIN / "dgmr-tp"),
        "eval",
        *map(str, options),
        "-o",
        str(tmp_path / "two"),
    ]
    two = subprocess.run(
        program, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert two.returncode == 0 and two.stdout.count("knn@20 ") == 1, two.stderr[-3000:]
    assert (tmp_path / "one" / "demo-knn.json").read_text() == (tmp_path / "two" / "demo-knn.json").read_text()


def test_the_command_wants_one_kind_of_evaluation():
    done = call_command("eval", "demo", "--knn-train", "x")
    assert done.returncode == 2 and "--dataset and --root, or --knn-train and --knn-test" in done.stderr
