"""Exported files compute what PyTorch computes, in the runtimes of a deployment."""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import call_command, pictures, redraw, timm_tower
from inputs.exports import onnx_mean
from onnx.reference import ReferenceEvaluator
from PIL import Image
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import nn

from dgmr_tp import MLPPruner, open_model
from dgmr_tp.cli import models
from dgmr_tp.data.scenes import CLASSNAMES, Scene
from dgmr_tp.encoders import adapt
from dgmr_tp.errors import DgmrError
from dgmr_tp.export import onnx_file
from dgmr_tp.export.bundle import export_bundle, failures
from dgmr_tp.export.config import ExportConfig
from dgmr_tp.export.export_tower import ExportTower
from dgmr_tp.export.formats import FORMATS, open_exported
from dgmr_tp.export.layouts import export_model, image_processor
from dgmr_tp.export.towers import export_towers, vision_export_tower
from dgmr_tp.export.verify import VERIFIED, _compare_outputs, _status
from dgmr_tp.utils.files import DirectoryLocked, scratch_directory

FAST = ("onnx", "onnx-fp16", "onnx-int8", "torchscript")


def bundle(export_tower, directory, **options):
    return export_bundle(
        [export_tower],
        directory,
        model="somewhere",
        preprocess={"mean": [0.5] * 3},
        **{"latency_batches": (), **options},
    )


def export_tower(tower, **options):
    return vision_export_tower(adapt(tower), pictures(5), **options)


def worst(outputs, expected):
    return float(((outputs - expected).norm(dim=1) / expected.norm(dim=1)).max())


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a pruned tower, the directory of its files, and the content of export.json."""
    tower, folder = redraw(timm_tower()), tmp_path_factory.mktemp("files")
    bundle(export_tower(tower, outputs=("embedding", "patches")), folder / "dense", formats=["onnx"])
    pruner = MLPPruner(tower, mlp_ratio=1)
    pruner.apply(pruner.plan())
    options = {"dense": folder / "dense", "latency_batches": (2,)}
    report = bundle(export_tower(tower, outputs=("embedding", "patches")), folder / "pruned", formats=FAST, **options)
    assert not failures(report)
    return tower, folder / "pruned", report


def computes_the_same(tower, path, tolerance):
    run = open_exported(path, trusted=True)
    for batch in (1, 2, 7):
        images = pictures(batch, seed=batch)
        with torch.no_grad():
            expected = tower(images)
        assert worst(run(images), expected) <= min(tolerance, worst(run(-images), expected) / 2)


@pytest.mark.parametrize("file_format", FAST)
def test_every_format_computes_what_the_model_computes_at_any_batch(exported, file_format):
    tower, folder, report = exported
    entry = report["towers"]["image"]["files"][file_format]
    computes_the_same(tower, folder / entry["file"], FORMATS[file_format].tolerance)
    assert 0 < max(entry["relative_error"]["embedding"].values()) <= FORMATS[file_format].tolerance
    assert 0.97 < min(entry["cosine"]["patches"].values()) <= 1.000001
    assert entry["sha256"] == {entry["file"]: hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()}
    assert entry["latency_ms"]["2"].keys() == ({"dense", "pruned"} if file_format == "onnx" else {"pruned"})
    assert (
        entry["latency_ms"]["2"]["pruned"]["low"] <= entry["latency_ms"]["2"]["pruned"]["median"]
        and entry["peak_memory_mb"] > 0
    )
    assert names(folder) == ["export.json", "model.fp16.onnx", "model.int8.onnx", "model.onnx", "model.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["pt2", "aotinductor"])
def test_programs_compute_what_the_model_computes_at_any_batch(tower, file_format, tmp_path):
    report = bundle(export_tower(tower), tmp_path, formats=[file_format])
    assert not failures(report)
    computes_the_same(tower, tmp_path / report["towers"]["image"]["files"][file_format]["file"], 1e-4)


def test_a_runtime_opens_the_files_as_export_json_says(exported):
    tower, folder, report = exported
    described, images = report["towers"]["image"], pictures(3, seed=9)
    encoder = adapt(tower)
    with torch.no_grad():
        embedding, state = tower(images), encoder.stem(images)
        for block in encoder.blocks():
            state = block(state)
        patches = encoder.features(encoder.norm(state))[1]
    for file, tolerance in (("model.onnx", 1e-4), ("model.fp16.onnx", 1e-2)):
        # Default settings, with which onnxruntime crashed on half-precision norms.
        session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
            ("image", ["batch", 3, 32, 32], "tensor(float)")
        ]
        assert [(o.name, o.type) for o in session.get_outputs()] == [
            ("embedding", "tensor(float)"),
            ("patches", "tensor(float)"),
        ]
        outputs = [torch.from_numpy(rows) for rows in session.run(["embedding", "patches"], {"image": images.numpy()})]
        assert [["batch", *rows.shape[1:]] for rows in outputs] == [output["shape"] for output in described["outputs"]]
        assert worst(outputs[0], embedding) < tolerance and worst(outputs[1].flatten(1), patches.flatten(1)) < tolerance
        assert worst(outputs[1].flip(1).flatten(1), patches.flatten(1)) > tolerance
    assert json.loads((folder / "export.json").read_text()) == report
    assert onnx.load(folder / "model.onnx").opset_import[0].version == report["opset"]
    sizes = [(folder / file).stat().st_size for file in ("model.onnx", "model.fp16.onnx")]
    assert sizes[1] < 0.8 * sizes[0]


def check_half_precision(path, inputs, expected):
    """Check a float16 file by the standard: its checker, and its reference implementation in true half precision."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    [outputs] = ReferenceEvaluator(model).run(["embedding"], {model.graph.input[0].name: inputs.numpy()})
    assert worst(torch.from_numpy(outputs), expected) < 1e-2


