"""Distillation under DeepSpeed: one function, run by every process of the launcher.

Teacher and student arrive opened, the settings as a plain object; recipes and run directories are not known here.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from dgmr_tp.data.images import Images
from dgmr_tp.data.streams import Stream
from dgmr_tp.distillation import checkpoints
from dgmr_tp.distillation.checkpoints import Checkpoint
from dgmr_tp.distillation.data import Crops, Sample, StreamCrops, batches, stream_batches, training_transform
from dgmr_tp.distillation.engine import (
    Average,
    deepspeed_config,
    freeze_what_features_do_not_need,
    gather_where_used,
    parameter_groups,
    start_deepspeed,
    whole_parameters,
)
from dgmr_tp.distillation.losses import FeatureTap
from dgmr_tp.distillation.settings import Settings
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, Preempted
from dgmr_tp.files import hold
from dgmr_tp.progress import Meter

STOP = "stop"
"""A file in the directory of a distillation that asks it to save and leave."""
FEW = 1000
"""Images of a stream after which the share of broken ones is judged."""


def distill(
    teacher: OpenedModel, student: OpenedModel, images: Images | Stream, settings: Settings, directory: Path
) -> dict[str, Any] | None:
    """Train ``student`` to give ``teacher``'s features, resuming from ``directory`` if a checkpoint lies there.

    Run it in every process that the ``deepspeed`` launcher started. AdamW (0.9, 0.95), warm-up, cosine; norms, biases and
    embeddings are not decayed. Only what the features depend on is trained. On a CPU with the same number of processes a run that was
    interrupted ends with the bits of one that was not; with another number it sees the same global batches.

    Args:
        teacher, student: opened on the CPU; the student is trained in place.
        images: unlabelled; from a :class:`Stream` a run that was interrupted goes on at the beginning of a shard.
        settings: see :class:`Settings`.
        directory: checkpoints and the curves (``log/``, CSV) go here.

    Returns:
        On rank 0 the figures of the run, None elsewhere. The student of rank 0 then holds the trained weights.

    Raises:
        DgmrError: the batch cannot be divided over the processes, the loss is not finite, too many images are broken, a checkpoint
            cannot be written, there is not enough memory, or another run is in ``directory``.
        Preempted: SIGTERM came; a checkpoint was written.
    """
    deepspeed = start_deepspeed()
    lock = hold(directory, "distillation is running") if distributed.get_rank() == 0 else None
    try:
        with _told_to_stop(directory / STOP) as stop:
            return _distill(deepspeed, teacher, student, images, settings, directory, stop)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise DgmrError(
            f"out of memory: {str(error).splitlines()[0]}; set distill.recompute: true or a smaller distill.micro_batch and run again "
            "to go on, or a higher distill.zero_stage with offload (--redo distill)"
        ) from error
    finally:
        if lock is not None:
            lock.close()


def _distill(
    deepspeed: Any,
    teacher: OpenedModel,
    student: OpenedModel,
    images: Images | Stream,
    settings: Settings,
    directory: Path,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device(deepspeed.accelerator.get_accelerator().current_device_name())
    precision = torch.bfloat16 if settings.bf16 else torch.float32
    config = deepspeed_config(settings, world, directory)
    micro, accumulated = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]

    answers, release = _teacher(deepspeed, FeatureTap(teacher.encoder, settings.loss), teacher.image_size, config, settings, device)
    tap = FeatureTap(student.encoder, settings.loss, recompute=settings.recompute).train()
    freeze_what_features_do_not_need(tap, student.image_size)
    untouched = {name: t.detach().clone() for name, t in [*tap.named_parameters(), *tap.named_buffers()] if not t.requires_grad}
    tap.to(device, torch.float32)
    if settings.zero_stage == 3:
        gather_where_used(tap, student.image_size)
    optimizer = torch.optim.AdamW(parameter_groups(tap, settings.weight_decay), lr=1.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate)

    folder = directory / "checkpoints"
    found, damaged = checkpoints.newest(folder)
    if rank == 0:
        _clean(folder, found, damaged)
    with checkpoints.for_processes(folder, found) if found else nullcontext((None, False)) as (tag, universal):
        config.setdefault("checkpoint", {})["load_universal"] = universal
        engine, *_ = deepspeed.initialize(model=tap, optimizer=optimizer, lr_scheduler=schedule, config=config)
        if tag:
            engine.load_checkpoint(str(folder), tag=tag)
        for state in optimizer.state.values() if universal else ():  # ZeRO-3 reads one counter for all groups, which would all advance it
            state["step"] = state["step"].clone()
    done = found or Checkpoint(0, world, settings.zero_stage)
    if rank == 0 and done.step:
        at = "" if isinstance(images, Images) else f", at the beginning of shard {images.shard(done.shard, settings.seed)}"
        print(f"  distil: goes on at step {done.step} of {settings.steps}{at}", flush=True)
    average = Average(engine.module, settings.ema, holder=rank == 0) if settings.ema else None
    if average and found and rank == 0:
        average.values = checkpoints.average_of(folder, found)
    if settings.compile:
        engine.compile()

    loader = _loader(images, teacher, settings, micro, done)
    broken, shards = dict(done.broken), {}
    with contextlib.closing(loader), Meter("distil", settings.steps, done=done.step) if rank == 0 else nullcontext() as meter:
        for step in range(done.step + 1, settings.steps + 1):
            _seed(device, settings.seed, step, rank)
            losses: dict[str, Tensor] = {}
            met: dict[str, str] = {}
            names: list[str] = []
            for piece in range(accumulated):
                sample = next(loader)
                met |= {name: error for name, error in sample.broken.items() if name not in broken}
                names += sample.names
                shards[sample.shard[0]] = sample.shard[1]
                batch = sample.images.to(device, precision, non_blocking=True)
                with torch.no_grad():
                    target = answers(batch)
                parts = settings.loss(engine(batch), target)
                engine.backward(settings.loss.total(parts))
                for name, part in parts.items():
                    losses[name] = losses.get(name, 0) + part.detach().float() / accumulated
                if piece < accumulated - 1:
                    engine.step()
            values, stopped, any_broken = _agree(losses, stop(), bool(met), device)
            total = sum(settings.loss.weight(name) * value for name, value in values.items())
            if not math.isfinite(total):
                raise DgmrError(_not_finite(f"loss is {total}", step, list(checkpoints.all_of(dict.fromkeys(names, ""))), folder))
            # Both groups: ZeRO-3 reads a universal checkpoint with the first group's values in all of them.
            for group, decay in zip(optimizer.param_groups, (settings.decay(step - 1), 0.0), strict=True):
                group["weight_decay"] = decay
            if not _step(engine, settings):
                raise DgmrError(_not_finite("gradient is not finite", step, list(checkpoints.all_of(dict.fromkeys(names, ""))), folder))
            if average:
                average.update()
            if any_broken:
                broken |= checkpoints.all_of(met)
                _check_broken(broken, len(images) if isinstance(images, Images) else max(FEW, settings.batch_size * step), settings)
            if meter:
                rate = settings.batch_size * (step - done.step) / meter.elapsed()
                meter.step(step, f"loss {total:.4f} {rate:.0f} images/s")
            if step % settings.log_every == 0 or step == settings.steps:
                curves = {
                    "loss": total,
                    "learning_rate": settings.learning_rate(step - 1),
                    **{f"mse_{name}": v for name, v in values.items()},
                }
                if (norm := engine.get_global_grad_norm()) is not None:
                    curves["gradient_norm"] = float(norm)
                engine.monitor.write_events([(f"distill/{name.replace(' ', '_')}", value, step) for name, value in curves.items()])
            if step % settings.checkpoint_every == 0 or step == settings.steps or stopped:
                shard = min(checkpoints.all_of(shards).values())
                here = Checkpoint(step, world, settings.zero_stage, broken=broken, shard=shard)
                checkpoints.save(engine, folder, here, average.values if average else {}, settings.keep_checkpoints)
            if stopped and step < settings.steps:
                if rank == 0:
                    (directory / STOP).unlink(missing_ok=True)
                raise Preempted(f"preempted at step {step} of {settings.steps}; run again to go on from there")
    trained = {name: value.cpu().clone() for name, value in whole_parameters(engine.module) if rank == 0}
    if average and rank == 0:
        trained = {name: value.cpu() for name, value in average.values.items()}
    engine.destroy()
    release()
    if rank:
        return None
    whole = {**untouched, **trained}
    for name, tensor in [*tap.named_parameters(), *tap.named_buffers()]:  # DeepSpeed may have sharded them
        tensor.data = whole[name]
    student.module.to("cpu", torch.float32).requires_grad_(True).eval()
    count = len(images) if isinstance(images, Images) else None
    return {**asdict(settings), "processes": world, "images": count, "broken_images": broken}


def _seed(device: torch.device, *parts: int) -> None:
    """For dropout and stochastic depth, where a tower has them. (torch.manual_seed stores every call until CUDA is in use.)"""
    for generator in (torch.default_generator, *([torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else [])):
        generator.manual_seed(hash(parts))


def _step(engine: Any, settings: Settings) -> bool:
    """The optimiser's step; False where the gradient was not finite, and then nothing may be kept of the engine.

    In bf16 ZeRO skips such a step; in float32 it takes it, and tells of it in the gradient's norm (negative or not finite).
    """
    if settings.zero_stage == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return False
    engine.step()
    norm = engine.get_global_grad_norm()
    return engine.was_step_applied() and (norm is None or 0 <= float(norm) < math.inf)


def _loader(images: Images | Stream, teacher: OpenedModel, settings: Settings, micro: int, done: Checkpoint) -> Generator[Sample]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    transform = training_transform(teacher.preprocess_config, teacher.image_size, settings.min_crop, settings.flip, settings.augment)
    if isinstance(images, Stream):
        crops = StreamCrops(images, transform, settings.seed, done.shard, rank, world)
        return stream_batches(crops, micro=micro, workers=settings.workers)
    return batches(
        Crops(images, transform, settings.seed),
        batch=settings.batch_size,
        micro=micro,
        seed=settings.seed,
        first_step=done.step,
        steps=settings.steps,
        rank=rank,
        world=world,
        workers=settings.workers,
    )


def _teacher(
    deepspeed: Any, tap: FeatureTap, image_size: int, config: dict[str, Any], settings: Settings, device: torch.device
) -> tuple[Callable[[Tensor], dict[str, Tensor]], Callable[[], None]]:
    """The teacher's features of a batch, and what lets go of it; its parameters are sharded over the processes if the settings say so."""
    precision = torch.bfloat16 if settings.bf16 else torch.float32
    tap = tap.to(device, precision).eval().requires_grad_(False)
    if not settings.shard_teacher:
        return (torch.compile(tap) if settings.compile else tap), lambda: None
    gather_where_used(tap, image_size)
    zero = {key: value for key, value in config["zero_optimization"].items() if key.startswith("stage3_")}
    same = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")}
    engine, *_ = deepspeed.initialize(model=tap, config={**same, "zero_optimization": {**zero, "stage": 3}})
    return engine, engine.destroy


