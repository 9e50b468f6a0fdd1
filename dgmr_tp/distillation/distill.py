"""Distillation: train a pruned encoder on unlabeled images to reproduce the features of the dense one, its teacher."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.data.images import Images
from dgmr_tp.data.streams import Stream
from dgmr_tp.distillation.bank import bank_size, compute_bank
from dgmr_tp.distillation.checkpoints import Checkpoint
from dgmr_tp.distillation.config import DistillConfig
from dgmr_tp.distillation.data import (
    Crops,
    Sample,
    StreamCrops,
    batches,
    check_same_files,
    stream_batches,
    training_transform,
)
from dgmr_tp.distillation.engine import current_device, deepspeed_config, register_external_parameters
from dgmr_tp.distillation.feature_cache import FeatureCache
from dgmr_tp.distillation.loop import LossTerms, Task, train, training_session
from dgmr_tp.distillation.losses import NO_BANK, Features, FeatureTap, TeacherBank
from dgmr_tp.distillation.validation import HeldOutSet
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.cost import flops, image_shape
from dgmr_tp.utils.distributed import all_gather_dict, get_rank, get_world_size, is_main_process
from dgmr_tp.utils.lazy_imports import require

FeatureFunction = Callable[..., Features]
"""Maps a batch of images to features, as a :class:`FeatureTap` or an engine around it does."""


def distill(
    teacher: OpenedModel,
    student: OpenedModel,
    images: Images | Stream,
    config: DistillConfig,
    directory: Path,
    *,
    seed: int = 0,
    features: Path | None = None,
) -> dict[str, Any] | None:
    """Train ``student`` to reproduce ``teacher``'s features, resuming from a checkpoint in ``directory``.

    Call it in every process that the ``deepspeed`` launcher started. Only parameters that the features depend on are
    trained. See :func:`dgmr_tp.distillation.loop.train` for the optimizer and the errors.

    Args:
        teacher: the dense encoder, opened on the CPU.
        student: the pruned encoder, opened on the CPU and trained in place.
        images: unlabeled. With a :class:`Stream`, an interrupted run resumes at the beginning of a shard.
        config: the keys of a recipe's ``distill`` section.
        directory: for checkpoints and curves (``log/``, CSV).
        seed: of the order of the images, their crops, and the held-out images.
        features: file that caches the teacher's features of every crop. Trainings can share it if they differ only in
            the student, the steps or the batch size. Not for a :class:`Stream`.

    Returns:
        In rank 0 the figures of the run, for JSON; the student then has the trained weights. None in other ranks.
    """
    with training_session(directory, config) as stop:
        check_same_files(images)
        device, precision = current_device(), config.precision
        student_flops, teacher_flops = (flops(model.tower, model.image_size) for model in (student, teacher))
        tap = FeatureTap(student.adapter, config.loss, recompute=config.recompute)
        probe = torch.zeros(1, *image_shape(student.tower, student.image_size), device="meta")
        teacher_tap, release_teacher = _prepare_teacher(
            FeatureTap(teacher.adapter, config.loss), probe, config, directory
        )
        teacher_ran = True  # for the last batch; false if its features were cached

        def losses(engine: FeatureFunction, sample: Sample) -> LossTerms:
            batch = sample.images.to(device, precision, non_blocking=True)
            return config.loss(engine(batch), teacher_features(batch, sample.rows), bank)

        @torch.no_grad()
        def teacher_features(batch: Tensor, rows: list[int]) -> Features:
            nonlocal teacher_ran
            if cache is None:
                return teacher_tap(batch)
            cached = cache.read(rows)
            teacher_ran = cached is None
            if cached is not None:
                return {name: value.to(device, non_blocking=True) for name, value in cached.items()}
            computed = teacher_tap(batch)
            cache.write(rows, computed)
            return computed

        def evaluate(tap: FeatureFunction, images: Tensor) -> Features:
            return tap(images.to(device, precision), embedding=True)

        def embed(tap: FeatureFunction, images: Tensor) -> Tensor:
            return evaluate(tap, images)["embedding"]

        scores, teacher_scores = None, {}
        micro, shape = config.micro_batch_of(get_world_size()), probe.shape[1:]
        if config.held_out:
            held_out_images, images = _split_held_out(images, config, seed)
            held_out = HeldOutSet(held_out_images, teacher.preprocess, partial(embed, teacher_tap), shape, micro)
            scores = lambda engine: held_out.scores(partial(embed, engine))  # noqa: E731
            teacher_scores = held_out.teacher_scores

        bank = NO_BANK
        if config.loss.needs_bank:
            bank = _compute_bank(images, teacher.preprocess, partial(evaluate, teacher_tap), probe, config, seed)
        cache = _open_cache(features, teacher_tap, probe, images, config) if features else None

        def describe_position(checkpoint: Checkpoint) -> str:
            if isinstance(images, Images):
                return ""
            return f", at the beginning of shard {images.shard(checkpoint.shard, seed)}"

        count = len(images) if isinstance(images, Images) else None
        task = Task(
            module=tap,
            probe=probe,
            samples=lambda checkpoint: _load_samples(images, teacher, config, seed, checkpoint),
            losses=losses,
            total=config.loss.total,
            count=count,
            describe_position=describe_position,
            # Forward, twice that backward, and forward again with recompute.
            flops=lambda: (4 if config.recompute else 3) * student_flops + teacher_ran * teacher_flops,
            scores=scores,
        )
        step, peak, broken = train(task, config, directory, stop)
        broken |= all_gather_dict(held_out_images.broken) if config.held_out else {}
        release_teacher()
        if cache:
            cache.close()
    if get_rank():
        return None
    student.module.to("cpu", torch.float32).requires_grad_(True).eval()
    figures = {"processes": get_world_size(), "images": count, "broken_images": broken, "best_step": step}
    settings = config.model_dump(exclude={"hostfile", "keep_features"})
    return {**settings, "seed": seed, "peak_learning_rate": peak, **figures, "teacher": teacher_scores}


def _split_held_out(images: Images | Stream, config: DistillConfig, seed: int) -> tuple[Images, Images]:
    if isinstance(images, Stream) or 2 * config.held_out > len(images):
        what = "a stream, which cannot be divided" if isinstance(images, Stream) else f"{len(images)} images"
        raise DgmrError(
            f"distill.held_out = {config.held_out}, but {images.source} is {what}. Hold out fewer images, or 0."
        )
    return images.split(config.held_out, seed)


def _compute_bank(
    images: Images | Stream,
    preprocess: Callable[[Any], Tensor],
    teacher: FeatureFunction,
    probe: Tensor,
    config: DistillConfig,
    seed: int,
) -> TeacherBank:
    if isinstance(images, Stream):
        raise DgmrError(
            f"distill.loss: balanced and neighbors draw images for a bank, but {images.source} is a stream, which has "
            "no index. Choose other losses."
        )
    if is_main_process():
        print(f"  distillation: the teacher embeds {bank_size(images)} images for the loss", flush=True)
    return compute_bank(images, preprocess, teacher, probe.shape[1:], config.micro_batch_of(get_world_size()), seed)


def _open_cache(
    file: Path, teacher: FeatureFunction, probe: Tensor, images: Images | Stream, config: DistillConfig
) -> FeatureCache:
    if isinstance(images, Stream):
        raise DgmrError(
            "distill.keep_features: images of a URL have no index, so their features cannot be cached. Set it to false."
        )
    if config.shard_teacher:
        raise DgmrError(
            "distill.keep_features does not work with shard_teacher, because processes that share a teacher must all "
            "run it. Remove one of them."
        )
    shape = (config.micro_batch_of(get_world_size()), *probe.shape[1:])
    with torch.no_grad():
        example = teacher(torch.zeros(shape, device=current_device(), dtype=config.precision))
    crops = config.steps * config.batch_size
    cache = FeatureCache(file, example, min(crops, len(images)) if config.fixed_crops else crops)
    if is_main_process():
        print(
            f"  distillation: the teacher's features are cached in {file}, up to {cache.bytes / 1e6:,.0f} MB",
            flush=True,
        )
    return cache


def _load_samples(
    images: Images | Stream, teacher: OpenedModel, config: DistillConfig, seed: int, checkpoint: Checkpoint
) -> Generator[Sample]:
    rank, world = get_rank(), get_world_size()
    micro = config.micro_batch_of(world)
    transform = training_transform(
        teacher.preprocess_config, teacher.image_size, config.min_crop, config.flip, config.augment
    )
    if isinstance(images, Stream):
        if config.fixed_crops:
            raise DgmrError(
                "distill.fixed_crops: images of a URL have no index, so their crops cannot be fixed. Set it to false."
            )
        crops = StreamCrops(images, transform, seed, checkpoint.shard, rank, world)
        return stream_batches(crops, micro=micro, workers=config.workers)
    return batches(
        Crops(images, transform, seed, config.fixed_crops),
        batch=config.batch_size,
        micro=micro,
        seed=seed,
        first_step=checkpoint.step,
        steps=config.steps,
        rank=rank,
        world=world,
        workers=config.workers,
    )


def _prepare_teacher(
    tap: FeatureTap, probe: Tensor, config: DistillConfig, directory: Path
) -> tuple[FeatureFunction, Callable[[], None]]:
    """Return the teacher, sharded or compiled if the config asks for it, and a function that frees it."""
    tap = tap.to(current_device(), config.precision).eval().requires_grad_(False)
    if not config.shard_teacher:
        return (torch.compile(tap) if config.compile else tap), lambda: None
    register_external_parameters(tap, probe)
    engine_config = deepspeed_config(config, get_world_size(), directory)
    zero = {key: value for key, value in engine_config["zero_optimization"].items() if key.startswith("stage3_")}
    shared = {key: engine_config[key] for key in ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")}
    engine, *_ = require("deepspeed", "distill").initialize(
        model=tap, config={**shared, "zero_optimization": {**zero, "stage": 3}}
    )
    return engine, engine.destroy
