"""Distillation: the loss, the DeepSpeed configuration, checkpoints, and equal weights for every way to run it."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import hypothesis
import numpy as np
import PIL.Image
import psutil
import pytest
import timm
import torch
from conftest import (
    BIN,
    SMALL,
    command,
    copy_finished_stages,
    pictures,
    recipe,
    redraw,
    run_command,
    timm_tower,
    write_recipe,
)
from distill_worker import SECTION
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_pipeline import kill_when, wait_for_the_end_of_workers
from torch import nn

from dgmr_tp import prune
from dgmr_tp.data import scenes
from dgmr_tp.data.images import Images
from dgmr_tp.distillation import checkpoints, validation
from dgmr_tp.distillation.bank import compute_bank
from dgmr_tp.distillation.checkpoints import MANIFEST, Checkpoint
from dgmr_tp.distillation.config import DistillConfig
from dgmr_tp.distillation.data import Crops, batches, training_transform
from dgmr_tp.distillation.distill import distill
from dgmr_tp.distillation.engine import deepspeed_config, freeze_unused_parameters, parameter_groups
from dgmr_tp.distillation.feature_cache import FeatureCache
from dgmr_tp.distillation.loop import curve_names, describe_save, read_curve, training_session
from dgmr_tp.distillation.losses import LOSSES, DistillationLoss, FeatureTap, Loss
from dgmr_tp.distillation.processes import FAILURE_FILE, STOP_FILE
from dgmr_tp.distillation.processes import launch as launch_processes
from dgmr_tp.distillation.rate_search import find_learning_rate
from dgmr_tp.distillation.validation import BestWeights, HeldOutSet
from dgmr_tp.encoders import OpenedModel, adapt, open_model
from dgmr_tp.errors import DgmrError, Preempted
from dgmr_tp.pipeline.run import Run
from dgmr_tp.utils.files import DirectoryLocked, lock_directory


def distill_config(json: dict | None = None, features: str = "", lost: bool = False, **changes) -> DistillConfig:
    """The small section with ``changes``; the other arguments are keys of a case that are not keys of the section."""
    return DistillConfig(**{**SECTION, **changes})


def naive_features(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return the last state, the states after all blocks, and the logits, computed by timm's own forward pass."""
    states: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, out: states.append(out)) for block in model.blocks]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return states[-1], states, logits


@pytest.mark.parametrize(
    "objective",
    [
        DistillationLoss(),
        DistillationLoss(class_token=0.0, patches=2.0),
        DistillationLoss(after_norm=True),
        DistillationLoss(class_token=0.0, embedding=0.5),
        DistillationLoss(layers={1: 0.25, 3: 2.0}),
    ],
    ids=["before the norm", "patches", "after the norm", "embedding", "layers"],
)
def test_the_loss_is_the_weighted_sum_of_mean_squared_errors(objective):
    teacher, student, images = redraw(timm_tower(), 0), redraw(timm_tower(), 1), pictures(3)
    taps = [FeatureTap(adapt(model), objective) for model in (student, teacher)]
    total = objective.total(objective(*(tap(images) for tap in taps)))
    expected = torch.zeros(())
    (a, layers_a, logits_a), (b, layers_b, logits_b) = naive_features(student, images), naive_features(teacher, images)
    if objective.after_norm:
        a, b = student.norm(a), teacher.norm(b)
    expected = expected + objective.class_token * (a[:, 0] - b[:, 0]).square().mean()
    expected = expected + objective.patches * (a[:, 1:] - b[:, 1:]).square().mean()
    expected = expected + objective.embedding * (logits_a - logits_b).square().mean()
    for layer, weight in objective.layers.items():
        expected = expected + weight * (layers_a[layer - 1] - layers_b[layer - 1]).square().mean()
    assert torch.allclose(total, expected, rtol=1e-5)
    other = objective.model_copy(update={"patches": objective.patches + 0.1})
    assert not torch.allclose(
        total, other.total(other(*(FeatureTap(t.adapter, other)(images) for t in taps))), rtol=1e-3
    )


def test_a_loss_is_added_by_one_entry_of_the_registry(monkeypatch):
    def angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return nn.functional.cosine_similarity(student, teacher).clamp(-1, 1).acos().mean()

    with pytest.raises(DgmrError, match=r"distill\.loss\.terms\.angle.* unknown name; use one of class_token, patches"):
        recipe(distill={**SMALL["distill"], "loss": {"terms": {"angle": 1.0}}})
    monkeypatch.setitem(LOSSES, "angle", Loss("embedding", angle))
    section = {"class_token": 0, "patches": 0, "terms": {"angle": 0.5}}
    loss = recipe(distill={**SMALL["distill"], "loss": section}).distill.loss
    student, teacher, images = redraw(timm_tower(), 0), redraw(timm_tower(), 1), pictures(3)
    terms = loss(*(FeatureTap(adapt(model), loss)(images) for model in (student, teacher)))
    assert terms.keys() == {"angle"}
    assert torch.allclose(loss.total(terms), 0.5 * angle(student(images), teacher(images)), rtol=1e-5)
    with pytest.raises(DgmrError, match="terms names patches, which is a separate key"):
        recipe(distill={**SMALL["distill"], "loss": {"terms": {"patches": 1.0}}})
    with pytest.raises(DgmrError, match="balanced scales mean squared errors, but none of them has a weight"):
        recipe(distill={**SMALL["distill"], "loss": {"class_token": 0, "patches": 0, "cosine": 1, "balanced": True}})


def naive_terms(student: dict, teacher: dict, bank: np.ndarray, deviations: dict) -> dict[str, float]:
    """Return the losses of an index and the balanced errors from their definitions, one number at a time."""
    z, t = (features["embedding"].double().numpy() for features in (student, teacher))
    cosine = lambda a, b: sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))  # noqa: E731
    divergences = []
    for ours, theirs in zip(z, t, strict=True):
        p, q = (np.array([math.exp(cosine(each, row) / 0.07) for row in bank]) for each in (theirs, ours))
        p, q = p / p.sum(), q / q.sum()
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    terms = {
        "cosine": np.mean([1 - cosine(a, b) for a, b in zip(z, t, strict=True)]),
        "neighbors": np.mean(divergences),
    }
    for name in ("class_token", "patches", "layer 2"):
        errors = (student[name] - teacher[name]).double().numpy().reshape(-1, 48)
        variances = np.array([max(d, 0.1 * np.mean(deviations[name])) ** 2 for d in deviations[name]])
        terms[name] = np.mean([sum(row**2 / variances) / 48 for row in errors])
    return terms