def test_float16_files_follow_the_standard(exported):
    tower, folder, _ = exported
    with torch.no_grad():
        check_half_precision(folder / "model.fp16.onnx", pictures(2), tower(pictures(2)))


def test_a_float16_file_that_overflows_fails(tmp_path):
    """One neuron is out of float16's range. In float32, the tower computes the same as without the change."""
    tower = redraw(timm_tower(layers=1))
    with torch.no_grad():
        expected = tower(pictures(2))
        mlp = tower.blocks[0].mlp
        mlp.fc1.weight[7] *= 1e5
        mlp.fc1.bias[7] *= 1e5
        mlp.fc2.weight[:, 7] /= 1e5
        assert worst(tower(pictures(2)), expected) < 0.1
    report = bundle(export_tower(tower), tmp_path, formats=["onnx-fp16"])
    assert re.fullmatch(
        r"its node \S+ \((MatMul|Add|Gemm)\) exceeds float16's range of 65504", failures(report)["model.fp16.onnx"]
    )
    assert names(tmp_path) == ["export.json", "model.fp16.onnx.failed"]
    model = onnx.load(tmp_path / "model.fp16.onnx.failed")
    with np.errstate(all="ignore"):
        [outputs] = ReferenceEvaluator(model).run(None, {"image": pictures(24).numpy()})
    assert not np.isfinite(outputs).all()


def test_embeddings_of_length_one(exported, tmp_path):
    tower = exported[0]
    report = bundle(export_tower(tower, normalized=True), tmp_path, formats=["onnx"])
    with torch.no_grad():
        embedding = tower(pictures(3))
    outputs = open_exported(tmp_path / "model.onnx")(pictures(3))
    assert torch.allclose(outputs, F.normalize(embedding, dim=-1), atol=1e-5) and not torch.allclose(
        outputs, embedding, atol=1e-2
    )
    assert report["towers"]["image"]["normalized"]
    with pytest.raises(DgmrError, match=r"unknown output 'logits'. Use embedding, patches"):
        export_tower(tower, outputs=("logits",))
    with pytest.raises(DgmrError, match="lack the embedding"):
        export_tower(tower, outputs=("patches",))


