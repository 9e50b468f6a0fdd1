"""Linear classifiers on embeddings: the encoder's own, one from a file, and one fitted to the dense encoder."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call_command, recipe
from families import FAMILIES
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.data.images import Images
from dgmr_tp.evaluation.linear_head import check_classifier, fit_head, head_accuracy, read_head
from dgmr_tp.pipeline.run import Run
from dgmr_tp.pruning import ImageEncoder

OPTIONS = {"device": "cpu", "batch_size": 16}


def classes(root, names, each, seed):
    """Write directories of noisy images, with a mean color per class."""
    generator = np.random.default_rng(seed)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        color = np.random.default_rng(number).uniform(60, 190, 3)
        for index in range(each):
            picture = (
                (color + generator.normal(0, 60, (64, 64, 3)) + generator.normal(0, 25, 3)).clip(0, 255).astype("uint8")
            )
            Image.fromarray(picture).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, names = tmp_path_factory.mktemp("head"), [f"n{i:02}" for i in range(10)]
    return classes(root / "train", names, 12, 1), classes(root / "test", names, 6, 2)


@pytest.fixture(scope="module")
def demo():
    return open_model("demo")


@torch.no_grad()
def embed_images(opened, folder):
    images = Images.find(folder)
    pictures = torch.stack([opened.preprocess(record.read()) for record in images.records])
    return ImageEncoder(opened.adapter)(pictures), images.classes()


def accuracy(opened, head, folder):
    return head_accuracy(
        ImageEncoder(opened.adapter), opened.preprocess, head=head, test=Images.find(folder), **OPTIONS
    )


def test_the_classifier_of_a_timm_model(data, tmp_path):
    FAMILIES["timm ViT"](tmp_path / "model")
    opened = open_model(str(tmp_path / "model"))
    opened.module.eval()
    logits, names = embed_images(opened, data[1])
    answers = torch.tensor([int(name[1:]) for name in names])
    figures = accuracy(opened, None, data[1])
    assert logits.shape[1] == 10 and figures["head@1"] == pytest.approx(
        float((logits.argmax(1) == answers).float().mean())
    )
    assert figures["head@5"] == pytest.approx(float((logits.topk(5).indices == answers[:, None]).any(1).float().mean()))
    assert figures["head@1"] < figures["head@5"] < 1
    with pytest.raises(
        DgmrError, match=r"has 3 classes, up to c, but there are 10 outputs. Give images of all classes"
    ):
        accuracy(opened, None, classes(tmp_path / "few", "abc", 1, 0))


@pytest.mark.parametrize("prefix", ["", "linear."])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_head_from_a_file(demo, data, tmp_path, prefix, ending):
    embeddings, names = embed_images(demo, data[1])
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(10, embeddings.shape[1], generator=generator),
        "bias": 5 * torch.randn(10, generator=generator),
    }
    path = tmp_path / f"head.{ending}"
    stored = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(stored, path) if ending == "safetensors" else torch.save(stored, path)
    expected = F.linear(embeddings, **tensors).argmax(1)
    numbers = np.array([int(name[1:]) for name in names])

    def share_right(predictions):
        return np.mean(numbers == predictions.numpy())

    assert accuracy(demo, read_head(path), data[1])["head@1"] == pytest.approx(share_right(expected))
    assert share_right(expected) != share_right(F.linear(embeddings, tensors["weight"]).argmax(1)), "the bias matters"


def test_a_file_that_is_no_head_is_refused(demo, data, tmp_path):
    for name, tensors, message in (
        (
            "more",
            {"weight": torch.ones(2, 3), "bias": torch.ones(2), "other": torch.ones(1)},
            "it contains bias, other, weight",
        ),
        ("apart", {"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "Give a file with weight .* and bias"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(DgmrError, match=rf"{name}\.safetensors is not a linear head: .*{message}"):
            read_head(tmp_path / f"{name}.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    with pytest.raises(DgmrError, match=r"damaged\.pth is not a linear head"):
        read_head(tmp_path / "damaged.pth")
    save_file({"weight": torch.ones(10, 7), "bias": torch.ones(10)}, tmp_path / "narrow.safetensors")
    with pytest.raises(DgmrError, match=r"takes embeddings of width 7, and the encoder's have width"):
        accuracy(demo, read_head(tmp_path / "narrow.safetensors"), data[1])


@pytest.mark.parametrize("count", [2, 10])
def test_a_head_fitted_to_the_original_tells_how_far_a_pruned_encoder_drifted(demo, data, tmp_path, count):
    train, test = (
        classes(tmp_path / name, [f"n{i:02}" for i in range(count)], each, seed)
        for name, each, seed in (("a", 12, 1), ("b", 9, 2))
    )
    head = fit_head(ImageEncoder(demo.adapter), demo.preprocess, Images.find(train), **OPTIONS)
    unit = lambda part: F.normalize(part, dim=-1).numpy()  # noqa: E731
    (train_embeddings, names), (embeddings, answers) = embed_images(demo, train), embed_images(demo, test)
    small = prune(demo, criterion="random", mlp_ratio=0.25).model
    references = [LogisticRegression(max_iter=1000, C=c).fit(unit(train_embeddings), names) for c in (1, 10, 100, 1000)]
    expected = [
        tuple(r.score(unit(part), answers) for part in (embeddings, embed_images(small, test)[0])) for r in references
    ]
    dense_accuracy, pruned_accuracy = (accuracy(opened, head, test)["head@1"] for opened in (demo, small))
    assert (
        any((dense_accuracy, pruned_accuracy) == pytest.approx(pair, abs=1e-6) for pair in expected)
        and dense_accuracy > 1.4 / count
    )
    assert count == 2 or pruned_accuracy < dense_accuracy
    with pytest.raises(DgmrError, match="has the class 'zebra', which is missing in the head"):
        accuracy(demo, head, classes(tmp_path / "z", ["zebra"], 1, 0))


def test_what_is_no_answer_is_not_right(demo, data, tmp_path):
    test, options = Images.find(data[1]), OPTIONS
    with pytest.raises(DgmrError, match=r"embeddings of .* are not finite"):
        head_accuracy(
            lambda images: torch.full((len(images), 10), torch.nan), demo.preprocess, head=None, test=test, **options
        )
    assert (
        head_accuracy(lambda images: torch.ones(len(images), 10), demo.preprocess, head=None, test=test, **options)[
            "head@1"
        ]
        == 0
    )
    with pytest.raises(DgmrError, match=r"demo has no classifier. Give the weights of a linear head"):
        check_classifier(demo)
    done = call_command("eval", "demo", "--head-test", data[1], "-o", tmp_path / "out")
    assert done.returncode == 2 and "has no classifier." in done.stderr
    with pytest.raises(DgmrError, match=r"has no classifier\. "):
        Run(recipe(evaluate={"head": {"test": str(data[1])}}), tmp_path / "run").run()
    save_file({"weight": torch.ones(3), "bias": torch.ones(())}, tmp_path / "flat.safetensors")
    with pytest.raises(DgmrError, match="is not a linear head"):
        read_head(tmp_path / "flat.safetensors")


def test_classes_that_cannot_be_read_are_not_fitted(demo, tmp_path):
    train = classes(tmp_path / "train", "abc", 8, 1)
    fit = lambda: fit_head(ImageEncoder(demo.adapter), demo.preprocess, Images.find(train), **OPTIONS)  # noqa: E731
    for file in (train / "c").iterdir():
        file.write_bytes(b"broken")
    assert fit().classes == ["a", "b"] and fit().weight.shape[0] == 2
    for file in (train / "b").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DgmrError, match=r"that can be decoded have one class, a. Give images of two or more"):
        fit()


def test_the_command_hands_the_first_models_head_to_the_others(demo, data, tmp_path):
    prune(demo, criterion="random", mlp_ratio=0.25).model.save(tmp_path / "small")
    head = ["--head-train", data[0], "--head-test", data[1]]
    done = call_command("eval", "demo", tmp_path / "small", *head, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    head_of_dense = fit_head(ImageEncoder(demo.adapter), demo.preprocess, Images.find(data[0]), **OPTIONS)
    rows = {row["model"]: float(row["head@1"]) for row in csv.DictReader((tmp_path / "out" / "table.csv").open())}
    assert rows["demo"] == pytest.approx(accuracy(demo, head_of_dense, data[1])["head@1"])
    assert (
        rows["small"] == pytest.approx(accuracy(open_model(str(tmp_path / "small")), head_of_dense, data[1])["head@1"])
        and rows["small"] < rows["demo"]
    )
    refused = call_command("eval", "demo", "--head-train", data[0], "-o", tmp_path / "out")
    assert refused.returncode == 2 and "Give --dataset" in refused.stderr and "--head-test" in refused.stderr


def test_a_recipe_evaluates_by_a_head(demo, data, tmp_path):
    width = embed_images(demo, data[1])[0].shape[1]
    save_file(
        {"weight": torch.randn(10, width, generator=torch.Generator().manual_seed(3)), "bias": torch.zeros(10)},
        tmp_path / "head.safetensors",
    )
    test = shutil.copytree(data[1], tmp_path / "test")
    (next(test.iterdir()) / "damaged.png").write_bytes(b"no image")
    changes = {"evaluate": {"head": {"test": str(test), "weights": str(tmp_path / "head.safetensors")}}}
    by_head = recipe(**changes, scenes=None, images=str(data[0]), recover=None, distill=None, compare=None, export=None)
    run = Run(by_head, tmp_path / "run")
    run.run(say=lambda line: None)
    expected = {**accuracy(demo, read_head(tmp_path / "head.safetensors"), data[1]), "images_left_out": 1}
    assert run.run_directory.figures("evaluate/dense")["dense"]["linear head"] == expected
    assert json.loads((tmp_path / "run/evaluate/dense/dense-head.json").read_text()) == expected
    assert run.run_directory.figures("evaluate/mlp_ratio-1")["pruned"]["linear head"] != expected
    save_file({"weight": torch.zeros(10, width), "bias": torch.zeros(10)}, tmp_path / "head.safetensors")
    with pytest.raises(DgmrError, match="head_sha256"):
        Run(by_head, tmp_path / "run").run(say=lambda line: None)