def test_losses_of_an_index_and_balanced_errors_are_what_their_formulas_say(process_group, tmp_path):
    for index in range(7):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    images = Images.find(tmp_path)
    preprocess = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 128 - 1  # noqa: E731
    objective = DistillationLoss(balanced=True, cosine=1.0, neighbors=1.0, layers={2: 1.0})
    student, teacher = (redraw(timm_tower(), seed) for seed in (1, 2))
    with torch.no_grad():
        teacher.blocks[2].mlp.fc2.bias[5] += 40  # a constant offset, which is no deviation
        teacher.blocks[2].mlp.fc2.weight[7] *= 50  # a large channel
    taps = [FeatureTap(adapt(model), objective) for model in (student, teacher)]
    bank = compute_bank(images, preprocess, lambda batch: taps[1](batch, embedding=True), (3, 32, 32), 2, seed=4)
    readable = [image for i in range(7) if (image := images.read(i)) is not None]
    with torch.no_grad():
        reference = taps[1](torch.stack([preprocess(image) for image in readable]), embedding=True)
        features = [tap(pictures(4)) for tap in taps]
    deviations = {k: v.double().flatten(0, -2).std(0, correction=0).numpy() for k, v in reference.items()}
    terms = objective(*features, bank)
    expected = naive_terms(*features, reference["embedding"].double().numpy(), deviations)
    assert terms.keys() == expected.keys() and len(bank.embeddings) == 6
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    others = naive_terms(
        *features, reference["embedding"][:5].double().numpy(), {k: v[::-1] for k, v in deviations.items()}
    )
    for name in ("neighbors", "class_token", "patches", "layer 2"):
        assert others[name] != pytest.approx(expected[name], rel=0.01), name
    plain = objective.model_copy(update={"balanced": False})(*features, bank)
    assert plain["cosine"] == terms["cosine"] and float(plain["patches"]) != pytest.approx(
        expected["patches"], rel=0.01
    )
    swapped = objective(*features[::-1], bank)
    assert float(swapped["neighbors"]) != pytest.approx(expected["neighbors"], rel=0.01), "a divergence has a direction"
    again = compute_bank(images, preprocess, lambda batch: taps[1](batch, embedding=True), (3, 32, 32), 2, seed=4)
    assert torch.equal(again.embeddings, bank.embeddings)


def test_a_bank_is_drawn_by_the_seed_and_has_at_most_2048_images(process_group, tmp_path):
    for index in range(6):
        PIL.Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    images = Images.find(tmp_path)
    many = replace(images, records=images.records * 400)
    preprocess = lambda image: torch.tensor(image.getpixel((0, 0))).float() + 1  # noqa: E731
    draw = lambda seed: compute_bank(many, preprocess, lambda x: {"embedding": x}, (3,), 100, seed).embeddings  # noqa: E731
    first, second, other = draw(0), draw(0), draw(1)
    assert first.shape == (2048, 3) and torch.equal(first, second) and not torch.equal(first, other)


def test_text_tuning_refuses_the_options_of_a_distillation():
    tuned = {"captions": "scenes:pairs", "steps": 2, "batch_size": 8, "base_lr": 1e-3, "ema": 0.9}
    with pytest.raises(DgmrError, match=r"unknown key tune_text\.ema"):
        recipe(tune_text=tuned)


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(DgmrError, match=r"names block 4, but .* has blocks 1 to 3"):
        FeatureTap(adapt(timm_tower()), DistillationLoss(layers={4: 1.0}))
    swin = redraw(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), img_size=224))
    with pytest.raises(DgmrError, match="compares no feature that"):
        FeatureTap(adapt(swin), DistillationLoss(patches=0.0))(torch.zeros(1, 3, 224, 224))


def test_recomputed_blocks_run_twice_and_give_the_same_gradients():
    images = pictures(3)

    def gradients(recompute: bool) -> tuple[list[torch.Tensor], int]:
        tap, runs = FeatureTap(adapt(redraw(timm_tower(), 1)), recompute=recompute), []
        tap.tower.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
        loss = sum(feature.square().sum() for feature in tap(images).values())
        return list(torch.autograd.grad(loss, list(tap.parameters()), allow_unused=True)), len(runs)

    (plain, once), (recomputed, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    pairs = [(a, b) for a, b in zip(plain, recomputed, strict=True) if a is not None]
    assert len(pairs) > 20 and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def test_what_is_trained_and_what_is_decayed():
    tower = redraw(timm_tower())
    tap = FeatureTap(adapt(tower))
    freeze_unused_parameters(tap, torch.zeros(1, 3, 32, 32, device="meta"))
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in tower.named_parameters()} - trained == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    decayed, plain = ({id(p) for p in group["params"]} for group in parameter_groups(tap, 0.1))
    matrices = {name for name, p in tower.named_parameters() if id(p) in decayed}
    assert matrices == {
        name for name in trained if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
    }
    assert {"cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.ls1.gamma"} <= {
        name for name, p in tower.named_parameters() if id(p) in plain
    }
    after = FeatureTap(adapt(redraw(timm_tower())), DistillationLoss(embedding=1.0))
    freeze_unused_parameters(after, torch.zeros(1, 3, 32, 32, device="meta"))
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_the_schedule_of_the_papers():
    """Linear warm-up to base · batch / 256, then a cosine (torch's is the reference); decay from 0.04 to 0.2."""
    config = distill_config(
        steps=100, batch_size=512, base_lr=1e-4, min_lr=1e-6, warmup_steps=10, weight_decay=0.04, final_weight_decay=0.2
    )
    assert config.peak_learning_rate == pytest.approx(2e-4)
    assert [config.learning_rate(step, 2e-4) for step in range(10)] == pytest.approx(
        [2e-4 * (step + 1) / 10 for step in range(10)]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90, eta_min=1e-6)
    for step in range(10, 100):
        assert config.learning_rate(step, 2e-4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()
    assert (config.decay(0), config.decay(50), config.decay(100)) == pytest.approx((0.04, 0.12, 0.2))
    assert distill_config(weight_decay=0.3).decay(50) == 0.3


def test_a_learning_rate_that_is_found_is_warmed_up():
    warmup = lambda **changes: distill_config(**changes).num_warmup_steps  # noqa: E731
    assert [warmup(base_lr=None, steps=steps) for steps in (10, 100, 1000)] == [5, 20, 50]
    assert warmup(steps=1000) == 0 and warmup(base_lr=None, steps=1000, warmup_steps=7) == 7
    with pytest.raises(ValueError, match=r"zero_stage: 3 shards the parameters.* Set base_lr"):
        distill_config(base_lr=None, zero_stage=3)
    with pytest.raises(ValueError, match=r"steps: 3 is below the 4 batches on which base_lr is found\. Set base_lr"):
        distill_config(base_lr=None, steps=3)


@pytest.mark.parametrize("curvature", [10.0, 1e-2])
def test_the_learning_rate_is_four_times_the_best_step_along_the_sign_of_a_gradient(process_group, curvature):
    """The loss is a paraboloid with another minimum for every batch, so that the best step is known in closed form."""
    module = nn.Linear(50, 1, bias=False)
    minima = module.weight.detach().flatten() + 0.01 * torch.randn(4, 2, 50)
    loss = lambda minimum: curvature * (module.weight.flatten() - minimum).square().sum()  # noqa: E731
    before = module.weight.detach().clone()
    rate = find_learning_rate(module, list(minima), loss)
    weight, centers = before.double().numpy().flatten(), minima.double().numpy()
    direction = np.sign(weight - centers[0].mean(0))
    best = direction @ (weight - centers[1:].mean((0, 1))) / 50
    other = np.sign(weight - centers[1:].mean((0, 1))) @ (weight - centers[1:].mean((0, 1))) / 50
    assert math.log2(rate / 4 / best) == pytest.approx(0, abs=0.6), "the grid has a factor of 2"
    assert abs(math.log2(rate / 4 / other)) > 1, "the direction and the size are of different images"
    assert torch.equal(module.weight, before) and module.weight.grad is None


def test_a_student_that_cannot_be_improved_gets_a_small_learning_rate(process_group):
    module = nn.Linear(3, 1)
    still = lambda sample: (module.weight - module.weight.detach()).square().sum() + 0 * module.bias.sum()  # noqa: E731
    assert find_learning_rate(module, [[0]] * 4, still) < 1e-4


def test_the_search_leaves_parameters_without_a_gradient_alone(process_group):
    module = nn.Linear(50, 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    centers = torch.randn(50) + 0.1 * torch.randn(4, 1, 50)
    loss = lambda center: (module.weight - center).square().sum()  # noqa: E731
    rate = find_learning_rate(module, [[center] for center in centers], loss)
    assert rate > 1e-3, "it moves the weight, on which the loss depends"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@hypothesis.settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 50))
