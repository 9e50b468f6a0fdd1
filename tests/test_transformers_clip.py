"""CLIP models of transformers: image and text embeddings equal those of transformers' own methods."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import pictures, recipe
from families import FAMILIES

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.data import scenes
from dgmr_tp.data.images import Images
from dgmr_tp.data.scenes import CLASSNAMES, TEMPLATES
from dgmr_tp.evaluation.class_embeddings import class_embeddings
from dgmr_tp.evaluation.zero_shot import as_clip, evaluate
from dgmr_tp.export.bundle import failures
from dgmr_tp.export.layouts import export_model
from dgmr_tp.pipeline.run import Run
from dgmr_tp.pruning import ImageEncoder

TEXTS = ["a photo of a red circle", "two blue squares", "green"]


@pytest.fixture(params=["transformers CLIPModel", "transformers SiglipModel"], scope="module")
def directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip") / "model"
    FAMILIES[request.param](directory)
    return directory


def open_with_transformers(directory):
    """Return the model, tokenizer and image processor of transformers."""
    kinds = (transformers.AutoModel, transformers.AutoTokenizer, transformers.AutoImageProcessor)
    model, *others = (kind.from_pretrained(directory) for kind in kinds)
    return model.eval(), *others


@torch.no_grad()
def embeddings(directory, images, texts):
    model, tokenizer, _ = open_with_transformers(directory)
    tokens = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    mask = {} if model.config.model_type == "siglip" else {"attention_mask": tokens["attention_mask"]}
    return model.get_image_features(images).pooler_output, model.get_text_features(
        tokens["input_ids"], **mask
    ).pooler_output


@torch.no_grad()
def test_both_towers_give_what_transformers_gives(directory):
    model, images = open_model(str(directory)), pictures(3)
    expected = embeddings(directory, images, TEXTS)
    outputs = ImageEncoder(model.adapter)(images), model.text.encode_text(model.tokenizer(TEXTS))
    for ours, reference in zip(outputs, expected, strict=True):
        assert torch.allclose(ours, reference, atol=1e-5) and not torch.allclose(ours, reference.flip(0), atol=1e-2)
    assert torch.allclose(model.text.encode_text(model.tokenizer(TEXTS), normalize=True).norm(dim=-1), torch.ones(3))
    assert not any("vision" in name or "visual" in name for name, _ in model.text.named_parameters())
    assert any("vision" in name for name, _ in model.module.named_parameters())


def test_a_pruned_one_keeps_its_words(directory, tmp_path):
    model = open_model(str(directory))
    pruned = prune(model, criterion="l2", keep=40)
    pruned.model.save(tmp_path / "pruned", pruned.plan)
    images = pictures(3)
    again = open_model(str(tmp_path / "pruned"))
    with torch.no_grad():
        ours = ImageEncoder(again.adapter)(images), again.text.encode_text(again.tokenizer(TEXTS))
    dense = embeddings(directory, images, TEXTS)
    assert not torch.allclose(ours[0], dense[0], atol=1e-3) and torch.allclose(ours[1], dense[1], atol=1e-5)
    if (
        "alone does not open it" not in (tmp_path / "pruned" / "README.md").read_text()
    ):  # SigLIP's pooling head has the blocks' width
        assert torch.allclose(ours[0], embeddings(tmp_path / "pruned", images, TEXTS)[0], atol=1e-5)
    else:
        assert model.module.config.model_type == "siglip"


def test_zero_shot_figures_are_those_of_transformers_own_logits(directory, tmp_path):
    scenes.write_classification(tmp_path / "classes", 150, seed=5)
    (tmp_path / "classes" / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    model = open_model(str(directory))
    options = {"dataset": "wds/scenes", "root": tmp_path / "classes", "output": tmp_path / "out.json", "name": "clip"}
    metrics = evaluate(as_clip(model), model.preprocess, model.tokenizer, **options)
    *_, processor = open_with_transformers(directory)
    records = Images.find(tmp_path / "classes").records
    names = (tmp_path / "classes" / "classnames.txt").read_text().splitlines()
    pixels = processor([record.read() for record in records], return_tensors="pt")["pixel_values"]
    image, text = embeddings(directory, pixels, [f"a photo of {name}" for name in names])
    unit = torch.nn.functional.normalize
    right = (unit(image, dim=-1) @ unit(text, dim=-1).T).argmax(1) == torch.tensor(
        [int(record.class_name()) for record in records]
    )
    assert metrics["acc1"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert torch.allclose(class_embeddings(model, tmp_path / "classes"), unit(text, dim=-1).T, atol=1e-5)


@pytest.mark.slow
def test_exported_files_have_the_names_and_numbers_of_transformers(directory, tmp_path):
    model, images = open_model(str(directory)), pictures(4)
    options = {
        "source": str(directory),
        "layout": "huggingface",
        "text": True,
        "formats": ["onnx", "torchscript"],
        "latency_batches": (),
    }
    assert not failures(export_model(model, images, tmp_path, **options))
    _, tokenizer, _ = open_with_transformers(directory)
    ids = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="np")["input_ids"]
    image, text = embeddings(directory, images, TEXTS)
    vision, words = (
        onnxruntime.InferenceSession(str(tmp_path / "onnx" / f"{name}_model.onnx")) for name in ("vision", "text")
    )
    assert np.allclose(vision.run(["image_embeds"], {"pixel_values": images.numpy()})[0], image.numpy(), atol=1e-4)
    assert np.allclose(words.run(["text_embeds"], {"input_ids": ids})[0], text.numpy(), atol=1e-4)
    assert not np.allclose(words.run(["text_embeds"], {"input_ids": ids[::-1].copy()})[0], text.numpy(), atol=1e-3)
    towers = json.loads((tmp_path / "export.json").read_text())["towers"]
    assert all(entry["status"] == "verified" for tower in towers.values() for entry in tower["files"].values())


def test_a_tokenizer_that_cannot_be_loaded_stops_only_who_needs_it(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    model = open_model(str(tmp_path / "model"))
    assert prune(model, criterion="l2", keep=40).model.module is not None
    with pytest.raises(DgmrError, match=r"model: cannot load its tokenizer: "):
        model.tokenizer(["a"])
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    silent = open_model(str(tmp_path / "model"))
    with pytest.raises(DgmrError, match="no text tower to export, or no tokenizer"):
        export_model(silent, pictures(2), tmp_path / "out", source="", text=True)
    sections = {
        "model": str(tmp_path / "model"),
        "export": {"formats": ["onnx"], "text": True},
        "compare": None,
        "distill": None,
    }
    with pytest.raises(
        DgmrError, match=r"export.text: .* has no text tower, or no tokenizer files\. Leave that key out"
    ):
        Run(recipe(**sections), tmp_path / "run").run()
    with pytest.raises(DgmrError, match="immich takes CLIP models of open_clip"):
        export_model(model, pictures(2), tmp_path / "out", source="", layout="immich")


def test_words_of_the_scenes_are_known_to_the_tokenizer(directory):
    model = open_model(str(directory))
    assert (model.tokenizer([t.format(c=c) for c in CLASSNAMES[:5] for t in TEMPLATES]) != 1).all(), (
        "the test needs words that the tokenizer knows"
    )
