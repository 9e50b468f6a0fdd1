"""Text tuning: sources of captions, trained parameters, and agreement with a training in plain PyTorch."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from conftest import SMALL, recipe, run_command
from distill_worker import TEXT
from families import FAMILIES
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import load_file
from test_distillation import launch, relative_distance

from dgmr_tp import prune
from dgmr_tp.data import scenes
from dgmr_tp.data.captions import CaptionedImages
from dgmr_tp.data.scenes import Scene, distinct
from dgmr_tp.distillation.data import distinct_global_batch
from dgmr_tp.distillation.engine import freeze_unused_parameters
from dgmr_tp.distillation.text import TextTower
from dgmr_tp.encoders import open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.run import Run
from dgmr_tp.pipeline.stages.tune_text import not_zero_shot


def test_captions_of_shards_and_of_files_beside_images(tmp_path):
    scenes.write_retrieval(tmp_path / "shards", 12, seed=3)
    pairs = CaptionedImages.find(tmp_path / "shards")
    expected = [
        scene.caption for scene, _ in zip(distinct(Scene.draw(3, i) for i in range(100)), range(12), strict=False)
    ]
    assert [lines for [lines] in pairs.captions] == expected and len(pairs) == len(pairs.images) == 12

    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        pairs.images.read(i).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a first caption\n\n a second one \n")
    (folder / "2.txt").write_text("another\n")
    beside = CaptionedImages.find(folder)
    assert beside.captions == [["a first caption", "a second one"], ["another"]]
    assert [record.file.name for record in beside.images.records] == ["0.png", "2.png"]
    assert beside.without == 1
    (folder / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DgmrError, match=r"the captions of .*1\.png are not UTF-8"):
        CaptionedImages.find(folder)
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(DgmrError, match="contains 3 images and no caption"):
        CaptionedImages.find(folder)


def test_captions_of_karpathys_json(tmp_path):
    pictures = tmp_path / "images" / "train2014"
    pictures.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (pictures / name).write_bytes(b"x")
    entry = lambda name, split, *raw: {  # noqa: E731
        "filepath": "train2014",
        "filename": name,
        "split": split,
        "sentences": [{"raw": text, "tokens": []} for text in raw],
    }
    images = [
        entry("a.jpg", "train", "One.", "Two."),
        entry("d.jpg", "train"),
        entry("b.jpg", "test", "Three."),
        entry("c.jpg", "restval", "Four. "),
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    pairs = CaptionedImages.find(path, tmp_path / "images")
    assert pairs.captions == [["One.", "Two."], ["Four."]] and pairs.without == 1
    assert [record.file.name for record in pairs.images.records] == ["a.jpg", "c.jpg"]
    with pytest.raises(DgmrError, match=r"tune_text\.images"):
        CaptionedImages.find(path)
    (pictures / "c.jpg").unlink()
    with pytest.raises(DgmrError, match=r"1 of 2 images of .*dataset_coco\.json are missing; the first: .*c\.jpg"):
        CaptionedImages.find(path, tmp_path / "images")
    path.write_text('{"images": [{}]}')
    with pytest.raises(DgmrError, match="cannot read Karpathy's captions in"):
        CaptionedImages.find(path, tmp_path / "images")


def test_a_temperature_at_its_bound_is_trained_and_stays_within():
    """Released CLIPs have a scale of log 100, or above it if they were trained with another loss."""
    for start in (math.log(100), 4.76):
        clip = open_model("demo").module
        with torch.no_grad():
            clip.logit_scale.fill_(start)
        tower = TextTower(clip)
        texts = open_model("demo").tokenizer(["a red circle"])
        scale = tower(texts)["scale"]
        assert float(scale.detach()) == pytest.approx(math.exp(start), rel=1e-5)
        (gradient,) = torch.autograd.grad(scale.sum(), clip.logit_scale)
        assert float(gradient) == pytest.approx(math.exp(start), rel=1e-5)
        with torch.no_grad():
            clip.logit_scale += 1
        assert float(tower(texts)["scale"].detach()) == pytest.approx(math.exp(start), rel=1e-5)
        tower.restore()
        assert float(clip.logit_scale.detach()) == pytest.approx(start, rel=1e-5)


def test_a_text_tower_of_hugging_face_is_trained(tmp_path):
    """Its attention masks need values, so that it cannot run on the meta device."""
    FAMILIES["open_clip EVA02-L"](tmp_path / "model")
    clip = open_model(str(tmp_path / "model")).module
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    clip.text = HFTextEncoder(
        "roberta", output_dim=24, proj_type="linear", config=transformers.RobertaConfig(**sizes), pretrained=False
    )
    tower = TextTower(clip)
    freeze_unused_parameters(tower, torch.tensor([[0, 5, 6, 2]]))
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert any("word_embeddings" in name for name in trained) and any("query" in name for name in trained)


@pytest.mark.parametrize("family", ["open_clip", "open_clip EVA02-L", "open_clip SigLIP", "open_clip CoCa"])
def test_only_the_text_tower_is_trained_and_the_clip_comes_back_whole(family, tmp_path):
    FAMILIES[family](tmp_path / "model")
    opened = open_model(str(tmp_path / "model"))
    clip, before = opened.module, {name: tensor.clone() for name, tensor in opened.module.state_dict().items()}
    texts = opened.tokenizer(["a photo of a cat", "two dogs"])
    expected = clip.encode_text(texts, normalize=True)
    tower = TextTower(clip)
    assert not any("visual" in name for name, _ in tower.named_parameters())
    freeze_unused_parameters(tower, texts[:1])
    trained = {name.removeprefix("clip.") for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert "logit_scale" in trained and any("token_embedding" in name for name in trained)
    assert not any(name.startswith("text_decoder") or name == "logit_bias" for name in trained)
    outputs = tower(texts)
    assert torch.equal(outputs["text"], expected) and torch.allclose(outputs["text"].norm(dim=-1), torch.ones(2))
    assert torch.allclose(outputs["scale"], before["logit_scale"].clamp(max=4.6052).exp(), rtol=1e-4)
    tower.restore()
    after = clip.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    PIL.Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


def test_a_model_without_text_tower_is_refused_before_anything_runs(tmp_path):
    FAMILIES["timm ViT"](tmp_path / "model")
    scenes.write_retrieval(tmp_path / "pairs", 10, seed=5)
    section = {"steps": 1, "batch_size": 2, "base_lr": 0.1, "captions": str(tmp_path / "pairs")}
    changes = {
        "model": str(tmp_path / "model"),
        "distill": None,
        "evaluate": None,
        "export": None,
        "compare": None,
        "tune_text": section,
    }
    with pytest.raises(DgmrError, match=r"tune_text: .*model has no text tower that can be tuned"):
        Run(recipe(**changes), tmp_path / "run").run()
    for key, change in (
        ("export.text", {"export": {"text": True}}),
        ("compare.classes", {"compare": SMALL["compare"]}),
    ):
        with pytest.raises(
            DgmrError, match=rf"{key}: .*model has no text tower, or no tokenizer files. Leave that key out"
        ):
            Run(recipe(**{**changes, "tune_text": None, **change}), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()
    with pytest.raises(DgmrError, match=r"tune_text.captions: .*nowhere does not exist"):
        Run(recipe(**{**changes, "tune_text": {**section, "captions": "/nowhere"}}), tmp_path / "run").run()
    with pytest.raises(DgmrError, match="no caption"):
        Run(
            recipe(**{**changes, "tune_text": {**section, "captions": str(write_pictures(tmp_path / "bare"))}}),
            tmp_path / "run",
        ).run()
    held_out = {
        "images": "pipe:cat x.tar",
        "distill": {**SMALL["distill"], "held_out": 5},
        "recover": None,
        "evaluate": None,
        "export": None,
    }
    with pytest.raises(DgmrError, match="shards behind a URL cannot be divided"):
        Run(recipe(**held_out), tmp_path / "run").run()


@pytest.mark.parametrize("dataset", ["flickr30k", "coco"])
def test_captions_in_a_file_of_any_name_are_known_by_what_it_says(tmp_path, dataset):
    (tmp_path / "captions.json").write_text(json.dumps({"dataset": dataset, "images": []}))
    datasets = [{"dataset": name, "root": "data"} for name in ("flickr30k", "mscoco_captions", "imagenet1k")]
    tuned = {"captions": str(tmp_path / "captions.json"), "images": "x", "steps": 1, "batch_size": 2, "base_lr": 1.0}
    run = Run(recipe(evaluate={"datasets": datasets}, tune_text=tuned), tmp_path / "run")
    assert not_zero_shot(run.recipe) == [{"flickr30k": "flickr30k", "coco": "mscoco_captions"}[dataset]]


# The tests below launch processes.


def plain_torch(folder, *, normalized: bool = True) -> dict[str, torch.Tensor]:
    """Train in one process with open_clip's modules, AdamW, and InfoNCE as two cross entropies."""
    opened = prune(open_model("demo"), criterion="l2", mlp_ratio=1).model
    clip, pairs = opened.module, CaptionedImages.find(folder / "pairs")
    with torch.no_grad():
        images = torch.cat(
            [
                clip.encode_image(opened.preprocess(pairs.images.read(i))[None], normalize=True)
                for i in range(len(pairs))
            ]
        )
    matrices = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    named = [(name, p) for name, p in clip.named_parameters() if not name.startswith("visual.")]
    groups = [
        {"params": [p for name, p in named if name.endswith(matrices)], "weight_decay": 0.1},
        {"params": [p for name, p in named if not name.endswith(matrices)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    for step in range(TEXT["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = (
                TEXT["base_lr"] * 8 / 256 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / TEXT["steps"]))).item()
            )
        chosen = [index for _, index in distinct_global_batch(len(pairs), 8, 0, step)]
        texts = clip.encode_text(opened.tokenizer([pairs.captions[i][0] for i in chosen]))
        texts = F.normalize(texts, dim=-1) if normalized else texts
        logits = clip.logit_scale.clamp(max=torch.tensor(100.0).log()).exp() * images[chosen] @ texts.T
        loss = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clip.state_dict()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    scenes.write_retrieval(folder / "pairs", 30, seed=5)
    case = {"captions": str(folder / "pairs"), "first_caption": True, "weight_decay": 0.1}
    launch(folder, 2, {"two": case, "zero2": {**case, "zero_stage": 2}, "bf16": {**case, "bf16": True}})
    return folder, case


def start() -> dict[str, torch.Tensor]:
    return prune(open_model("demo"), criterion="l2", mlp_ratio=1).model.module.state_dict()


@pytest.mark.slow
def test_text_tuning_on_two_processes_ends_where_plain_torch_ends(tuned):
    folder, _ = tuned
    expected, before = plain_torch(folder), start()
    for name in ("two", "zero2"):
        weights = load_file(folder / f"{name}.safetensors")
        assert relative_distance(weights, expected, start()) < 0.01, name
        assert relative_distance(weights, plain_torch(folder, normalized=False), start()) > 0.1
        assert all(torch.equal(weights[key], before[key]) for key in weights if key.startswith("visual."))
        assert weights["logit_scale"].shape == () and weights["logit_scale"] != before["logit_scale"]
    bf16 = load_file(folder / "bf16.safetensors")
    assert all(torch.equal(bf16[key], before[key]) for key in bf16 if key.startswith("visual.")), (
        "what is frozen was rounded"
    )
    assert relative_distance(bf16, expected, start()) < 0.5


@pytest.mark.slow
def test_text_tuning_goes_on_at_another_number_of_processes(tuned):
    folder, case = tuned
    launch(folder, 1, {"one": {**case, "after": "two", "step": 4}})
    weights = load_file(folder / "one.safetensors")
    assert relative_distance(weights, load_file(folder / "two.safetensors"), start()) < 0.01
    assert sorted(path.name for path in (folder / "one/checkpoints").glob("images-*.npy")) == [
        "images-0-of-2.npy",
        "images-1-of-2.npy",
    ]


@pytest.mark.slow
def test_images_that_cannot_be_read_are_left_out_or_stop_the_run(tuned):
    folder, case = tuned
    shutil.copytree(folder / "pairs", folder / "broken")
    [shard] = (folder / "broken").rglob("*.tar")
    content = bytearray(shard.read_bytes())
    record = CaptionedImages.find(folder / "broken").images.records[7]
    content[record.offset : record.offset + record.length] = bytes(record.length)
    shard.write_bytes(content)
    cases = {
        "left out": {**case, "max_broken": 0.1},
        "stops": case,
        "too few": {**case, "batch_size": 30, "max_broken": 0.1},
    }
    launch(folder, 2, {name: {**each, "captions": str(folder / "broken")} for name, each in cases.items()})
    assert torch.isfinite(load_file(folder / "left out.safetensors")["logit_scale"])
    assert "1 of 30 images do not decode, more than tune_text.max_broken" in (folder / "stops.error").read_text()
    assert "tune_text.batch_size = 30, but" in (folder / "too few.error").read_text()


@pytest.mark.slow
def test_the_example_tunes_evaluates_and_warns(tmp_path):
    """Run a smaller version of the example recipe twice. The second run finds every step done."""
    content = yaml.safe_load((Path(__file__).parent.parent / "examples/tune-text.yaml").read_text())
    content["scenes"] = {"images": 20, "classes": 70, "captions": 200, "pairs": 300}
    content["tune_text"] |= {"steps": 30, "batch_size": 32, "base_lr": 8.0e-3}
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(content))
    done = run_command("run", path, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the text tower was tuned on captions of this kind: tuned is not" in done.stdout
    figures = Run.open(tmp_path / "run").figures["evaluate/mlp_ratio-0.25"]
    recall = "text_retrieval_recall@1"
    assert figures["tuned"]["wds/captions"][recall] > figures["pruned"]["wds/captions"][recall] + 0.05
    page = (tmp_path / "run/report.html").read_text()
    assert "<h3>Text tower</h3>" in page and "tuned is not zero-shot on scenes, captions" in page
    again = run_command("run", path, "-o", tmp_path / "run")
    assert again.returncode == 0 and "tune_text/mlp_ratio-0.25: done before" in again.stdout