def test_micro_batches_keep_the_global_batch(world, share, most):
    training = distill_config(batch_size=world * share, micro_batch=most)
    fitting = [n for n in range(1, min(most, share) + 1) if share % n == 0]
    if max(fitting) < min(most, share) / 2:
        with pytest.raises(DgmrError, match="Choose a batch_size with more divisors"):
            training.micro_batch_of(world)
        return
    engine_config = deepspeed_config(training, world, Path("x"))
    micro = engine_config["train_micro_batch_size_per_gpu"]
    assert micro <= most and micro * engine_config["gradient_accumulation_steps"] * world == training.batch_size


def test_a_deepspeed_file_is_joined_and_conflicts_are_named(tmp_path):
    path = tmp_path / "ds.json"

    def joined(**content):
        path.write_text(json.dumps(content))
        return deepspeed_config(distill_config(deepspeed=str(path), zero_stage=2), 2, tmp_path)

    assert deepspeed_config(distill_config(offload="all", zero_stage=3), 2, tmp_path)["zero_optimization"][
        "offload_param"
    ] == {"device": "cpu"}
    more = {"tensorboard": {"enabled": True}, "gradient_clipping": "auto", "train_batch_size": "auto"}
    config = joined(zero_optimization={"stage": 2, "overlap_comm": True}, **more)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True} and config["tensorboard"]["enabled"]
    assert config["gradient_clipping"] == 0.0 and "train_batch_size" not in config
    with pytest.raises(
        DgmrError, match=r"ds\.json: zero_optimization\.stage = 3, but distill in the recipe makes it 2"
    ):
        joined(zero_optimization={"stage": 3})
    assert joined(steps_per_print=2000, wall_clock_breakdown=True)["steps_per_print"] == 2000
    with pytest.raises(
        DgmrError,
        match=r"offload_optimizer is set, but the recipe's distill section has no offload: optimizer. Set it there",
    ):
        joined(zero_optimization={"offload_optimizer": {"device": "cpu"}})
    assert joined(zero_optimization={"offload_optimizer": {"device": "none"}})
    with pytest.raises(
        DgmrError, match=r"with .*round_robin_gradients, DeepSpeed cannot return the trained weights. Remove it"
    ):
        joined(zero_optimization={"round_robin_gradients": True})
    assert joined(zero_optimization={"round_robin_gradients": False})
    with pytest.raises(
        DgmrError, match=r"ds\.json: optimizer must not be set here, because the recipe sets the optimizer"
    ):
        joined(optimizer={"type": "Adam"})
    path.write_text("{")
    with pytest.raises(DgmrError, match=r"distill\.deepspeed: cannot read .*ds\.json"):
        deepspeed_config(distill_config(deepspeed=str(path)), 1, tmp_path)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def launched(process_group, monkeypatch):
    """Set the variables that a launcher of one process sets, so that a training runs in this process."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)


class Writer:
    """Writes a checkpoint as DeepSpeed's engine does: files in a folder named by the tag."""

    def save_checkpoint(self, directory, tag, save_latest):
        (Path(directory) / tag).mkdir(parents=True, exist_ok=True)
        (Path(directory) / tag / "model_states.pt").write_text(tag * 100)


