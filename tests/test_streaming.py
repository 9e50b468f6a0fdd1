"""Streaming pruning, from file to file: same result as in memory, and a killed run resumes."""

import json
import signal
import subprocess
import time

import pytest
import torch
import transformers
from compress import make_plan
from conftest import command, pictures
from families import FAMILIES, bf16_shards, plain_output
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dgmr_tp import DgmrError, load_pruned, open_model, prune
from dgmr_tp.compression.streaming import JOURNAL, prune_streaming
from dgmr_tp.utils.files import lock_directory
from dgmr_tp.utils.progress import listen_to_progress

SOURCES = [
    "open_clip",
    "timm DINOv2-g",
    "open_clip EVA02-L",
    "timm Swin",
    "transformers CLIPVisionModel",
    "transformers DINOv2",
    "transformers InternViT",
]


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    FAMILIES[request.param](tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    "options", [{"criterion": "dgmr", "keep_ratio": 0.3}, {"criterion": "random", "seed": 3, "budget": {"params": 0.8}}]
)
def test_the_directory_is_the_same_as_from_memory(source, tmp_path, options):
    plan = prune_streaming(str(source), tmp_path / "streamed", **options)
    expected, expected_plan, _ = prune(str(source), **options)
    expected.save(tmp_path / "saved", expected_plan)
    assert plan == expected_plan
    streamed, saved = tmp_path / "streamed", tmp_path / "saved"
    assert sorted(file.name for file in streamed.iterdir()) == sorted(file.name for file in saved.iterdir())
    for file in saved.glob("*.json"):
        assert json.loads((streamed / file.name).read_text().replace("/streamed", "/saved")) == json.loads(
            file.read_text()
        ), file.name
    opened = load_pruned(streamed)
    images = pictures(3)
    assert torch.equal(plain_output(opened.tower.eval(), images), plain_output(expected.tower.eval(), images))
    dense = plain_output(open_model(str(source)).tower.eval(), images)
    assert not torch.allclose(plain_output(opened.tower, images), dense, rtol=1e-3)
    assert not list(tmp_path.glob(".*partial"))


def test_the_file_is_plain_safetensors(tmp_path):
    FAMILIES["open_clip"](tmp_path / "source")
    prune_streaming(str(tmp_path / "source"), tmp_path / "out", keep=40)
    with safe_open(tmp_path / "out" / "open_clip_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("visual.transformer.resblocks.0.mlp.c_fc.weight").shape == (40, 48)
        assert file.get_tensor("logit_scale").shape == ()


@pytest.mark.parametrize("criterion", ["dgmr", "l2"])
def test_bf16_shards_stream(tmp_path, criterion):
    source = tmp_path / "source"
    bf16_shards(source)
    plan = prune_streaming(str(source), tmp_path / "out", criterion=criterion, keep=24)
    opened = load_pruned(tmp_path / "out")
    expected, expected_plan, _ = prune(str(source), criterion=criterion, keep=24)
    assert plan == expected_plan
    assert prune(str(source), plan=plan).plan == plan  # the plan also applies to the checkpoint in memory
    state = opened.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.module.state_dict().items())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_killed_run_leaves_no_directory_and_goes_on(tmp_path):
    FAMILIES["open_clip"](tmp_path / "source")
    uninterrupted_plan = make_plan(open_model(str(tmp_path / "source")), keep=40)
    progress = []

    def stop(title, done, total):
        progress.append((title, done))
        if (title, done) == ("select", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listen_to_progress(stop):
        prune_streaming(str(tmp_path / "source"), tmp_path / "out", keep=40)
    assert not (tmp_path / "out").exists()
    journal = tmp_path / ".out.partial" / JOURNAL
    journal_data = json.loads(journal.read_text())
    name = next(iter(uninterrupted_plan.sites))
    journal_plan = json.loads(journal_data["plan"])
    assert list(journal_plan["sites"]) == [name]
    # Write a choice into the journal that the criterion would not make. If it is in the result, the run has resumed.
    journal_plan["sites"][name]["kept"] = list(range(40))
    journal.write_text(json.dumps({**journal_data, "plan": json.dumps(journal_plan)}))
    (tmp_path / ".out.partial" / "left_over").mkdir()
    plan = prune_streaming(str(tmp_path / "source"), tmp_path / "out", keep=40)
    assert not (tmp_path / "out" / "left_over").exists() and not (tmp_path / "out" / JOURNAL).exists()
    assert plan.sites[name].kept == tuple(range(40)) != uninterrupted_plan.sites[name].kept
    assert {n: s for n, s in plan.sites.items() if n != name} == {
        n: s for n, s in uninterrupted_plan.sites.items() if n != name
    }


def test_a_journal_of_another_request_is_not_taken_over(tmp_path):
    FAMILIES["open_clip"](tmp_path / "source")

    def stop(title, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listen_to_progress(stop):
        prune_streaming(str(tmp_path / "source"), tmp_path / "out", keep=40)
    plan = prune_streaming(str(tmp_path / "source"), tmp_path / "out", keep=41)
    assert plan == make_plan(open_model(str(tmp_path / "source")), keep=41)


@pytest.mark.slow
def test_killed_from_outside_it_goes_on(tmp_path):
    FAMILIES["open_clip"](tmp_path / "source")
    arguments = command("prune", "--stream", "-m", tmp_path / "source", "--keep", 40, "-o", tmp_path / "out")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while not (tmp_path / ".out.partial" / JOURNAL).exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    resumed, (expected, _, _) = load_pruned(tmp_path / "out"), prune(str(tmp_path / "source"), keep=40)
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.module.parameters(), expected.module.parameters(), strict=True)
    )


