"""Device, precision, and the dtype of a checkpoint that survives pruning."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import call_command, pictures, recipe
from families import FAMILIES, plain_embedding
from safetensors.torch import load_file, save_file

from dgmr_tp import DgmrError, load_pruned, open_model, prune
from dgmr_tp.data import scenes
from dgmr_tp.pipeline.context import RunContext
from dgmr_tp.pipeline.run_directory import RunDirectory
from dgmr_tp.pipeline.stages import STAGES
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.compute import ComputeConfig

IMAGES = pictures(12)
META = torch.device("meta")


def checkpoint(name, directory, dtype=torch.bfloat16):
    """Write a small encoder as its library would save it in ``dtype``, and return its weights file."""
    FAMILIES[name](directory)
    [file] = directory.glob("*.safetensors")
    if name.startswith("transformers"):
        model = transformers.AutoModel.from_pretrained(directory).to(dtype)
        model.save_pretrained(directory)
    else:
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return file


def dtypes(file):
    return {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point() and tensor.numel() > 1}


@pytest.mark.parametrize("name", ["open_clip", "timm ViT", "transformers CLIPVisionModel", "transformers InternViT"])
def test_a_checkpoint_keeps_its_dtype_and_is_computed_in_float32(tmp_path, name):
    file = checkpoint(name, tmp_path / "source")
    source = open_model(str(tmp_path / "source"))
    assert source.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in source.module.parameters()} == {torch.float32}
    result = prune(source, [IMAGES], keep=40, criterion="l2")
    result.model.save(tmp_path / "out", result.plan)
    assert dtypes(tmp_path / "out" / file.name) == {torch.bfloat16} == dtypes(file)
    opened, exact = load_pruned(tmp_path / "out"), result.model.module.state_dict()
    assert opened.dtype == torch.bfloat16
    for key, tensor in opened.module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            assert torch.equal(tensor, exact[key].bfloat16().float()), key
    refitted = result.plan.sites.popitem()[0]
    consumer = next(site.consumer for site in source.sites if site.name == refitted)
    weight = result.model.tower.get_submodule(consumer).weight
    assert not torch.equal(weight, weight.bfloat16().float()), "recovery ran in bfloat16"
    result.model.save(tmp_path / "float32", result.plan, dtype=torch.float32)
    assert dtypes(tmp_path / "float32" / file.name) == {torch.float32}
    again = load_pruned(tmp_path / "float32")
    assert again.dtype == torch.bfloat16, "the last stage of a run would not go back to the checkpoint's dtype"
    assert all(torch.equal(tensor, exact[key]) for key, tensor in again.module.state_dict().items())


def test_transformers_opens_the_pruned_model_in_the_dtype_of_the_checkpoint(tmp_path):
    checkpoint("transformers DINOv2", tmp_path / "source")
    result = prune(str(tmp_path / "source"), mlp_ratio=2, criterion="l2")
    result.model.save(tmp_path / "out", result.plan)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.mlp_ratio == 2


def test_save_dtype_and_its_default_on_the_command_line(tmp_path):
    file = checkpoint("timm ViT", tmp_path / "source")
    arguments = ("prune", "--model", tmp_path / "source", "--keep", "40")
    for options, dtype in (((), torch.bfloat16), (("--save-dtype", "float32"), torch.float32)):
        out = tmp_path / f"out{len(options)}"
        assert call_command(*arguments, *options, "-o", out).returncode == 0
        assert dtypes(out / file.name) == {dtype}
        assert load_pruned(out).dtype == dtype
    refused = call_command(*arguments, "--stream", "--save-dtype", "float32", "-o", tmp_path / "stream")
    assert refused.returncode and "--save-dtype" in refused.stderr and not (tmp_path / "stream").exists()


def test_weights_that_float16_cannot_represent_are_saved_in_float32(tmp_path, caplog):
    checkpoint("timm ViT", tmp_path / "source", torch.float16)
    model = open_model(str(tmp_path / "source"))
    model.save(tmp_path / "fits")
    assert dtypes(tmp_path / "fits" / "model.safetensors") == {torch.float16} and not caplog.records
    model.module.blocks[0].mlp.fc2.weight.data[0, 0] = 70_000
    model.save(tmp_path / "out")
    assert dtypes(tmp_path / "out" / "model.safetensors") == {torch.float32}
    assert "out of the range of float16" in caplog.text


@pytest.mark.parametrize("stages", [("prune", "recover", "distill"), ("prune", "recover")])
def test_a_run_keeps_float32_until_its_last_stage(tmp_path, stages):
    file = checkpoint("timm ViT", tmp_path / "source")
    sections = {} if "distill" in stages else {"distill": None}
    small = recipe(
        model=str(tmp_path / "source"),
        images=str(tmp_path),
        scenes=None,
        evaluate=None,
        compare=None,
        export=None,
        **sections,
    )
    context = RunContext(small, RunDirectory(tmp_path / "run"), STAGES)
    model, plan, _ = prune(context.dense, keep=40, criterion="l2")
    for stage in stages:
        step = f"{stage}/mlp_ratio-1"
        folder = context.run_directory.folder(step)
        folder.mkdir(parents=True)
        context.save_model(model, plan, folder, step)
        expected = torch.bfloat16 if stage == stages[-1] else torch.float32
        assert dtypes(folder / "model" / file.name) == {expected}, stage
        model = context.open_model_of(step)


def test_selection_by_weights_never_moves_the_tower(tmp_path):
    FAMILIES["open_clip"](tmp_path / "source")
    model = replace(open_model(str(tmp_path / "source")), device=META)  # a move to meta would lose the weights
    result = prune(model, criterion="dgmr", keep=40)
    assert not any(parameter.is_meta for parameter in result.model.module.parameters())
    with pytest.raises(Exception, match="meta"):
        prune(model, [IMAGES], criterion="output", keep=40)


def test_bfloat16_is_for_forward_passes_that_evaluate(tmp_path):
    FAMILIES["timm ViT"](tmp_path / "source")
    exact = open_model(str(tmp_path / "source"))
    fast = exact.with_compute(ComputeConfig(device="cpu", dtype="bfloat16"))
    with torch.no_grad():
        embeddings, expected = ImageEncoder(fast.adapter)(IMAGES), plain_embedding(exact, IMAGES)
    assert embeddings.dtype == torch.float32
    assert 1e-4 < (embeddings - expected).norm() / expected.norm() < 0.02
    for criterion in ("output", "amp"):
        results = [prune(model, [IMAGES], criterion=criterion, keep=40) for model in (exact, fast)]
        states = [result.model.module.state_dict() for result in results]
        if criterion == "output":  # ranking and recovery are in float32
            assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
        else:
            assert results[0].plan != results[1].plan


def test_the_command_line_takes_device_and_precision(tmp_path):
    scenes.write_classification(tmp_path / "images", 60, seed=0)
    knn = ("eval", "demo", "--knn-train", tmp_path / "images", "--knn-test", tmp_path / "images")
    results = []
    for dtype in ("float32", "bfloat16"):
        done = call_command(*knn, "--device", "cpu", "--dtype", dtype, "-o", tmp_path / dtype)
        assert done.returncode == 0, done.stderr
        [file] = (tmp_path / dtype).glob("*-knn.json")
        results.append(json.loads(file.read_text()))
    assert results[0].keys() == results[1].keys()
    unknown = call_command(*knn, "--device", "abacus", "-o", tmp_path / "unknown")
    assert unknown.returncode and "device abacus cannot be used" in unknown.stderr and "Use cpu" in unknown.stderr


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta:x"])
def test_a_device_that_does_not_exist_is_refused(device):
    with pytest.raises(DgmrError, match=f"device {device} cannot be used: .*Use cpu or cuda"):
        ComputeConfig(device=device).choose_device()