def test_the_newest_whole_checkpoint_counts_and_only_the_last_are_kept(process_group, tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoints.newest(folder) == (None, [])
    for step in (3, 6, 9):
        checkpoints.save(
            Writer(), folder, Checkpoint(step, 1, 1, broken={"a.png": "no image"}), [("w", torch.ones(2))], keep=2
        )
    assert sorted(path.name for path in folder.iterdir()) == ["step00000006", "step00000009"]
    checkpoint, damaged = checkpoints.newest(folder)
    assert (checkpoint.step, checkpoint.broken, damaged) == (9, {"a.png": "no image"}, [])
    assert torch.equal(checkpoints.load_average(folder, checkpoint)["w"], torch.ones(2))
    for damage in (lambda f: f.write_text("x"), lambda f: f.unlink()):
        shutil.copytree(folder, tmp_path / "copy")
        damage(tmp_path / "copy" / "step00000009" / "model_states.pt")
        checkpoint, damaged = checkpoints.newest(tmp_path / "copy")
        assert checkpoint.step == 6 and damaged == ["step00000009"]
        shutil.rmtree(tmp_path / "copy")
    (folder / "step00000009" / MANIFEST).unlink()  # as if killed during the save
    assert checkpoints.newest(folder)[0].step == 6


def test_a_full_disk_leaves_the_last_checkpoint(process_group, tmp_path):
    checkpoints.save(Writer(), tmp_path, Checkpoint(3, 1, 1), (), keep=2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(DgmrError, match=r"cannot write the checkpoint .*step00000006.*Free disk space"):
            checkpoints.save(Writer(), tmp_path, Checkpoint(6, 1, 1), [("w", torch.ones(10_000))], keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoints.newest(tmp_path)[0].step == 3


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(DgmrError, match=r"the file system of .* has no locks \(No locks available\)"):
        lock_directory(tmp_path, "run is working").__enter__()
    monkeypatch.undo()
    with (
        lock_directory(tmp_path, "run is working"),
        pytest.raises(DirectoryLocked, match="another run is working"),
        lock_directory(tmp_path, "run is working"),
    ):
        raise AssertionError("locked twice")


def test_only_the_disk_is_blamed_for_a_full_disk(tmp_path):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.distributed.DistBackendError("NCCL error"),
        RuntimeError("gloo"),
    ):
        with pytest.raises(type(error)), checkpoints.report_write_errors(tmp_path):
            raise error
    with pytest.raises(DgmrError, match="cannot write the checkpoint"), checkpoints.report_write_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_process_that_is_gone_is_one_sentence(process_group, tmp_path):
    for error in (
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        RuntimeError("NCCL operation timed out"),
        RuntimeError("[gloo/tcp/pair.cc:5] Read error"),
    ):
        with (
            pytest.raises(DgmrError, match=r"another process of this training is gone \(.*(NCCL|gloo)"),
            training_session(tmp_path, distill_config()),
        ):
            raise error


def test_a_process_that_fails_ends_those_that_wait_for_it(process_group, tmp_path, monkeypatch):
    with pytest.raises(DgmrError, match="the disk"), training_session(tmp_path, distill_config()):
        raise DgmrError("the disk")
    assert (tmp_path / FAILURE_FILE).exists()
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    monkeypatch.setattr("dgmr_tp.distillation.processes.EXIT_DELAY_S", 0.1)
    with training_session(tmp_path, distill_config()):
        assert not ended.wait(1.5), "what an earlier start left behind ends nothing"
        (tmp_path / FAILURE_FILE).touch()
        assert ended.wait(10)
    with pytest.raises(Preempted), training_session(tmp_path, distill_config()):
        raise Preempted("preempted")
    assert not (tmp_path / FAILURE_FILE).exists()


@pytest.mark.parametrize(
    "says", ["CUDA error: out of memory", "Cuda failure 'out of memory'", "CUBLAS_STATUS_ALLOC_FAILED", "else"]
)
def test_every_way_to_run_out_of_memory_names_what_needs_less(process_group, tmp_path, says):
    expected = RuntimeError if says == "else" else DgmrError
    with pytest.raises(expected) as caught, training_session(tmp_path, distill_config()):
        raise RuntimeError(says)
    assert says == "else" or all(key in str(caught.value) for key in ("recompute", "micro_batch", "zero_stage"))


def test_gpus_that_are_not_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c")
    with pytest.raises(DgmrError, match="CUDA_VISIBLE_DEVICES names GPU-8932f937-d72c"):
        launch_processes(["distill"], 2, 8, tmp_path / "stop")


def test_a_training_asks_for_the_step_before_it_to_be_finished(tmp_path):
    tuned = {"captions": "scenes:pairs", "steps": 2, "batch_size": 8, "base_lr": 1e-3}
    run = Run(recipe(scenes={"images": 200, "classes": 60, "captions": 40, "pairs": 20}, tune_text=tuned), tmp_path)
    with pytest.raises(
        DgmrError, match=r"distill/mlp_ratio-1 is not finished, which tune_text/mlp_ratio-1 reads. .* --until distill"
    ):
        run.train_worker("tune_text", "mlp_ratio-1")


def test_a_training_resumes_as_it_began_and_says_what_became_of_its_score(launched, tmp_path, capsys):
    """Bank and learning rate are those of the start. It is one test because DeepSpeed keeps its process group."""
    scenes.write_classification(tmp_path / "images", 60, seed=5)
    images = Images.find(tmp_path / "images")
    loss = {"balanced": True, "cosine": 10.0, "neighbors": 1.0}
    config = distill_config(base_lr=None, steps=6, held_out=9, evaluate_every=2, loss=loss, checkpoint_every=100)

    def run(name: str, seed: int = 0, teacher: OpenedModel | None = None, **changes) -> tuple[dict, dict, str]:
        student, changed = (
            prune(open_model("demo"), criterion="l2", mlp_ratio=1).model,
            config.model_copy(update=changes),
        )
        capsys.readouterr()
        figures = distill(teacher or open_model("demo"), student, images, changed, tmp_path / name, seed=seed)
        return figures, student.tower.state_dict(), capsys.readouterr().out

    figures, weights, printed = run("whole")
    assert figures["best_step"] == 6 and "distillation: step 6 of 6 was kept: its held-out score is 0." in printed
    assert f"peak learning rate {figures['peak_learning_rate']:.2g}, found on 4 batches" in printed
    assert "fell" not in printed
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / STOP_FILE).touch()
    with pytest.raises(Preempted, match="preempted at step 1 of 6"):
        run("parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "lost")
    resumed, resumed_weights, printed = run("parts")
    assert "resumes at step 1 of 6" in printed and "found on" not in printed
    assert resumed["peak_learning_rate"] == figures["peak_learning_rate"]
    assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights)
    teacher = open_model("demo")
    for block in teacher.tower.transformer.resblocks:
        block.mlp.c_proj.weight.data.mul_(0.5)
    lost, lost_weights, _ = run("lost", teacher=teacher)
    assert lost["peak_learning_rate"] == figures["peak_learning_rate"], "it is read, not found again"
    assert not torch.equal(lost_weights["conv1.weight"], weights["conv1.weight"])

    failed, failed_weights, printed = run("failed", base_lr=3.0)
    (_, start), (_, first), *_ = read_curve(tmp_path / "failed", "score")
    assert failed["peak_learning_rate"] == 3.0 * 8 / 256 and failed["best_step"] == 0
    assert f"distillation: the held-out score fell from {start:.4f} to {first:.4f} in the first 2 steps" in printed
    assert printed.count("the held-out score fell") == 1
    assert "the start was kept: no step improved its score" in printed
    begin = prune(open_model("demo"), criterion="l2", mlp_ratio=1).model.tower.state_dict()
    assert all(torch.equal(failed_weights[name], begin[name]) for name in begin)


# The tests below launch processes.


def bank_and_rate(rank: int, world: int, folder: Path) -> None:
    """Save the bank and the learning rate that the process ``rank`` of ``world`` computes."""
    store = torch.distributed.FileStore(str(folder / f"store {world}"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    os.environ.update({"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    preprocess = lambda image: torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 128 - 1  # noqa: E731
    images, objective = Images.find(folder / "images"), DistillationLoss(balanced=True, cosine=1.0, neighbors=1.0)
    student, teacher = (FeatureTap(adapt(redraw(timm_tower(), seed)), objective) for seed in (1, 2))
    bank = compute_bank(images, preprocess, lambda batch: teacher(batch, embedding=True), (3, 32, 32), 4, seed=0)
    crops = Crops(images, preprocess, 0)
    samples = batches(crops, batch=8, micro=2, seed=0, first_step=0, steps=4, rank=rank, world=world, workers=0)
    micro = list(samples)
    steps = [micro[first : first + 4 // world] for first in range(0, len(micro), 4 // world)]
    loss = lambda sample: objective.total(objective(student(sample.images), teacher(sample.images), bank))  # noqa: E731
    rate = find_learning_rate(student, steps, loss)
    torch.save((bank.embeddings, bank.deviations, rate), folder / f"{rank} of {world}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_bank_and_the_learning_rate_are_the_same_at_one_and_two_processes(tmp_path):
    scenes.write_classification(tmp_path / "images", 21, seed=5)
    for world in (1, 2):
        torch.multiprocessing.spawn(bank_and_rate, (world, tmp_path), nprocs=world)
    (alone, deviations, rate), *pair = (torch.load(tmp_path / name) for name in ("0 of 1.pt", "0 of 2.pt", "1 of 2.pt"))
    assert alone.shape[0] == 21
    for embeddings, pair_deviations, pair_rate in pair:
        assert torch.allclose(embeddings, alone, atol=1e-6) and pair_rate == rate
        assert all(torch.allclose(pair_deviations[name], deviations[name], rtol=1e-6) for name in deviations)
    assert torch.equal(pair[0][0], pair[1][0]), "the processes have the same bank to the bit"
    assert not torch.allclose(alone, alone.roll(1, 0), atol=1e-3), "the order counts"


STAGES = ("zero0", "zero1", "zero2", "zero3")
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Without it, ZeRO-3 does not shard parameters as small as the demo CLIP's."""
HELD_OUT = {"held_out": 9, "evaluate_every": 3, "base_lr": 0.03, "log_every": 100}
"""A learning rate at which the score first rises and then falls. 9 images are an uneven share for 2 processes."""
STILL = {"bf16": True, "steps": 2, "base_lr": 1e-12, "held_out": 9, "evaluate_every": 2}
"""A training that moves nothing, so that its result is its start."""
MATRIX = {
    **{name: {"zero_stage": int(name[-1])} for name in STAGES[:3]},
    "zero3": {"zero_stage": 3, "json": SHARDED},
    "micro": {"micro_batch": 2},
    "recompute": {"recompute": True},
    "sharded teacher": {"shard_teacher": True, "json": SHARDED},
    "sharded both": {"shard_teacher": True, "zero_stage": 3, "recompute": True, "micro_batch": 2, "json": SHARDED},
    "offload": {"zero_stage": 2, "offload": "optimizer"},
    "offload all": {"zero_stage": 3, "offload": "all", "json": SHARDED},
    "average": {"ema": 0.5},
    "watched average": {"ema": 0.5, "held_out": 9, "evaluate_every": 3},
    "average zero0": {"ema": 0.5, "zero_stage": 0},
    "average zero3": {"ema": 0.5, "zero_stage": 3, "json": SHARDED},
    "average offload": {"ema": 0.5, "zero_stage": 2, "offload": "optimizer"},
    "average offload all": {"ema": 0.5, "zero_stage": 3, "offload": "all", "json": SHARDED},
    "clipped": {"gradient_clipping": 0.01},
    "fixed": {"fixed_crops": True, "features": "fixed.features"},
    "index": {"loss": {"balanced": True, "cosine": 1.0, "neighbors": 1.0}},
    "index sharded": {
        "loss": {"balanced": True, "cosine": 1.0, "neighbors": 1.0},
        "shard_teacher": True,
        "zero_stage": 3,
        "json": SHARDED,
    },
    "found rate": {"base_lr": None, "micro_batch": 2},
    "found rate bf16": {"base_lr": None, "bf16": True},
    **{f"held out zero{stage}": {**HELD_OUT, "zero_stage": stage, "json": SHARDED} for stage in (1, 3)},
    **({"compiled": {"compile": True}} if shutil.which("g++") else {}),
    "bf16": {"bf16": True},
    "bf16 zero2": {"bf16": True, "zero_stage": 2, "micro_batch": 2},
    "bf16 zero3": {"bf16": True, "zero_stage": 3, "json": SHARDED},
    "bf16 average": {"bf16": True, "ema": 0.5},
    **{f"bf16 still zero{stage}": {**STILL, "zero_stage": stage, "json": SHARDED} for stage in (1, 2, 3)},
    "bf16 still average": {**STILL, "held_out": 0, "ema": 0.5},
}
MATRIX = {name: {**case, "weight_decay": 0.1} for name, case in MATRIX.items()}


def launch(folder: Path, processes: int, cases: dict) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    program = [
        str(BIN / "torchrun"),
        "--nproc_per_node",
        str(processes),
        str(Path(__file__).with_name("distill_worker.py")),
        str(folder),
    ]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    scenes.write_classification(folder / "images", 60, seed=5)
    launch(folder, 2, MATRIX)
    return folder


def start() -> dict[str, torch.Tensor]:
    return prune(open_model("demo"), criterion="l2", mlp_ratio=1).model.tower.state_dict()


def without_key_biases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the key biases. A softmax ignores them, so that Adam turns the rounding of their gradient into steps."""
    return {
        k: torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) if k.endswith("attn.in_proj_bias") else t for k, t in state.items()
    }


def relative_distance(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], begin: dict[str, torch.Tensor] | None = None
) -> float:
    """Return the distance of ``a`` and ``b`` in norm, relative to the distance of ``a`` from the start of the training.

    Single weights cannot be compared: Adam turns the rounding of a gradient near zero into a full step.
    """
    a, b, begin = map(without_key_biases, (a, b, begin or start()))
    norm = lambda x, y: sum(float((x[k] - y[k]).double().square().sum()) for k in x) ** 0.5  # noqa: E731
    return norm(a, b) / norm(a, begin)


@cache
def plain_torch(folder: Path, clipping: float, fixed: bool, averaged: bool) -> dict[str, torch.Tensor]:
    """Train in one process without DeepSpeed and without our adapters: open_clip's modules and the papers' formulas."""
    config = distill_config(gradient_clipping=clipping, fixed_crops=fixed)
    opened = open_model("demo")
    teacher, student = opened.module.visual, prune(opened, criterion="l2", mlp_ratio=1).model.tower.train()
    crops = Crops(
        Images.find(folder / "images"),
        training_transform(opened.preprocess_config, 64, config.min_crop, config.flip),
        0,
        config.fixed_crops,
    )
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not name.startswith(("ln_post", "proj")))
    decayed = ("conv1.weight", "in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    groups = [
        {
            "params": [p for n, p in student.named_parameters() if p.requires_grad and n.endswith(decayed)],
            "weight_decay": 0.1,
        },
        {
            "params": [p for n, p in student.named_parameters() if p.requires_grad and not n.endswith(decayed)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    tokens = lambda tower, x: tower.transformer(tower._embeds(x))  # noqa: E731
    average = {name: p.detach().clone() for name, p in student.named_parameters()}
    samples = batches(crops, batch=8, micro=8, seed=0, first_step=0, steps=config.steps, rank=0, world=1, workers=0)
    for step, (images, *_) in enumerate(samples):
        for group in optimizer.param_groups:
            group["lr"] = (
                config.base_lr * 8 / 256 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / config.steps))).item()
            )
        with torch.no_grad():
            teacher_tokens = tokens(teacher, images)
        student_tokens = tokens(student, images)
        loss = (student_tokens[:, 0] - teacher_tokens[:, 0]).square().mean() + (
            student_tokens[:, 1:] - teacher_tokens[:, 1:]
        ).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if config.gradient_clipping:
            nn.utils.clip_grad_norm_(student.parameters(), config.gradient_clipping)
        optimizer.step()
        for name, parameter in student.named_parameters():
            average[name] = 0.5 * average[name] + 0.5 * parameter.detach()
    return {**student.state_dict(), **average} if averaged else student.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [name for name in MATRIX if not name.startswith(("bf16", "held", "watched", "index", "found"))]
)
def test_every_way_to_run_ends_where_plain_torch_ends(matrix, case):
    config = distill_config(**MATRIX[case])
    weights = load_file(matrix / f"{case}.safetensors")
    limits = (config.gradient_clipping, 0.0 if config.gradient_clipping else 0.01)
    expected, wrong = (plain_torch(matrix, limit, config.fixed_crops, bool(config.ema)) for limit in limits)
    assert relative_distance(weights, expected) < 0.0005
    assert relative_distance(weights, wrong) > 0.02


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([loss for _, loss in read_curve(folder, "loss")])


@pytest.mark.slow
def test_bf16_trains_float32_weights(matrix):
    for name in ("bf16", "bf16 zero2", "bf16 zero3", "bf16 average"):
        weights = load_file(matrix / f"{name}.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        fc1 = weights["transformer.resblocks.0.mlp.c_fc.weight"]
        assert (fc1 == fc1.bfloat16().float()).float().mean() < 0.1, f"{name}: the master weights were rounded"
        assert torch.equal(start()["ln_post.weight"], weights["ln_post.weight"]), "what is not trained was rounded"
        assert len(losses(matrix / name)) == 12 and torch.allclose(
            losses(matrix / name), losses(matrix / "zero1"), rtol=0.1
        ), name


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in MATRIX if name.startswith("bf16 still")])
def test_bf16_starts_from_the_float32_weights(matrix, case):
    weights, before = load_file(matrix / f"{case}.safetensors"), start()
    rounded = {name: tensor.bfloat16().float() for name, tensor in before.items()}
    zero = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    assert relative_distance(before, weights, zero) < 1e-6
    assert relative_distance(before, rounded, zero) > 5e-4


@pytest.mark.slow
def test_the_losses_of_an_index_train_with_sharded_parameters_too(matrix):
    index, sharded, plain = (load_file(matrix / f"{name}.safetensors") for name in ("index", "index sharded", "zero1"))
    assert relative_distance(index, sharded) < 0.0005 and relative_distance(index, plain) > 0.02
    assert {f"loss_{name}" for name in ("class_token", "cosine", "neighbors")} <= set(curve_names(matrix / "index"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in MATRIX if name.startswith("held")])
def test_the_best_student_on_images_held_out_is_the_result(matrix, case):
    curve = dict(read_curve(matrix / case, "score"))
    assert list(curve) == [0, 3, 6, 9, 12] and max(curve.values()) > curve[12] + 1e-3
    opened, images = open_model("demo"), Images.find(matrix / "images")
    held_out, others = images.split(9, seed=0)
    names = [{record.name for record in part.records} for part in (held_out, others)]
    assert (
        len(names[0]) == 9
        and not names[0] & names[1]
        and names[0] | names[1] == {record.name for record in images.records}
    )
    pictures = torch.stack([opened.preprocess(held_out.read(i)) for i in range(9)])
    student = prune(opened, criterion="l2", mlp_ratio=1).model.tower
    student.load_state_dict(load_file(matrix / f"{case}.safetensors"))
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(student(pictures), opened.module.visual(pictures)).mean()
    assert float(cosine) == pytest.approx(max(curve.values()), abs=1e-4)
    assert read_curve(matrix / case, "knn") == [], "nine images of as many classes have nothing to tell"


@pytest.mark.slow
def test_a_moving_average_is_the_result_also_where_the_student_is_watched(matrix):
    assert [step for step, _ in read_curve(matrix / "watched average", "score")] == [0, 3, 6, 9, 12]
    assert json.loads((matrix / "watched average.figures").read_text())["best_step"] == 12
    assert not list((matrix / "watched average" / "checkpoints").glob("best*"))


@pytest.mark.parametrize("damage", [None, "weights", "no file", "manifest"])
def test_damaged_best_weights_do_not_count(process_group, tmp_path, damage):
    best = BestWeights(tmp_path)
    for score, step in ((0.25, 3), (0.75, 6), (0.5, 9)):
        best.update(score, step, [("w", torch.full((5,), float(step)))])
    [file] = tmp_path.glob("*.safetensors")
    if damage == "weights":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "manifest":
        best.manifest.write_text('{"step": [')
    elif damage:
        file.unlink()
    reopened = BestWeights(tmp_path)
    if damage:
        assert reopened.step == -1
        reopened.update(0.5, 9, [("w", torch.full((5,), 9.0))])
        assert torch.equal(BestWeights(tmp_path).load()["w"], torch.full((5,), 9.0))
    else:
        assert (reopened.score, reopened.step) == (0.75, 6) and torch.equal(reopened.load()["w"], torch.full((5,), 6.0))


def left_out(embeddings, classes):
    """Yield for each image whether the 20 nearest others predict its class, with votes exp(cosine / 0.07)."""
    for place, embedding in enumerate(embeddings):
        similar = embeddings @ embedding
        votes = {}
        for other in [i for i in (-similar).argsort() if i != place][:20]:
            votes[classes[other]] = votes.get(classes[other], 0) + math.exp(similar[other] / 0.07)
        yield max(votes, key=votes.get) == classes[place]


def test_held_out_images_with_classes_are_judged_by_their_neighbours(process_group, monkeypatch, tmp_path):
    generator = np.random.default_rng(0)
    for index in range(90):
        picture = (40 * (index % 3) + generator.normal(100, 60, (8, 8, 3))).clip(0, 255).astype("uint8")
        (tmp_path / str(index % 3)).mkdir(exist_ok=True)
        PIL.Image.fromarray(picture).save(tmp_path / str(index % 3) / f"{index}.png")
    (tmp_path / "1" / "broken.png").write_bytes(b"no image")
    images = Images.find(tmp_path)
    preprocess = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 128  # noqa: E731
    teacher, student = (lambda batch: batch.flatten(1)), (lambda batch: batch.mean((2, 3)))
    monkeypatch.setattr(validation, "current_device", lambda: torch.device("cpu"))
    held_out = HeldOutSet(images, preprocess, student, (3, 8, 8), 16)
    readable = [i for i in range(len(images)) if images.read(i) is not None]
    classes = [images.records[i].class_name() for i in readable]
    pictures = torch.stack([preprocess(images.read(i)) for i in readable])
    for tower, accuracy in ((student, held_out.scores(student)["knn"]), (student, held_out.teacher_scores["knn"])):
        embeddings = nn.functional.normalize(tower(pictures), dim=-1).double().numpy()
        assert accuracy == pytest.approx(sum(left_out(embeddings, classes)) / 90) and 0.4 < accuracy < 0.99
    wide = HeldOutSet(images, preprocess, teacher, (3, 8, 8), 16)
    assert wide.teacher_scores["knn"] != held_out.teacher_scores["knn"]
    few = HeldOutSet(replace(images, records=images.records[::4]), preprocess, student, (3, 8, 8), 16)
    assert few.teacher_scores == {}, "23 images of three classes"
    with pytest.raises(DgmrError, match="none of the 1 held-out images can be read"):
        broken = replace(images, records=[r for r in images.records if "broken" in r.name])
        HeldOutSet(broken, preprocess, student, (3, 8, 8), 16)
    (tmp_path / "loose.png").write_bytes((tmp_path / "0" / "0.png").read_bytes())
    without = HeldOutSet(Images.find(tmp_path), preprocess, student, (3, 8, 8), 16)
    assert without.teacher_scores == {} and without.scores(student) == {"score": pytest.approx(1)}


def test_an_image_that_stands_in_for_a_broken_one_has_no_number(tmp_path):
    for index in range(3):
        PIL.Image.new("RGB", (8, 8), (90 * index, 0, 0)).save(tmp_path / f"{index}.png")
    images = Images.find(tmp_path)
    crops = Crops(images, lambda image: torch.from_numpy(np.array(image)), 0)
    (tmp_path / "1.png").write_bytes(b"broken")
    assert [crops[2, index].rows for index in range(3)] == [[6], [-1], [8]]
    assert torch.equal(crops[2, 1].images, crops[2, 2].images)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep_features": True}, "serves several sizes, or fixed_crops: true; this recipe has neither"),
        ({"keep_features": True, "fixed_crops": True, "shard_teacher": True}, "does not work with shard_teacher"),
    ],
)
def test_features_are_kept_only_for_what_reads_them(changes, says):
    with pytest.raises(DgmrError, match=says):
        recipe(distill={**SMALL["distill"], **changes})
    assert recipe(
        distill={**SMALL["distill"], "keep_features": True}, prune={"mlp_ratio": [1, 2]}
    ).distill.keep_features
    url = recipe(
        images="https://nowhere/{0..3}.tar", distill={**SMALL["distill"], "keep_features": True, "fixed_crops": True}
    )
    with pytest.raises(
        DgmrError, match=r"distill.fixed_crops: shards behind a URL cannot be divided or numbered. Set it to false"
    ):
        Run(url, "runs/none").run()


def test_the_time_of_a_checkpoint_is_said(tmp_path):
    (tmp_path / "part").write_bytes(bytes(3_000_000))
    assert describe_save(tmp_path, 2.04, stop_seconds=29) == "a checkpoint is 3 MB and takes 2.0 s"
    assert (
        "A step and a checkpoint take 31 s, but the deepspeed launcher kills the processes 30 s after SIGTERM"
        in describe_save(tmp_path, 2, stop_seconds=31)
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_features_come_back_as_they_were_kept_or_not_at_all(tmp_path, precision):
    draw = lambda count: {"class_token": torch.randn(count, 5).to(precision), "patches": torch.randn(count, 4, 3)}  # noqa: E731
    cache, first, second = FeatureCache(tmp_path / "cache", draw(1), 100), draw(3), draw(2)
    cache.write([7, 0, 90], first)
    cache.write([3, 8], second)
    stored = FeatureCache(tmp_path / "cache", draw(1), 100).read([90, 7, 8])  # as another process does
    assert stored.keys() == first.keys()
    for name, values in stored.items():
        assert (
            torch.equal(values, torch.cat([first[name][[2, 0]], second[name][1:]]))
            and values.dtype == first[name].dtype
        )
    assert cache.read([7, 1]) is None and cache.read([200]) is None, "what was never written"
    with (tmp_path / "cache").open("r+b") as file:
        file.seek(8 * cache.row_bytes - 1)
        last = file.read(1)[0]
        file.seek(8 * cache.row_bytes - 1)
        file.write(bytes([last ^ 1]))
    assert cache.read([7]) is None and cache.read([0, 8]) is not None, "a damaged row"
    cache.write([-1, 11], second)
    assert cache.read([11]) is not None and cache.read([-1]) is None, "a crop without number"
    with pytest.raises(DgmrError, match=r"take .* GB, but only .* GB are free at .*. Free disk space"):
        FeatureCache(tmp_path / "more", draw(1), 10**15)


@pytest.mark.slow
def test_kept_features_change_no_bit_and_are_what_the_student_learns_from(matrix, tmp_path):
    """A teacher with zeroed weights changes nothing if its features are cached, and changes the result otherwise."""
    shutil.copytree(matrix / "images", tmp_path / "images")
    cached = {"features": "file"}
    launch(tmp_path, 2, {"plain": {}, "writes": cached, "reads": {**cached, "lost": True}, "lost": {"lost": True}})
    plain, writes, reads, lost = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "writes", "reads", "lost")
    )
    assert all(torch.equal(plain[name], writes[name]) and torch.equal(plain[name], reads[name]) for name in plain)
    assert relative_distance(lost, plain) > 0.1
    fixed, fresh = (load_file(matrix / f"{name}.safetensors") for name in ("fixed", "zero1"))
    assert relative_distance(fixed, fresh) > 0.02, "the second epoch has the crops of the first"


@pytest.mark.slow
def test_a_run_goes_on_at_another_number_of_processes(matrix):
    """With 2, 1 and 2 processes for steps 0–4, 4–8 and 8–12, in every ZeRO stage."""
    names = (*STAGES, "average", "average zero0", "average zero3", "bf16", "index", "found rate")
    cases = {name: MATRIX[name] for name in names}
    one = {f"{name} one": {**case, "after": name, "step": 4} for name, case in cases.items()}
    one["found rate alone"] = {**MATRIX["found rate"], "micro_batch": 8}
    one["found rate lost"] = {**one["found rate one"], "lost": True}
    launch(matrix, 1, one)
    for name in cases:
        seal = json.loads((matrix / f"{name} one" / "checkpoints" / "step00000008" / MANIFEST).read_text())
        assert seal["processes"] == 1 and not list((matrix / f"{name} one" / "checkpoints").glob("*universal*"))
    launch(matrix, 2, {f"{name} back": {**case, "after": f"{name} one", "step": 8} for name, case in cases.items()})
    for name in cases:
        uninterrupted, resumed = (
            load_file(matrix / f"{name}.safetensors"),
            load_file(matrix / f"{name} back.safetensors"),
        )
        assert relative_distance(uninterrupted, resumed) < (0.005 if name == "bf16" else 0.0005), name
        curves = losses(matrix / name), losses(matrix / f"{name} back")
        assert len(curves[1]) == 12 and torch.allclose(*curves, rtol=0.005 if name == "bf16" else 1e-4), name
    figures = lambda name: json.loads((matrix / f"{name}.figures").read_text())  # noqa: E731
    rates = [figures(f"found rate{name}")["peak_learning_rate"] for name in ("", " alone", " one", " back", " lost")]
    assert len(set(rates)) == 1 and 1e-5 < rates[0] < 1e-2, "another teacher gives another rate, if it is asked"
    assert figures("found rate bf16")["peak_learning_rate"] / rates[0] in (0.5, 1, 2)
    assert figures("zero1")["peak_learning_rate"] == 1e-3 * 8 / 256
    # It resumed and did not start again: a different training ends elsewhere.
    assert relative_distance(load_file(matrix / "zero1.safetensors"), load_file(matrix / "clipped.safetensors")) > 0.02


@pytest.mark.slow
def test_what_goes_wrong_is_one_sentence_and_costs_at_most_the_steps_since_the_last_checkpoint(matrix):
    shutil.copytree(matrix / "images", matrix / "broken")
    [shard] = (matrix / "broken").rglob("*.tar")
    content = bytearray(shard.read_bytes())
    for record in Images.find(matrix / "broken").records[::3]:
        content[record.offset : record.offset + record.length] = bytes(record.length)
    shard.write_bytes(content)
    scenes.write_classification(matrix / "fewer", 59, seed=5)
    shutil.copytree(matrix / "images", matrix / "all broken")
    [shard] = (matrix / "all broken").rglob("*.tar")
    content = bytearray(shard.read_bytes())
    for record in Images.find(matrix / "all broken").records:
        content[record.offset : record.offset + record.length] = bytes(record.length)
    shard.write_bytes(content)
    shard_file = matrix / "images" / "test" / "0.tar"
    cases = {
        "damaged": {**MATRIX["zero1"], "after": "zero1", "damage": 12},
        "too many broken": {"images": str(matrix / "broken")},
        "some broken": {"images": str(matrix / "broken"), "max_broken": 0.5},
        "broken held out": {"images": str(matrix / "broken"), "max_broken": 0.5, "held_out": 9},
        "not finite": {"base_lr": 1e30},
        "no share": {"batch_size": 7},
        "too many held out": {"held_out": 40},
        "unlike": {"images": [str(matrix / "images"), str(matrix / "fewer")]},
        "stream": {"images": f"pipe:cat {matrix / 'images' / 'test' / '0.tar'}", "workers": 1},
        "no shard": {"images": f"pipe:cat {matrix / 'images' / 'test' / '7.tar'}", "workers": 1},
        "cut shard": {"images": f"pipe:head -c {shard_file.stat().st_size // 2 + 100} {shard_file}", "workers": 1},
        "all broken": {"images": str(matrix / "all broken")},
    }
    launch(matrix, 2, cases)
    says = lambda name: (matrix / f"{name}.error").read_text()  # noqa: E731
    assert (
        relative_distance(load_file(matrix / "damaged.safetensors"), load_file(matrix / "zero1.safetensors")) < 0.0005
    )
    assert "images do not decode, more than distill.max_broken = 0.01; first:" in says("too many broken")
    assert (
        "the loss is" in says("not finite")
        and "Set a lower distill.base_lr" in says("not finite")
        and ".tar:" in says("not finite")
    )
    assert "distill.batch_size = 7 cannot be divided over 2 processes" in says("no share")
    held_out = {record.name for record in Images.find(matrix / "broken").split(9, seed=0)[0].records}
    listed = held_out & json.loads((matrix / "broken held out.figures").read_text())["broken_images"].keys()
    assert 0 < len(listed) < 9 and all(0 < score <= 1 for _, score in read_curve(matrix / "broken held out", "score"))
    assert "distill.held_out = 40, but" in says("too many held out") and "is 60 images. Hold out fewer" in says(
        "too many held out"
    )
    assert "the processes do not see the same files in" in says("unlike")
    assert "cannot read the shard pipe:cat" in says("no shard") and "Traceback" not in says("no shard")
    assert "cannot read the shard pipe:head" in says("cut shard") and "Traceback" not in says("cut shard")
    assert "none of the 60 images in" in says("all broken")
    assert (
        0.5 < relative_distance(load_file(matrix / "zero1.safetensors"), load_file(matrix / "stream.safetensors")) < 1.5
    )  # other crops
    listed = json.loads((matrix / "some broken" / "checkpoints" / "step00000012" / MANIFEST).read_text())["broken"]
    met = {name for name in listed if name.endswith(".png")}
    assert len(met) == 20  # 12 · 8 images are more than an epoch of 60


def a_rank(process: psutil.Process) -> psutil.Process:
    """Return the second of the launched processes."""
    return next(each for each in process.children(recursive=True) if each.environ().get("RANK") == "1")


@pytest.mark.slow
def test_a_run_killed_ten_times_at_random_ends_as_an_unbroken_one(small_run, tmp_path):
    """300 steps, with SIGKILL at random moments: in a step, a save, an evaluation, or right after a start.

    It goes in turn to the command and to one of the processes that it launched; then the job ends with code 2.
    """
    path = write_recipe(
        tmp_path / "small.yaml",
        distill={**SMALL["distill"], "steps": 300, "checkpoint_every": 7, "held_out": 12, "evaluate_every": 5},
    )
    for name in ("whole", "killed"):
        copy_finished_stages(small_run[0], tmp_path / name)
    done = run_command("run", path, "-o", tmp_path / "whole", "--until", "distill")
    assert done.returncode == 0, done.stdout + done.stderr
    directory, chance = tmp_path / "killed", random.Random(0)
    folder = directory / "distill/.mlp_ratio-1.partial/checkpoints"
    reached = lambda: max((int(seal.parent.name[4:]) for seal in folder.glob(f"*/{MANIFEST}")), default=0)  # noqa: E731
    resume = command("run", path, "-o", directory, "--until", "distill")
    for turn in range(10):
        before, wait = reached(), 0.5 * chance.random()
        victim = a_rank if turn % 2 else lambda process: process
        code = kill_when(resume, lambda before=before: reached() > before, tmp_path / "log", wait, victim)
        log = (tmp_path / "log").read_text()
        assert code == (2 if turn % 2 else -signal.SIGKILL) and "Traceback" not in log, log[-3000:]
        wait_for_the_end_of_workers(directory)
    assert not (directory / "distill/mlp_ratio-1").exists(), "it was over before the last kill"
    done = run_command("run", path, "-o", directory, "--until", "distill")
    assert done.returncode == 0 and "resumes at step" in done.stdout, done.stdout + done.stderr
    ours, reference = (
        load_file(tmp_path / name / "distill/mlp_ratio-1/model/open_clip_model.safetensors")
        for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.slow
def test_a_full_disk_ends_all_processes_with_one_sentence_and_the_run_goes_on(small_run, tmp_path):
    whole, _ = small_run
    directory, path = copy_finished_stages(whole, tmp_path / "run"), write_recipe(tmp_path / "small.yaml")
    resume = command("run", path, "-o", directory, "--until", "distill")
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 2000; exec "$@"', "x", *resume], capture_output=True, text=True, timeout=300
    )
    assert full.returncode == 2 and "cannot write the checkpoint" in full.stderr and "Free disk space" in full.stderr, (
        full.stdout + full.stderr
    )
    assert not list(directory.glob(f"distill/.*/checkpoints/*/{MANIFEST}"))
    done = run_command("run", path, "-o", directory, "--until", "distill")
    assert done.returncode == 0, done.stdout + done.stderr
    ours, reference = (
        load_file(root / "distill/mlp_ratio-1/model/open_clip_model.safetensors") for root in (directory, whole)
    )
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.slow
def test_a_preempted_run_says_so_saves_and_ends_as_an_unbroken_one(small_run, tmp_path):
    whole, _ = small_run
    section = {**SMALL["distill"], "checkpoint_every": 24, "workers": 1}
    directory, path = (
        copy_finished_stages(whole, tmp_path / "run"),
        write_recipe(tmp_path / "small.yaml", distill=section),
    )
    curve = directory / "distill/.mlp_ratio-1.partial/log/train_loss.csv"
    with (tmp_path / "log").open("w") as stream:
        process = subprocess.Popen(command("run", path, "-o", directory), stdout=stream, stderr=stream)
        deadline = time.monotonic() + 300
        while not curve.exists() or len(curve.read_text().splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143, (tmp_path / "log").read_text()[-3000:]
    log = (tmp_path / "log").read_text()
    assert "preempted" in log and "Traceback" not in log
    checkpoint = max(curve.parent.parent.glob(f"checkpoints/*/{MANIFEST}"))
    step = json.loads(checkpoint.read_text())["step"]
    assert 3 <= step < 24
    done = run_command("run", path, "-o", directory, "--until", "distill")
    assert done.returncode == 0 and f"resumes at step {step} of 24" in done.stdout, done.stdout + done.stderr
    ours, reference = (
        load_file(root / "distill/mlp_ratio-1/model/open_clip_model.safetensors") for root in (directory, whole)
    )
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.slow
def test_a_job_whose_processes_are_all_told_to_stop_saves_too(small_run, tmp_path):
    """As Slurm's scancel and stopping a container do."""
    whole, _ = small_run
    directory = copy_finished_stages(whole, tmp_path / "run")
    path = write_recipe(tmp_path / "small.yaml", distill={**SMALL["distill"], "checkpoint_every": 24})
    curve = directory / "distill/.mlp_ratio-1.partial/log/train_loss.csv"
    with (tmp_path / "log").open("w") as stream:
        process = psutil.Popen(command("run", path, "-o", directory), stdout=stream, stderr=stream)
        deadline = time.monotonic() + 300
        while not curve.exists() or len(curve.read_text().splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        for each in [*process.children(recursive=True), process]:
            each.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143, (tmp_path / "log").read_text()[-3000:]
    assert "preempted" in (tmp_path / "log").read_text()
    steps = [json.loads(seal.read_text())["step"] for seal in curve.parent.parent.glob(f"checkpoints/*/{MANIFEST}")]
    assert 3 <= max(steps) < 24, "a checkpoint beside the first step's"
    wait_for_the_end_of_workers(directory)


@pytest.mark.slow
def test_every_family_distils_in_bf16_as_in_float32(tmp_path):
    """Some towers add buffers to activations. By default DeepSpeed does not convert these with the weights."""
    scenes.write_classification(tmp_path / "images", 16, seed=5)
    for name, write in FAMILIES.items():
        write(tmp_path / f"model {name}")
    short = {"steps": 2, "batch_size": 4}
    cases = {
        f"{name} {bits}": {**short, "model": str(tmp_path / f"model {name}"), "bf16": bits == 16}
        for name in FAMILIES
        for bits in (16, 32)
    }
    cases["swin in pieces"] = {**cases["timm Swin 32"], "micro_batch": 1}
    launch(tmp_path, 1, cases)
    # Swin comes with stochastic depth, which would drop other blocks for every piece of the batch.
    whole, pieces = losses(tmp_path / "timm Swin 32"), losses(tmp_path / "swin in pieces")
    assert torch.allclose(whole, pieces, rtol=1e-4) and whole[0] != whole[1]
    for name in FAMILIES:
        (first, _), (exact, _) = (losses(tmp_path / f"{name} {bits}").tolist() for bits in (16, 32))
        assert first == pytest.approx(exact, rel=0.1), name


def test_what_does_not_decide_the_result_may_change_between_two_starts():
    base = recipe().distill
    for change in (
        {"processes": 1},
        {"workers": 2},
        {"micro_batch": 2},
        {"checkpoint_every": 5},
        {"hostfile": "hosts"},
    ):
        assert recipe(distill={**SMALL["distill"], **change}).distill.outcome_settings == base.outcome_settings
    assert recipe(distill={**SMALL["distill"], "base_lr": 2e-3}).distill.outcome_settings != base.outcome_settings