def test_random_weights_stream_too(tmp_path):
    prune_streaming("open_clip:ViT-S-32-alt", tmp_path / "out", "none", criterion="l2", keep=256)
    assert load_pruned(tmp_path / "out").tower.transformer.resblocks[0].mlp.c_fc.out_features == 256


def test_two_at_once_are_refused(tmp_path):
    FAMILIES["open_clip"](tmp_path / "source")
    (tmp_path / ".out.partial").mkdir()
    with (
        lock_directory(tmp_path / ".out.partial", "test"),
        pytest.raises(DgmrError, match="another dgmr-tp prune is working"),
    ):
        prune_streaming(str(tmp_path / "source"), tmp_path / "out", keep=40)


def test_transformers_opens_a_streamed_dinov2(tmp_path):
    FAMILIES["transformers DINOv2"](tmp_path / "dinov2")
    expected, _, _ = prune(str(tmp_path / "dinov2"), mlp_ratio=1)
    expected.save(tmp_path / "saved")
    prune_streaming(str(tmp_path / "dinov2"), tmp_path / "out", mlp_ratio=1)
    prune_streaming(str(tmp_path / "saved"), tmp_path / "again", keep=20)
    stock, loading = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), expected.module.parameters(), strict=True))


def test_mixed_dtypes_stream(tmp_path):
    FAMILIES["open_clip"](tmp_path / "source")
    file = tmp_path / "source" / "open_clip_model.safetensors"
    tensors = load_file(file)
    save_file({name: t.bfloat16() if "c_fc" in name else t for name, t in tensors.items()}, file)
    plan = prune_streaming(str(tmp_path / "source"), tmp_path / "out", keep=40)
    assert plan == prune(str(tmp_path / "source"), keep=40).plan
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / file.name).values()} == {
        torch.bfloat16,
        torch.float32,
    }


def test_what_cannot_stream_is_refused(tmp_path):
    FAMILIES["transformers DINOv2"](tmp_path / "dinov2")
    (tmp_path / "there").mkdir()
    with pytest.raises(DgmrError, match="exists already"):
        prune_streaming(str(tmp_path / "dinov2"), tmp_path / "there", keep=40)
