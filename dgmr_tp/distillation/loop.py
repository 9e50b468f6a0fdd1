"""Distillation under DeepSpeed: one function, run by every process of the launcher.

Teacher and student arrive opened, the settings as a plain object; recipes and run directories are not known here.
"""

from __future__ import annotations

import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dgmr_tp.data.images import Images
from dgmr_tp.distillation.data import Crops, batches, training_transform
from dgmr_tp.distillation.losses import FeatureTap, feature_loss
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.extras import require
from dgmr_tp.files import hold
from dgmr_tp.progress import Meter

WHOLE = "whole"
"""The file that marks a checkpoint which was written to its end."""


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a distillation; what the recipe's ``distill`` section says."""

    steps: int
    batch_size: int
    """Global: over all processes."""
    base_lr: float
    """The learning rate is ``base_lr · batch_size / 256``."""
    min_lr: float
    warmup_steps: int
    weight_decay: float
    min_crop: float
    flip: bool
    zero_stage: int
    bf16: bool
    checkpoint_every: int
    log_every: int
    workers: int
    seed: int


def distill(teacher: OpenedModel, student: OpenedModel, images: Images, settings: Settings, directory: Path) -> dict[str, Any] | None:
    """Train ``student`` to give ``teacher``'s features, resuming from ``directory`` if a checkpoint lies there.

    Run it in every process that the ``deepspeed`` launcher started. AdamW (0.9, 0.95), warm-up, cosine to ``min_lr``;
    norms, biases and embeddings are not decayed. Only what the features depend on is trained.

    Args:
        teacher, student: opened on the CPU; the student is trained in place.
        images: unlabelled.
        settings: see :class:`Settings`.
        directory: checkpoints and the loss curve (``log/``, CSV) go here.

    Returns:
        On rank 0 the figures of the run, None elsewhere. The student of rank 0 then holds the trained weights.

    Raises:
        DgmrError: the batch cannot be divided over the processes, the loss is not finite, or another run is in ``directory``.
    """
    deepspeed = _start_deepspeed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    lock = hold(directory, "distillation is running") if rank == 0 else None
    if settings.batch_size % world:
        raise DgmrError(f"distill.batch_size = {settings.batch_size} cannot be divided over {world} processes")
    torch.manual_seed(settings.seed)
    precision = torch.bfloat16 if settings.bf16 else torch.float32
    device = torch.device(deepspeed.accelerator.get_accelerator().current_device_name())
    teacher_tap = FeatureTap(teacher.encoder).to(device, precision).eval().requires_grad_(False)
    student_tap = FeatureTap(student.encoder).to(device, torch.float32).train()
    freeze_what_features_do_not_need(student_tap, student.image_size)
    start = {name: tensor.cpu().clone() for name, tensor in student_tap.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(student_tap, settings.weight_decay), lr=1.0, betas=(0.9, 0.95))
    peak = settings.base_lr * settings.batch_size / 256
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, settings, peak))
    engine, *_ = deepspeed.initialize(
        model=student_tap, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config(settings, world, directory)
    )
    checkpoints = directory / "checkpoints"
    first = 0
    if tag := _newest(checkpoints):
        _, state = engine.load_checkpoint(str(checkpoints), tag=tag)
        first = state["step"]
    if rank == 0 and first:
        print(f"  distil: goes on at step {first} of {settings.steps}", flush=True)

    transform = training_transform(teacher.preprocess_config, teacher.image_size, settings.min_crop, settings.flip)
    loader = batches(
        Crops(images, transform, settings.seed),
        batch=settings.batch_size,
        seed=settings.seed,
        first_step=first,
        steps=settings.steps,
        rank=rank,
        world=world,
        workers=settings.workers,
    )
    with Meter("distil", settings.steps, done=first) if rank == 0 else nullcontext() as meter:
        for step, batch in enumerate(loader, start=first + 1):
            batch = batch.to(device, precision)
            with torch.no_grad():
                target = teacher_tap(batch)
            loss = feature_loss(engine(batch), target)
            mean_loss = loss.detach().float().clone()
            torch.distributed.all_reduce(mean_loss)
            value = mean_loss.item() / world
            if not math.isfinite(value):
                raise DgmrError(f"the loss is {value} at step {step}; lower distill.base_lr; the last checkpoint is kept in {checkpoints}")
            engine.backward(loss)
            engine.step()
            if meter:
                meter.step(step, f"loss {value:.4f} {settings.batch_size * (step - first) / meter.elapsed():.0f} images/s")
            if step % settings.log_every == 0 or step == settings.steps:
                engine.monitor.write_events([("distill/loss", value, step)])
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                _checkpoint(engine, checkpoints, step, rank)
    trained = _gathered(engine)
    if rank:
        return None
    student.module.to("cpu", torch.float32).requires_grad_(True).eval()
    student_tap.load_state_dict({**start, **trained})
    if lock is not None:
        lock.close()
    return {**asdict(settings), "processes": world, "images": len(images)}