def _agree(losses: dict[str, Tensor], stop: bool, broken: bool, device: torch.device) -> tuple[dict[str, float], bool, bool]:
    """Mean losses over the processes, whether any was told to stop, and whether any met a new broken image: one exchange a step."""
    flags = [torch.tensor(float(flag), device=device) for flag in (stop, broken)]
    both = torch.stack([*losses.values(), *flags])
    distributed.all_reduce(both)
    *means, stopped, met = both.tolist()
    world = distributed.get_world_size()
    return {name: value / world for name, value in zip(losses, means, strict=True)}, stopped > 0, met > 0


@contextmanager
def _told_to_stop(file: Path) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came here, or to the process that waits for these, which then made ``file``.

    All processes look together at the end of a step.
    """
    told = threading.Event()
    first = distributed.get_rank() == 0
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda: told.is_set() or (first and file.exists())
    finally:
        signal.signal(signal.SIGTERM, before)


def _clean(folder: Path, found: Checkpoint | None, damaged: list[str]) -> None:
    """Say which checkpoints are damaged; drop them and those that were never finished."""
    for name in damaged:
        print(
            f"  distil: the checkpoint {name} is damaged; {f'the one of step {found.step} is used' if found else 'from the start'}",
            flush=True,
        )
    for path in folder.glob("*step*"):
        if path.name in damaged or not (path / checkpoints.SEAL).exists():
            shutil.rmtree(path, ignore_errors=True)


def _check_broken(broken: dict[str, str], count: int, settings: Settings) -> None:
    if len(broken) > settings.max_broken * count:
        name, error = next(iter(broken.items()))
        raise DgmrError(
            f"{len(broken)} of {count} images do not decode, more than distill.max_broken = {settings.max_broken:g}; first: "
            f"{name}: {error}; repair or remove them, or raise the limit"
        )


def _not_finite(what: str, step: int, names: list[str], folder: Path) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the {what} at step {step} (images {shown}); nothing of it is kept; lower distill.base_lr or look at these "
        f"images; the last checkpoint is kept in {folder}"
    )


def read_losses(directory: Path) -> list[tuple[int, float]]:
    """The loss curve that DeepSpeed's monitor wrote: (step, loss). After a resume a step may stand twice; the last counts."""
    path = directory / "log" / "distill_loss.csv"
    losses: dict[int, float] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the heading, or half a line that a full disk left
                step, value = line.split(",")
                losses[int(step)] = float(value)
    return sorted(losses.items())