def test_a_text_tower(tmp_path):
    demo = open_model("demo")
    texts = demo.tokenizer(["a red circle", "two blue squares", "nothing"])
    _, export_tower = export_towers(demo, torch.rand(2, 3, 64, 64), text=True)
    report = bundle(export_tower, tmp_path, formats=["onnx", "torchscript"])
    assert not failures(report)
    with torch.no_grad():
        expected = demo.module.eval().encode_text(texts)
    assert worst(open_exported(tmp_path / "text.onnx")(texts), expected) < 1e-4 < worst(expected.flip(0), expected)
    assert report["towers"]["text"]["input"] == {"name": "text", "shape": ["batch", texts.shape[1]], "dtype": "int64"}
    onnx_file.to_float16(tmp_path / "text.onnx", tmp_path / "text.fp16.onnx")
    check_half_precision(tmp_path / "text.fp16.onnx", texts, expected)
    assert onnx_file.find_overflow(tmp_path / "text.fp16.onnx", texts) is None, "the mask's infinities are allowed"
    opened = torch.jit.load(str(tmp_path / "text.pt"))
    assert not any("visual" in name for name, _ in opened.named_parameters()), (
        "the text tower's file has no vision tower"
    )
    assert hasattr(demo.module, "visual")
    vit = replace(demo, module=timm_tower(), tower_path="", tokenizer=None)
    with pytest.raises(DgmrError, match="no text tower"):
        export_towers(vit, pictures(2), text=True)


def test_a_file_that_computes_something_else_is_named_failed_until_it_is_right(tmp_path, monkeypatch):
    other, write = export_tower(redraw(timm_tower(), seed=5)), FORMATS["torchscript"].write
    tower = export_tower(redraw(timm_tower()))
    with monkeypatch.context() as patched:
        patched.setitem(
            FORMATS, "torchscript", replace(FORMATS["torchscript"], write=lambda export_tower, path: write(other, path))
        )
        report = bundle(tower, tmp_path, formats=["torchscript", "onnx"])
    assert re.search(r"embedding at batch \d differs from PyTorch's", failures(report)["model.pt"])
    assert names(tmp_path) == ["export.json", "model.onnx", "model.pt.failed"], "the other format is still written"
    assert not failures(bundle(tower, tmp_path, formats=["torchscript"]))
    assert names(tmp_path) == ["export.json", "model.pt"], "files of the earlier export are deleted"
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(DgmrError, match="from another program or version"):
        bundle(tower, tmp_path, formats=["torchscript"])
    (tmp_path.parent / "mine").touch()
    (tmp_path / "export.json").write_text('{"towers": {"image": {"files": {"onnx": {"sha256": {"../mine": ""}}}}}}')
    with pytest.raises(DgmrError, match="not inside its directory"):
        bundle(tower, tmp_path, formats=["torchscript"])
    assert (tmp_path.parent / "mine").exists()