def learning_rate(step: int, settings: Settings, peak: float) -> float:
    """Linear warm-up from 0 to ``peak``, then a cosine to ``min_lr`` at the last step; ``step`` counts from 0."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.min_lr + (peak - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if peak else 0.0


def deepspeed_config(settings: Settings, world: int, directory: Path) -> dict[str, Any]:
    """DeepSpeed's own configuration for these settings."""
    return {
        "train_micro_batch_size_per_gpu": settings.batch_size // world,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.bf16},
        "csv_monitor": {"enabled": True, "output_path": str(directory), "job_name": "log"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _start_deepspeed() -> Any:
    deepspeed = require("deepspeed", "distill")
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        # Plain gloo: nothing is compiled at launch, and no compiler has to be there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.accelerator.get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return deepspeed


def freeze_what_features_do_not_need(tap: FeatureTap, image_size: int) -> None:
    """The final norm and the projection get no gradient; left trainable they would still be decayed."""
    parameters = list(tap.requires_grad_(True).parameters())
    class_token, patches = tap(torch.zeros(1, 3, image_size, image_size).to(parameters[0].device, parameters[0].dtype))
    total = patches.sum() + (0 if class_token is None else class_token.sum())
    for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
        parameter.requires_grad_(gradient is not None)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of Linear and convolution layers are decayed; norms, biases, tokens and position embeddings are not."""
    decayed_names = {
        f"{name}.{kind}" if name else kind
        for name, layer in module.named_modules()
        for kind in (
            ("weight",)
            if isinstance(layer, nn.Linear | nn.Conv2d)
            else ("in_proj_weight",)
            if isinstance(layer, nn.MultiheadAttention)
            else ()
        )
    }
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if name in decayed_names]
    plain = [parameter for name, parameter in trained if name not in decayed_names]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _checkpoint(engine: Any, directory: Path, step: int, rank: int) -> None:
    """Save, and mark the checkpoint as whole when every rank has written its part; all but the newest two are dropped."""
    engine.save_checkpoint(str(directory), tag=f"step{step:08d}", client_state={"step": step}, save_latest=False)
    torch.distributed.barrier()
    if rank == 0:
        (directory / f"step{step:08d}" / WHOLE).touch()
        for old in sorted(directory.glob("step*"))[:-2]:
            shutil.rmtree(old)
    torch.distributed.barrier()


def _newest(directory: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = sorted(marker.parent.name for marker in directory.glob(f"step*/{WHOLE}"))
    return whole[-1] if whole else None


def _gathered(engine: Any) -> dict[str, torch.Tensor]:
    """The trained parameters in float32, whatever ZeRO stage sharded them. Every rank has to call it."""
    deepspeed = require("deepspeed", "distill")
    full = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            value = deepspeed.utils.safe_get_full_fp32_param(parameter)
            full[name] = (parameter.detach() if value is None else value).float().cpu().clone()
    return full


def read_losses(directory: Path) -> list[tuple[int, float]]:
    """The loss curve that DeepSpeed's monitor wrote: (step, loss). After a resume a step may stand twice; the last counts."""
    path = directory / "log" / "distill_loss.csv"
    losses: dict[int, float] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            step, _, value = line.partition(",")
            if step.isdigit():
                losses[int(step)] = float(value)
    return sorted(losses.items())
