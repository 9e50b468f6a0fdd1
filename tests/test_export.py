"""Exported files against PyTorch, the way a deployer runs them."""

import hashlib
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import pictures, redraw, timm_tower

from dgmr_tp import MLPPruner
from dgmr_tp.errors import DgmrError
from dgmr_tp.export import export_bundle, onnx_file, open_exported


def bundle(tower, directory, **options):
    return export_bundle(tower, directory, image_size=32, preprocess={"mean": [0.5] * 3}, latency_batches=(2,), **options)


def test_both_files_compute_what_the_model_computes_at_any_batch(tower, tmp_path):
    original, pruner = redraw(timm_tower()), MLPPruner(tower, mlp_ratio=1)
    pruner.apply(pruner.plan())
    report = bundle(tower, tmp_path, original=original)
    for name in ("model.onnx", "model.pt"):
        run = open_exported(tmp_path / name)
        for batch in (1, 2, 7):
            images = pictures(batch, seed=batch)
            with torch.no_grad():
                expected = tower(images)
            assert torch.allclose(run(images), expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(run(images + 0.1), expected, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("image", ["batch", 3, 32, 32])]
    assert [o.name for o in session.get_outputs()] == ["embedding"]
    assert session.run(None, {"image": np.zeros((1, 3, 32, 32), np.float32)})[0].shape == (1, report["output"]["shape"][1])
    on_disk = json.loads((tmp_path / "export.json").read_text())
    assert on_disk["files"]["onnx"]["sha256"]["model.onnx"] == hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    assert on_disk["files"]["torchscript"]["latency_ms"]["2"].keys() == {"original", "pruned"}
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == on_disk["opset"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.onnx", "model.pt"]


def test_a_file_that_computes_something_else_is_named_failed(tower, tmp_path, monkeypatch):
    other = redraw(timm_tower(), seed=5)
    write = onnx_file.write
    monkeypatch.setattr(onnx_file, "write", lambda module, example, path: write(other, example, path))
    tower = redraw(timm_tower())
    with pytest.raises(DgmrError, match=r"model\.onnx\.failed.*differs"):
        bundle(tower, tmp_path, formats=["onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx.failed"]


def test_unknown_formats_and_damaged_files_are_refused(tower, tmp_path):
    with pytest.raises(DgmrError, match="unknown export format 'tflite'"):
        bundle(tower, tmp_path, formats=["tflite"])
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(DgmrError, match=r"cannot open .*a\.onnx"):
        open_exported(tmp_path / "a.onnx")
    with pytest.raises(DgmrError, match="ends in"):
        open_exported(tmp_path / "a.tflite")
