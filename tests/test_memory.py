"""Memory estimates, compared with what autograd saves and with DeepSpeed's own estimates."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import call_command, recipe, redraw, timm_tower, write_recipe
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from test_distillation import distill_config

from dgmr_tp.distillation.losses import FeatureTap
from dgmr_tp.distillation.memory import Devices, MemoryEstimator
from dgmr_tp.encoders import adapt, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.estimate import estimate_distillation
from dgmr_tp.utils.modules import meta_copy


def estimator(config) -> MemoryEstimator:
    towers = [meta_copy(redraw(timm_tower())) for _ in range(2)]
    return MemoryEstimator(*map(adapt, towers), config, 32)


def saved_bytes(recompute: bool, batch: int) -> int:
    """Return the bytes that autograd saves on the CPU, with real values, when the backward pass begins."""
    tap = FeatureTap(adapt(redraw(timm_tower())), recompute=recompute)
    own = {parameter.data_ptr() for parameter in tap.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = tap(torch.zeros(batch, 3, 32, 32))
    del features
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(recompute):
    config = distill_config(recompute=recompute)
    image = estimator(config).estimate(config, 1).image
    once = saved_bytes(False, 2) / 2
    if recompute:
        recomputed = saved_bytes(True, 2) / 2
        assert (
            recomputed < 0.3 * once and recomputed < image < recomputed + once
        )  # plus two blocks at a time, one of each tower
    else:
        assert once < image < 1.5 * once  # plus one block of the teacher


def test_the_states_are_those_of_deepspeed_s_own_estimate():
    """For mixed precision, as in DeepSpeed's estimate, which leaves out the teacher. Its factor of 1.5 is set to 1."""
    base = distill_config(bf16=True, zero_stage=2)
    opened = open_model("open_clip:ViT-B-16", weights="none")
    memory = MemoryEstimator(opened.adapter, opened.adapter, base, 224)
    teacher, bucket, live = 2 * memory.teacher, 2 * memory.trained, 2 * memory.student
    for world in (2, 8):
        _, theirs = estimate_zero2_model_states_mem_needs(
            memory.student, world, 1, cpu_offload=False, additional_buffer_factor=1
        )
        ours = memory.estimate(base, world).states - teacher - bucket
        assert ours == pytest.approx(theirs, rel=0.15), world
        _, theirs, _ = estimate_zero3_model_states_mem_needs(memory.student, 0, world, 1, False, False, False, 1)
        ours = memory.estimate(base.model_copy(update={"zero_stage": 3}), world).states - teacher - bucket - live
        assert ours == pytest.approx(theirs, rel=0.15), world


def test_what_saves_memory_saves_memory():
    base = distill_config(zero_stage=1)
    memory = estimator(base)
    states = lambda world=8, **changes: memory.estimate(base.model_copy(update=changes), world).states  # noqa: E731
    assert states(zero_stage=3) < states(zero_stage=1) < states(zero_stage=0) < states(zero_stage=0, ema=0.9)
    assert states(zero_stage=3, offload="all") < states(zero_stage=3, offload="optimizer") < states(zero_stage=3)
    assert states(world=16) < states(world=8)


def test_the_beginning_has_to_fit_too():
    """Before ZeRO-3 shards them, every device holds the teacher and then the float32 student unsharded."""
    base = distill_config(bf16=True, zero_stage=3, shard_teacher=True)
    memory = estimator(base)
    memory.student = memory.trained = memory.teacher = 4_000_000_000
    assert memory.estimate(base, 64).states < 10e9 and memory.estimate(base, 64).startup > 16e9
    assert (
        memory.estimate(base, 64).max_images(Devices(64, 16e9))
        == 0
        < memory.estimate(base, 64).max_images(Devices(64, 24e9))
    )


def test_a_recipe_that_does_not_fit_says_what_would(tmp_path):
    small = recipe()
    text, misfit = estimate_distillation(small, "2x1GB", rate="2")
    assert "the recipe: 4 images at a time on each of 2 devices" in text and misfit is None
    assert "192 images at 2 per second: 0.0 hours" in text and all(len(line) <= 80 for line in text.splitlines())
    assert "\n192 images\n" in estimate_distillation(small, "2x1GB")[0] + "\n"
    assert (
        estimate_distillation(small, "2x0.028GB")[1]
        == "mlp_ratio-1 does not fit into 2x0.028GB. It would fit with distill.micro_batch: 2."
    )
    assert "Take larger devices" in estimate_distillation(small, "2x0.001GB")[1]
    done = call_command("estimate", write_recipe(tmp_path / "small.yaml"), "--devices", "2x0.028GB")
    assert done.returncode == 2 and "the recipe: 4 images" in done.stdout and "It would fit with" in done.stderr
    with pytest.raises(DgmrError, match=r"--devices 8 is not a number and a size of devices\. Write it as in 8x48GB"):
        estimate_distillation(small, "8")
    with pytest.raises(DgmrError, match="has no section distill"):
        estimate_distillation(recipe(distill=None), "2x1GB")


def test_hours_are_counted_with_the_rate_of_a_run_that_has_begun(small_run, tmp_path):
    directory, _ = small_run
    [log] = directory.glob("distill/mlp_ratio-1/log/*samples_per_second.csv")
    rates = [float(line.split(",")[1]) for line in log.read_text().splitlines()[1:]]
    later = rates[len(rates) // 2 :]
    match = re.search(
        r"192 images at ([\d.]+) per second \(measured in", estimate_distillation(recipe(), "2x1GB", str(directory))[0]
    )
    assert min(later) * 0.999 <= float(match[1]) <= max(later) * 1.001
    copy_finished_stages = tmp_path / "begun/distill/.mlp_ratio-1.partial/log"
    copy_finished_stages.mkdir(parents=True)
    (copy_finished_stages / log.name).write_text("step,rate\n1,9\n2,0.02\n3,0.01\n4,0.03\n5,half")
    assert "192 images at 0.02 per second" in estimate_distillation(recipe(), "2x1GB", str(tmp_path / "begun"))[0]
    for wrong in ("0", "-3", "nan"):
        with pytest.raises(DgmrError, match=f"--rate {wrong}: images per second must be above 0"):
            estimate_distillation(recipe(), "2x1GB", wrong)
    with pytest.raises(DgmrError, match="or the directory of a run that has started to distill mlp_ratio-1"):
        estimate_distillation(recipe(), "2x1GB", str(tmp_path))


def test_the_least_change_comes_first():
    base = distill_config(zero_stage=1)
    memory = estimator(base)
    share = base.batch_size // 2
    needs = memory.estimate(base, 2)
    room = lambda needs, images: (needs.states + (images + 0.5) * needs.image) / 0.9  # noqa: E731
    assert memory.fits(base, Devices(2, room(needs, share)))
    assert memory.smallest_change(base, Devices(2, room(needs, 2))) == {"micro_batch": 2}
    less = memory.estimate(base.model_copy(update={"recompute": True}), 2)
    change = memory.smallest_change(base, Devices(2, room(less, 1)))
    assert change["recompute"] is True and change["micro_batch"] == 1
    assert memory.smallest_change(base, Devices(2, 1000)) is None