def test_a_runtime_that_crashes_is_a_verdict(tmp_path, monkeypatch):
    """The verifying process receives the signal that killed onnxruntime on half-precision norms."""
    (tmp_path / "crash").mkdir()
    program = (
        "import os, onnxruntime\nonnxruntime.InferenceSession = lambda *args, **options: os.kill(os.getpid(), 11)\n"
    )
    (tmp_path / "crash" / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'crash'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    report = bundle(export_tower(redraw(timm_tower())), tmp_path / "out", formats=["onnx"])
    assert failures(report) == {"model.onnx": "the runtime crashed (SIGSEGV)"}
    assert names(tmp_path / "out") == ["export.json", "model.onnx.failed"]


class DataDependent(nn.Module):
    """A module with control flow that depends on values, which a graph cannot express."""

    def forward(self, images):
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


def test_what_cannot_be_written_is_said_and_the_rest_goes_on(tmp_path):
    report = bundle(
        ExportTower("image", DataDependent(), torch.rand(4, 3, 4, 4), "image"),
        tmp_path,
        formats=["onnx", "torchscript"],
    )
    assert failures(report)["model.onnx"].startswith("cannot be written: ")
    assert names(tmp_path) == ["export.json", "model.pt"]


def test_errors_that_are_no_numbers_are_no_proof():
    ones = torch.ones(2, 4)
    assert (
        _compare_outputs(ones * torch.nan, ones)
        == _compare_outputs(ones[:, :3], ones)
        == _compare_outputs(ones, ones * 0)
        == (None, None)
    )
    assert _compare_outputs(ones * 1.5, ones)[0] == pytest.approx(0.5)
    assert (
        "not finite" in _status({"embedding": {1: 0.0, 3: None}}, 1e-4)
        and _status({"embedding": {1: 0.0, 3: 1e-5}}, 1e-4) == VERIFIED
    )


def test_outputs_that_are_not_finite_fail(tmp_path):
    class Divides(nn.Module):
        def forward(self, images):
            total = images.flatten(1).sum(1, keepdim=True)
            return images.flatten(1) / (total.clamp(max=0) if torch.compiler.is_exporting() else total)

    report = bundle(ExportTower("image", Divides(), torch.rand(4, 3, 4, 4), "image"), tmp_path, formats=["onnx"])
    assert "not finite" in failures(report)["model.onnx"]
    assert "NaN" not in (tmp_path / "export.json").read_text()


def test_code_is_opened_only_when_it_is_trusted(exported):
    path = exported[1] / "model.pt"
    with pytest.raises(DgmrError, match=r"model\.pt contains code.*--trust-file"):
        open_exported(path)
    assert open_exported(path, trusted=True)(pictures(1)).shape[0] == 1
    with pytest.raises(DgmrError, match=r"model\.pt does not accept inputs of shape \[1, 3, 16, 16\]"):
        open_exported(path, trusted=True)(pictures(1, size=16))


def test_files_that_no_runtime_can_open_are_one_sentence(exported, tmp_path):
    with pytest.raises(DgmrError, match="unknown export format 'tflite'"):
        bundle(export_tower(exported[0]), tmp_path, formats=["tflite"])
    model = onnx.load(exported[1] / "model.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "opset.onnx")
    model.opset_import[0].version = 20
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="split.data", size_threshold=0)
    (tmp_path / "split.data").unlink()
    (tmp_path / "damaged.onnx").write_bytes((exported[1] / "model.onnx").read_bytes()[:9000])
    (tmp_path / "damaged.pt").write_bytes(b"nothing")
    (tmp_path / "damaged.pt2").write_bytes(b"nothing")
    for name, message in (
        ("opset.onnx", "opset"),
        ("split.onnx", "split.data"),
        ("damaged.onnx", ""),
        ("damaged.pt", ""),
        ("damaged.pt2", ""),
    ):
        with pytest.raises(DgmrError, match=rf"^cannot open .*{name}: .*{message}") as error:
            open_exported(tmp_path / name, trusted=True)
        assert "\n" not in str(error.value)
    with pytest.raises(DgmrError, match="end in"):
        open_exported(tmp_path / "a.tflite")
    with pytest.raises(DgmrError, match="does not exist"):
        open_exported(tmp_path / "a.onnx")


@pytest.mark.parametrize("batch", [1, 3, "batch"])
@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16])
def test_files_of_any_batch_and_precision_are_run(tmp_path, batch, dtype):
    images = pictures(7, size=8)
    outputs = open_exported(onnx_mean(tmp_path / "a.onnx", dtype, [batch, 3, 8, 8]))(images)
    assert outputs.dtype == torch.float32 and outputs.shape == (7, 3)
    assert torch.allclose(outputs, images.mean((2, 3)), atol=1e-6 if dtype == onnx.TensorProto.FLOAT else 1e-3)


def test_files_that_are_not_an_encoder_are_one_sentence(tmp_path):
    two = onnx_mean(tmp_path / "two.onnx", onnx.TensorProto.FLOAT, [1, 3, 8, 8], inputs=2)
    with pytest.raises(DgmrError, match=r"cannot open .*two.onnx: it has 2 inputs \(pixels0, pixels1\)"):
        open_exported(two)
    with pytest.raises(DgmrError, match=r"its input pixels0 is a tensor\(uint8\), and preprocessed inputs are one of"):
        open_exported(onnx_mean(tmp_path / "bytes.onnx", onnx.TensorProto.UINT8, [1, 3, 8, 8]))
    tokens = onnx_mean(tmp_path / "tokens.onnx", onnx.TensorProto.INT64, [1, 3, 8, 8])
    with pytest.raises(DgmrError, match=r"its input pixels0 is a tensor\(int64\), and these inputs are torch.float32"):
        open_exported(tokens)(pictures(2, size=8))
    maps = open_exported(onnx_mean(tmp_path / "maps.onnx", onnx.TensorProto.FLOAT, ["n", 3, 8, 8], keepdims=1))
    with pytest.raises(DgmrError, match=r"first output of .*maps.onnx has the shape \[2, 3, 1, 1\] for 2 inputs"):
        maps(pictures(2, size=8))
    fixed = open_exported(onnx_mean(tmp_path / "fixed.onnx", onnx.TensorProto.FLOAT, [1, 3, 8, 8]))
    with pytest.raises(DgmrError, match=r"does not accept inputs of shape \[2, 3, 9, 9\]"):
        fixed(pictures(2, size=9))


