"""Distillation: the pruned encoder learns to give the original's features on unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.data.images import Images
from dgmr_tp.data.streams import Stream
from dgmr_tp.distillation.checkpoints import Checkpoint
from dgmr_tp.distillation.config import DistillSettings
from dgmr_tp.distillation.data import (
    Crops,
    Sample,
    StreamCrops,
    batches,
    check_seen_alike,
    stream_batches,
    training_transform,
)
from dgmr_tp.distillation.engine import deepspeed_config, device_here, gather_where_used
from dgmr_tp.distillation.feature_cache import KeptFeatures
from dgmr_tp.distillation.loop import Task, train, training
from dgmr_tp.distillation.losses import Features, FeatureTap
from dgmr_tp.distillation.validation import HeldOut
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.cost import flops
from dgmr_tp.utils.distributed import all_gather_dict, get_rank, get_world_size, is_main_process
from dgmr_tp.utils.lazy_imports import require


def distill(
    teacher: OpenedModel,
    student: OpenedModel,
    images: Images | Stream,
    settings: DistillSettings,
    directory: Path,
    features: Path | None = None,
) -> dict[str, Any] | None:
    """Train ``student`` to give ``teacher``'s features, resuming from ``directory`` if a checkpoint lies there.

    Run it in every process that the ``deepspeed`` launcher started. Only what the features depend on is trained. How it trains, and
    what it raises: :func:`dgmr_tp.distillation.loop.train`.

    Args:
        teacher, student: opened on the CPU; the student is trained in place.
        images: unlabelled; from a :class:`Stream` a run that was interrupted goes on at the beginning of a shard.
        settings: see :class:`DistillSettings`.
        directory: checkpoints and the curves (``log/``, CSV) go here.
        features: keep the teacher's features of every crop in this file, and use what it holds. The same file serves trainings that
            differ in the student, the steps or the batches, and in nothing else. Not for a :class:`Stream`.

    Returns:
        On rank 0 the figures of the run, None elsewhere. The student of rank 0 then holds the trained weights.
    """
    with training(directory, settings) as stop:
        check_seen_alike(images)
        device, precision = device_here(), settings.precision
        forward = [flops(model.tower, model.image_size) for model in (student, teacher)]
        tap = FeatureTap(student.adapter, settings.loss, recompute=settings.recompute)
        probe = torch.zeros(1, 3, student.image_size, student.image_size, device="meta")
        answers, release = _teacher(FeatureTap(teacher.adapter, settings.loss), probe, settings, directory)
        asked = True  # whether the teacher computed for the last batch

        def losses(engine: Callable[[Tensor], dict[str, Tensor]], sample: Sample) -> dict[str, Tensor]:
            batch = sample.images.to(device, precision, non_blocking=True)
            return settings.loss(engine(batch), wanted(batch, sample.rows))

        @torch.no_grad()
        def wanted(batch: Tensor, rows: list[int]) -> Features:
            nonlocal asked
            if kept is None:
                return answers(batch)
            known = kept.read(rows)
            asked = known is None
            if known is not None:
                return {name: value.to(device, non_blocking=True) for name, value in known.items()}
            found = answers(batch)
            kept.write(rows, found)
            return found

        def embed(tap: Callable[..., dict[str, Tensor]], images: Tensor) -> Tensor:
            return tap(images.to(device, precision), embedding=True)["embedding"]

        scores, original = None, {}
        if settings.held_out:
            judges, images = _held_out(images, settings)
            micro = settings.micro_batch_of(get_world_size())
            held_out = HeldOut(judges, teacher.preprocess, partial(embed, answers), teacher.image_size, micro)
            scores = lambda engine: held_out.scores(partial(embed, engine))  # noqa: E731
            original = held_out.original

        kept = _kept(features, answers, probe, images, settings) if features else None

        def place(done: Checkpoint) -> str:
            return (
                ""
                if isinstance(images, Images)
                else f", at the beginning of shard {images.shard(done.shard, settings.seed)}"
            )

        count = len(images) if isinstance(images, Images) else None
        task = Task(
            module=tap,
            probe=probe,
            samples=lambda done: _loader(images, teacher, settings, done),
            losses=losses,
            total=settings.loss.total,
            count=count,
            place=place,
            flops=lambda: (4 if settings.recompute else 3) * forward[0] + asked * forward[1],
            scores=scores,
        )
        step, broken = train(task, settings, directory, stop)
        broken |= all_gather_dict(judges.broken) if settings.held_out else {}
        release()
        if kept:
            kept.close()
    if get_rank():
        return None
    student.module.to("cpu", torch.float32).requires_grad_(True).eval()
    figures = {"processes": get_world_size(), "images": count, "broken_images": broken, "best_step": step}
    return {**asdict(settings), **figures, "original": original}


def _held_out(images: Images | Stream, settings: DistillSettings) -> tuple[Images, Images]:
    if isinstance(images, Stream) or 2 * settings.held_out > len(images):
        what = "a stream, which cannot be divided" if isinstance(images, Stream) else f"{len(images)} images"
        raise DgmrError(f"distill.held_out = {settings.held_out}, but {images.source} is {what}; hold out fewer, or 0")
    return images.divided(settings.held_out, settings.seed)


def _kept(
    file: Path, answers: Callable[[Tensor], Features], probe: Tensor, images: Images | Stream, settings: DistillSettings
) -> KeptFeatures:
    if isinstance(images, Stream):
        raise DgmrError("distill.keep_features: shards behind a URL cannot be numbered; set it to false")
    if settings.shard_teacher:
        raise DgmrError("distill.keep_features does not go with shard_teacher, whose processes must compute together")
    shape = (settings.micro_batch_of(get_world_size()), *probe.shape[1:])
    with torch.no_grad():
        example = answers(torch.zeros(shape, device=device_here(), dtype=settings.precision))
    crops = settings.steps * settings.batch_size
    kept = KeptFeatures(file, example, min(crops, len(images)) if settings.fixed_crops else crops)
    if is_main_process():
        print(
            f"  distillation: the original's features are kept in {file}, up to {kept.bytes / 1e6:,.0f} MB", flush=True
        )
    return kept


def _loader(
    images: Images | Stream, teacher: OpenedModel, settings: DistillSettings, done: Checkpoint
) -> Generator[Sample]:
    rank, world = get_rank(), get_world_size()
    micro = settings.micro_batch_of(world)
    transform = training_transform(
        teacher.preprocess_config, teacher.image_size, settings.min_crop, settings.flip, settings.augment
    )
    if isinstance(images, Stream):
        if settings.fixed_crops:
            raise DgmrError("distill.fixed_crops: shards behind a URL cannot be numbered; set it to false")
        crops = StreamCrops(images, transform, settings.seed, done.shard, rank, world)
        return stream_batches(crops, micro=micro, workers=settings.workers)
    return batches(
        Crops(images, transform, settings.seed, settings.fixed_crops),
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
    tap: FeatureTap, probe: Tensor, settings: DistillSettings, directory: Path
) -> tuple[Callable[[Tensor], dict[str, Tensor]], Callable[[], None]]:
    """The teacher's features of a batch, and what lets go of it; its parameters are sharded over the processes if the settings say so."""
    tap = tap.to(device_here(), settings.precision).eval().requires_grad_(False)
    if not settings.shard_teacher:
        return (torch.compile(tap) if settings.compile else tap), lambda: None
    gather_where_used(tap, probe)
    config = deepspeed_config(settings, get_world_size(), directory)
    zero = {key: value for key, value in config["zero_optimization"].items() if key.startswith("stage3_")}
    same = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")}
    engine, *_ = require("deepspeed", "distill").initialize(
        model=tap, config={**same, "zero_optimization": {**zero, "stage": 3}}
    )
    return engine, engine.destroy