@pytest.mark.slow
def test_hugging_faces_layout_is_read_by_transformers(tmp_path):
    demo = open_model("demo")
    picture = Image.fromarray(Scene.draw(0, 1).image()).resize((90, 71))
    images = torch.stack([demo.preprocess(picture), demo.preprocess(picture.rotate(90))])
    options = {"source": "demo", "layout": "huggingface", "text": True, "formats": ["onnx"], "latency_batches": ()}
    assert not failures(export_model(demo, images, tmp_path, **options))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert (pixels[0] - images[0]).abs().max() < 0.05 < (pixels[0] - images[1]).abs().max()
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "vision_model.onnx"))
    [outputs] = session.run(["image_embeds"], {"pixel_values": images.numpy()})
    with torch.no_grad():
        assert worst(torch.from_numpy(outputs), demo.module.eval().encode_image(images)) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "text_model.onnx"))
    assert session.run(["text_embeds"], {"input_ids": demo.tokenizer(["a", "b"]).numpy()})[0].shape == (2, 128)
    with pytest.raises(DgmrError, match="cannot resize by 'longest'"):
        image_processor({**demo.preprocess_config, "resize_mode": "longest"}, (64, 64))
    with pytest.raises(DgmrError, match="unknown layout 'core'"):
        export_model(demo, images, tmp_path, **{**options, "layout": "core"})


@pytest.mark.parametrize(
    ("mode", "expected"), [("squash", {"height": 64, "width": 32}), ("shortest", {"shortest_edge": 64})]
)
def test_a_processor_of_images_that_are_not_square(mode, expected):
    """The reference is open_clip's own preprocessing."""
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": mode}
    config = image_processor(preprocess, (64, 32))
    assert config["size"] == expected and config["crop_size"] == {"height": 64, "width": 32}
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=(64, 32), **preprocess), is_train=False
    )
    picture = Image.fromarray(Scene.draw(0, 1).image()).resize((90, 71))
    del config["image_processor_type"]
    pixels = transformers.CLIPImageProcessor(**config)(images=picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 32) and (pixels[0] - transform(picture)).abs().max() < 0.05


@pytest.mark.slow
def test_immichs_layout_answers_as_its_service_asks(tmp_path):
    """Check names, types and tokenizer settings as immich_ml/models/clip uses them."""
    demo = open_model("demo")
    images = torch.stack([demo.preprocess(Image.fromarray(Scene.draw(0, i).image())) for i in range(3)])
    options = {"source": "demo", "layout": "immich", "formats": ["onnx"], "latency_batches": ()}
    assert not failures(export_model(demo, images, tmp_path, text=True, **options))
    config = json.loads((tmp_path / "visual" / "preprocess_cfg.json").read_text())
    assert {"size", "mean", "std", "interpolation"} <= config.keys() and config["size"] == 64
    visual = onnxruntime.InferenceSession(str(tmp_path / "visual" / "model.onnx"))
    [outputs] = visual.run(None, {"image": images[:1].numpy()})
    length = json.loads((tmp_path / "config.json").read_text())["text_cfg"]["context_length"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "textual" / "tokenizer.json"))
    pad = json.loads((tmp_path / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    text = "A photo of two blue squares & it's fine"
    textual = onnxruntime.InferenceSession(str(tmp_path / "textual" / "model.onnx"))
    [words] = textual.run(None, {"text": np.array([tokenizer.encode(text).ids], dtype=np.int32)})
    with torch.no_grad():
        expected = (
            demo.module.eval().encode_image(images[:1], normalize=True),
            demo.module.encode_text(demo.tokenizer([text]), normalize=True),
        )
    assert np.abs(outputs - expected[0].numpy()).max() < 1e-4 and np.abs(words - expected[1].numpy()).max() < 1e-4
    assert [o.name for o in (*visual.get_outputs(), *textual.get_outputs())] == ["image_embedding", "text_embedding"]
    with pytest.raises(DgmrError, match="Remove patches"):
        export_model(demo, images, tmp_path, outputs=("embedding", "patches"), **options)


@pytest.mark.slow
def test_the_search_example_finds_what_is_asked_for(tmp_path):
    demo = open_model("demo")
    (tmp_path / "images").mkdir()
    scenes = [Scene.draw(5, i) for i in range(60)]
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image()).save(tmp_path / "images" / f"{i}.png")
    images = torch.stack([demo.preprocess(Image.fromarray(scene.image())) for scene in scenes[:4]])
    model = os.path.relpath(Path(__file__).parent.parent / "dgmr_tp" / "data" / "demo_clip", tmp_path / "files")
    options = {"formats": ["onnx"], "latency_batches": (), "normalized": True, "text": True}
    assert not failures(export_model(demo, images, tmp_path / "files", source=model, **options))
    script = Path(__file__).parent.parent / "examples" / "search" / "search.py"
    search = lambda *words: subprocess.run(  # noqa: E731
        [sys.executable, str(script), "files", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert search("index", "images").returncode == 0
    label = scenes[7].label
    done = search("ask", "images", f"a photo of a {CLASSNAMES[label]}")
    assert done.returncode == 0, done.stderr
    first = int(re.search(r"images/(\d+)\.png", done.stdout)[1])
    assert scenes[first].label == label
    assert search("ask", "images").returncode == 1


def test_the_command_says_what_came_out_and_fails_if_a_file_does(tmp_path, capsys):
    options = {"formats": "onnx,onnx-int8", "tolerance": ["onnx-int8=1e-6"]}
    with pytest.raises(DgmrError, match=r"model\.int8\.onnx: its embedding at batch"):
        models.export("demo", tmp_path, **options)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'model.onnx'}: verified" in printed and "batch 8: this" in printed
    assert names(tmp_path) == ["export.json", "model.int8.onnx.failed", "model.onnx"]
    with pytest.raises(DgmrError, match="Write it as onnx-int8"):
        models.export("demo", tmp_path, tolerance=["onnx"])


def test_a_disk_without_room_is_one_sentence_before_a_writer_meets_it(tmp_path, monkeypatch):
    export_tower = ExportTower("image", nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), torch.rand(4, 3, 4, 4), "image")
    for free in (9e6, 11e6):
        monkeypatch.setattr(
            "dgmr_tp.utils.files.shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free)
        )
        if free > 10e6:
            assert not failures(bundle(export_tower, tmp_path, formats=["torchscript"]))
            continue
        with pytest.raises(
            DgmrError, match=r"a file of the image tower takes up to 10 MB, but 9 MB are free. Free disk space"
        ):
            bundle(export_tower, tmp_path, formats=["torchscript"])
        assert not names(tmp_path)


@pytest.mark.parametrize("file_format", ["onnx", "torchscript", "pt2"])
def test_a_file_size_limit_is_one_sentence_and_nothing_is_left(tmp_path, file_format):
    """torch's writers abort the process at the limit."""
    export_tower = ExportTower("image", nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), torch.rand(4, 3, 4, 4), "image")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DgmrError, match=r"up to 10 MB, which .* has no room for: File too large\. Raise the limit"):
            bundle(export_tower, tmp_path / "out", formats=[file_format])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_deleted_and_a_second_export_is_refused(exported, tmp_path):
    (tmp_path / ".export.partial" / "image onnx").mkdir(parents=True)
    with scratch_directory(tmp_path / "export") as running:
        assert not list(running.glob("image*"))
        with pytest.raises(DirectoryLocked):
            bundle(export_tower(exported[0]), tmp_path, formats=["onnx"])
    assert not list(tmp_path.iterdir())


def test_the_configuration_takes_the_names_in_the_registries():
    for name in FORMATS:
        assert ExportConfig(formats=[name], tolerance={name: 0.5}).layout == "plain"
    for options in (
        {"formats": ["tflite"]},
        {"tolerance": {"tflite": 0.5}},
        {"layout": "core"},
        {"outputs": ["logits"]},
    ):
        with pytest.raises(ValidationError, match="unknown name; use one of"):
            ExportConfig(**options)
    for options in ({"outputs": ["patches"]}, {"layout": "immich", "outputs": ["embedding", "patches"]}):
        with pytest.raises(ValidationError, match="patches"):
            ExportConfig(**options)


def test_a_folder_that_cannot_be_written_is_one_sentence():
    done = call_command("export", "demo", "-o", "/proc/nowhere")
    assert done.returncode == 2 and done.stderr.startswith("dgmr-tp: ") and done.stderr.count("\n") == 1
