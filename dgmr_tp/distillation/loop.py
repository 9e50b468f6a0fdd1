"""The training loop under DeepSpeed, which every launched process runs. It trains any :class:`Task`.

It returns the trained weights in the task's module and writes checkpoints and curves to a directory. It does not know
recipes, run directories, teachers or captions.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from dgmr_tp.distillation import checkpoints
from dgmr_tp.distillation.checkpoints import Checkpoint
from dgmr_tp.distillation.config import NUM_SEARCH_BATCHES, TrainingConfig
from dgmr_tp.distillation.data import Sample
from dgmr_tp.distillation.engine import (
    MAX_REDUCE_BUCKET,
    WeightAverage,
    current_device,
    deepspeed_config,
    freeze_unused_parameters,
    full_parameters,
    parameter_groups,
    register_external_parameters,
    set_master_weights,
    start_deepspeed,
)
from dgmr_tp.distillation.processes import (
    FAILURE_FILE,
    LAUNCHER_KILL_DELAY_S,
    STOP_FILE,
    fail_together,
    stop_requested,
)
from dgmr_tp.distillation.rate_search import find_learning_rate
from dgmr_tp.distillation.throughput import Throughput, format_throughput, measure_peak_flops
from dgmr_tp.distillation.validation import BestWeights, describe_fall, describe_result
from dgmr_tp.errors import DgmrError, Preempted, first_line
from dgmr_tp.utils.distributed import all_gather_dict, get_world_size, is_main_process
from dgmr_tp.utils.files import lock_directory
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.progress import Meter

CHECKPOINT_FOLDER = "checkpoints"
"""Folder in the directory of a training with everything that a resumed run needs. It is deleted at the end."""
OUT_OF_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""Phrases in the out-of-memory errors of torch, CUDA's libraries and NCCL."""
MIN_STREAM_IMAGES = 1000
"""Minimum image count used as the denominator of the broken-image share of a stream."""
CURVE_PREFIX = "train"
"""Common name of the curves in DeepSpeed's monitor."""
LossTerms = dict[str, Tensor]
"""Loss terms by name, unweighted."""


@dataclass(frozen=True)
class Task:
    """A training task: what is trained, on which samples, and with which loss."""

    module: nn.Module
    """On the CPU. It maps the input of a sample to a dictionary of tensors."""
    probe: Tensor
    """Input of one sample. Parameters that no output depends on are frozen."""
    samples: Callable[[Checkpoint], Generator[Sample]]
    """Returns this process's samples after a checkpoint, one micro-batch each."""
    losses: Callable[[Callable[..., Any], Sample], LossTerms]
    """Returns the loss terms of a sample. The first argument is the module as DeepSpeed wraps it."""
    total: Callable[[LossTerms], Tensor]
    """Returns the weighted sum of the loss terms."""
    count: int | None
    """Samples in an epoch; None for a stream."""
    describe_position: Callable[[Checkpoint], str] = lambda _: ""
    """Returns the data position for the resume message."""
    flops: Callable[[], float] | None = None
    """Returns the floating point operations of a sample of the last step, backward pass included."""
    scores: Callable[[Callable[..., Any]], dict[str, float]] | None = None
    """Returns figures on held-out samples: ``score`` (higher is better) and others. Called in every process."""


class TrainingResult(NamedTuple):
    """Result of a training, other than the weights."""

    step: int
    """Step after which the weights were taken: the best one if the task has a score, otherwise the last one.

    0: no step scored higher than the model before the training.
    """
    peak_learning_rate: float
    """Peak of the schedule, which the configuration sets or the search finds."""
    broken: dict[str, str]
    """Images that did not decode, and the errors."""


@contextmanager
def training_session(directory: Path, config: TrainingConfig) -> Iterator[Callable[[], bool]]:
    """Start DeepSpeed, lock ``directory``, and end all processes if one fails.

    Gives a function that returns whether this process was asked to stop.

    Raises:
        DgmrError: another run holds ``directory``, another process of this training failed, or memory ran out.
    """
    try:
        start_deepspeed()
        with contextlib.ExitStack() as stack:
            if is_main_process():
                stack.enter_context(lock_directory(directory, f"{config.title} is running"))
                (directory / FAILURE_FILE).unlink(missing_ok=True)
            distributed.barrier()  # until the main process has prepared the directory
            stop = stack.enter_context(stop_requested(directory / STOP_FILE))
            stack.enter_context(fail_together(directory / FAILURE_FILE))
            yield stop
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in OUT_OF_MEMORY_PHRASES):
            raise DgmrError(f"out of memory: {first_line(error)}. {config.memory_advice}") from error
        if checkpoints.is_about_another_process(error):
            raise DgmrError(
                f"another process of this training is gone ({first_line(error)}). See its message, and run again."
            ) from error
        raise


def train(task: Task, config: TrainingConfig, directory: Path, stop: Callable[[], bool]) -> TrainingResult:
    """Train ``task.module``, resuming from the newest checkpoint in ``directory``. Every process must call it.

    AdamW (0.9, 0.95), linear warm-up, cosine; norms, biases and embeddings are not decayed. On a CPU, an interrupted
    run that resumes with the same number of processes ends at the same bits as an uninterrupted one. With another
    number of processes it sees the same global batches.

    Args:
        task: at the end, its module in rank 0 has the trained weights. In other ranks it must not be used any more.
        config: schedule, precision and sharding.
        directory: for checkpoints and curves (``log/``, CSV).
        stop: returns whether this process was asked to stop; see :func:`training_session`.

    Returns:
        The step of the weights, and the broken images.

    Raises:
        DgmrError: the batch cannot be divided over the processes, the loss is not finite, too many images are broken,
            or a checkpoint cannot be written.
        Preempted: the training was asked to stop, and has written a checkpoint.
    """
    deepspeed = require("deepspeed", "distill")
    world, device = get_world_size(), current_device()
    engine_config = deepspeed_config(config, world, directory)
    # Without dropout and stochastic depth: the teacher's features are deterministic, and so are the student's for any
    # micro-batch.
    module = task.module.eval()
    freeze_unused_parameters(module, task.probe)
    frozen = {
        name: tensor.detach().clone()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not tensor.requires_grad
    }
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    # DeepSpeed allocates the full bucket.
    engine_config["zero_optimization"].setdefault("reduce_bucket_size", min(MAX_REDUCE_BUCKET, trained))
    module.to(device, torch.float32)
    if config.zero_stage == 3:
        register_external_parameters(module, task.probe)
    optimizer = torch.optim.AdamW(parameter_groups(module, config.weight_decay), lr=1.0, betas=(0.9, 0.95))

    folder = directory / CHECKPOINT_FOLDER
    checkpoint, damaged = checkpoints.newest(folder)
    if is_main_process():
        _delete_unusable(folder, checkpoint, damaged, config.title)
    resume_point = checkpoint or Checkpoint(0, world, config.zero_stage)
    peak = config.peak_learning_rate
    if peak is None:
        peak = resume_point.peak_learning_rate or _search_learning_rate(task, config, resume_point)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.learning_rate(step, peak))
    start = {}
    if config.bf16 and not checkpoint:  # DeepSpeed would start from the rounded weights
        start = {name: parameter.detach().cpu() for name, parameter in module.named_parameters() if name not in frozen}
    loading = checkpoints.prepare_for_loading(folder, checkpoint) if checkpoint else nullcontext((None, False))
    with loading as (tag, universal):
        engine_config.setdefault("checkpoint", {})["load_universal"] = universal
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=engine_config
        )
        engine.eval()
        if tag:
            engine.load_checkpoint(str(folder), tag=tag)
        if start:
            set_master_weights(engine.module, start)
        del start  # not needed during the training
        if universal:  # ZeRO-3 loads one step counter for all groups, which each of them would advance
            for state in optimizer.state.values():
                state["step"] = state["step"].clone()
    if is_main_process() and resume_point.step:
        position = task.describe_position(resume_point)
        print(f"  {config.title}: resumes at step {resume_point.step} of {config.steps}{position}", flush=True)
    options = config.options
    average = None
    if options.ema:
        saved_average = checkpoints.load_average(folder, checkpoint) if checkpoint else {}
        average = WeightAverage(engine.module, options.ema, saved_average)
    if options.compile:
        engine.compile()

    best = BestWeights(folder)
    broken = _run_steps(task, engine, optimizer, config, peak, average, best, resume_point, directory, stop)
    result = average.full() if average else full_parameters(engine.module)
    weights = {name: value.cpu().clone() for name, value in result if is_main_process()}
    step = config.steps
    if not average and best.step >= 0:
        step, weights = best.step, best.load() if is_main_process() else {}
    engine.destroy()
    if is_main_process():
        tensors = {**frozen, **weights}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:  # DeepSpeed may have sharded them
            tensor.data = tensors[name]
        if not average and best.step >= 0:
            print(f"  {config.title}: {describe_result(read_curve(directory, 'score'), step)}", flush=True)
    return TrainingResult(step, peak, broken)


def _search_learning_rate(task: Task, config: TrainingConfig, start: Checkpoint) -> float:
    """Find the peak learning rate on the first batches, on the module that DeepSpeed does not wrap yet."""
    accumulation_steps = config.batch_size // get_world_size() // config.micro_batch_of(get_world_size())
    device = current_device()

    def run(inputs: Tensor, **options: Any) -> Any:
        # The gradient has the precision of the training. The losses that are compared are in float32, because rounding
        # to bfloat16 hides a small step of the master weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and torch.is_grad_enabled()):
            return task.module(inputs.float(), **options)

    with contextlib.closing(task.samples(start)) as loader:
        batches = [[next(loader) for _ in range(accumulation_steps)] for _ in range(NUM_SEARCH_BATCHES)]
    peak = find_learning_rate(task.module, batches, lambda sample: task.total(task.losses(run, sample)))
    if is_main_process():
        print(f"  {config.title}: peak learning rate {peak:.2g}, found on {NUM_SEARCH_BATCHES} batches", flush=True)
    return peak


def _run_steps(
    task: Task,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    peak: float,
    average: WeightAverage | None,
    best: BestWeights,
    resume_point: Checkpoint,
    directory: Path,
    stop: Callable[[], bool],
) -> dict[str, str]:
    """Run the steps after ``resume_point`` with the peak learning rate ``peak``, and return the broken images."""
    world, device = get_world_size(), current_device()
    folder = directory / CHECKPOINT_FOLDER
    accumulation_steps = engine.gradient_accumulation_steps()
    loader = task.samples(resume_point)
    peak_flops = world * measure_peak_flops(device, config.precision) if task.flops else 0.0
    throughput = Throughput(config.batch_size, peak_flops)
    broken, shards = dict(resume_point.broken), {}

    def evaluate(step: int) -> dict[str, float]:
        if task.scores is None or (step % config.options.evaluate_every and step < config.steps):
            return {}
        scores = task.scores(engine)
        if is_main_process():
            curve = read_curve(directory, "score")
            if len(curve) == 1 and (warning := describe_fall([*curve, (step, scores["score"])])):
                print(f"  {config.title}: {warning}", flush=True)
        if average is None:
            best.update(scores["score"], step, full_parameters(engine.module))
            distributed.barrier()  # while the main process writes; the next collective may have a shorter timeout
        return scores

    def write_curves(step: int, values: dict[str, float]) -> None:
        if values:
            engine.monitor.write_events(
                [(f"{CURVE_PREFIX}/{name.replace(' ', '_')}", value, step) for name, value in values.items()]
            )

    if resume_point.step == 0:
        write_curves(0, evaluate(0))
    with (
        contextlib.closing(loader),
        Meter(config.title, config.steps, done=resume_point.step) if is_main_process() else nullcontext() as meter,
    ):
        for step in range(resume_point.step + 1, config.steps + 1):
            step_start = time.monotonic()
            losses: LossTerms = {}
            new_broken: dict[str, str] = {}
            names: list[str] = []
            for micro_step in range(accumulation_steps):
                sample = next(loader)
                new_broken |= {name: error for name, error in sample.broken.items() if name not in broken}
                names += sample.names
                shards[sample.shard[0]] = sample.shard[1]
                terms = task.losses(engine, sample)
                engine.backward(task.total(terms))
                for name, term in terms.items():
                    losses[name] = losses.get(name, 0) + term.detach().float() / accumulation_steps
                if micro_step < accumulation_steps - 1:
                    engine.step()
            means, stopping, any_broken = _synchronize(losses, stop(), bool(new_broken), device)
            total = float(task.total(means))
            if not math.isfinite(total):
                raise DgmrError(_not_finite_message(f"loss is {total}", step, names, folder, config))
            # Set in both groups: ZeRO-3 loads the first group's values into all groups of a universal checkpoint.
            for group, decay in zip(optimizer.param_groups, (config.decay(step - 1), 0.0), strict=True):
                group["weight_decay"] = decay
            norm = _optimizer_step(engine, config)
            if not 0 <= norm < math.inf:
                raise DgmrError(_not_finite_message("gradient is not finite", step, names, folder, config))
            if average:
                average.update()
            if any_broken:
                broken |= all_gather_dict(new_broken)
                check_broken_images(broken, task.count or max(MIN_STREAM_IMAGES, config.batch_size * step), config)
            rates = throughput.step(task.flops() if task.flops else None)
            if meter:
                term_text = ", ".join(f"{name.replace('_', ' ')} {float(value):.4f}" for name, value in means.items())
                meter.step(step, f"loss {total:.4f} {format_throughput(rates)}", f"{term_text}, gradient {norm:.3g}")
            curves = evaluate(step)
            if step % config.log_every == 0 or step == config.steps:
                curves |= {
                    "loss": total,
                    "learning_rate": config.learning_rate(step - 1, peak),
                    "gradient_norm": norm,
                    **{f"loss_{name}": float(value) for name, value in means.items()},
                    **rates,
                }
            write_curves(step, curves)
            # A checkpoint after the first step shows at once whether the disk has room, and how long saving takes.
            is_first_step = step == resume_point.step + 1
            if step % config.checkpoint_every == 0 or step == config.steps or stopping or is_first_step:
                positions = all_gather_dict(shards)
                # A reader that has not delivered an image yet may still be at the first shard.
                complete = len(positions) == world * max(1, config.workers)
                shard = min(positions.values()) if complete else resume_point.shard
                new_checkpoint = Checkpoint(step, world, config.zero_stage, peak, broken=broken, shard=shard)
                save_start = time.monotonic()
                average_weights = average.full() if average else ()
                checkpoints.save(engine, folder, new_checkpoint, average_weights, config.keep_checkpoints)
                if is_first_step and is_main_process():
                    save_end = time.monotonic()
                    text = describe_save(folder / new_checkpoint.tag, save_end - save_start, save_end - step_start)
                    print(f"  {config.title}: {text}", flush=True)
            if stopping and step < config.steps:
                if is_main_process():
                    (directory / STOP_FILE).unlink(missing_ok=True)
                raise Preempted(f"preempted at step {step} of {config.steps}. Run again to resume from there.")
    return broken


def describe_save(folder: Path, save_seconds: float, stop_seconds: float) -> str:
    """Return the size of a checkpoint and the time it took, with a warning if SIGTERM leaves too little time for it.

    Args:
        folder: of the checkpoint.
        save_seconds: duration of the save.
        stop_seconds: duration of a step and the save, which must fit between SIGTERM and SIGKILL of the launcher.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = f"a checkpoint is {size / 1e6:,.0f} MB and takes {save_seconds:.1f} s"
    if stop_seconds < LAUNCHER_KILL_DELAY_S:
        return text
    return (
        f"{text}. A step and a checkpoint take {stop_seconds:.0f} s, but the deepspeed launcher kills the processes "
        f"{LAUNCHER_KILL_DELAY_S} s after SIGTERM. Let the scheduler signal the processes earlier "
        "(docs/distillation.md)."
    )


def _optimizer_step(engine: Any, config: TrainingConfig) -> float:
    """Take an optimizer step and return the norm of the gradient.

    If the norm is not finite or is negative, the engine's state must not be used any more: in bf16 ZeRO skips such a
    step, in float32 it takes it.
    """
    norm = torch.tensor(0.0)
    if config.zero_stage == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        if not torch.isfinite(norm := torch.nn.utils.get_total_norm(gradients)):
            return math.nan
    engine.step()
    if not engine.was_step_applied():
        return math.nan
    return float(norm if config.zero_stage == 0 else engine.get_global_grad_norm())


def _synchronize(losses: LossTerms, stop: bool, broken: bool, device: torch.device) -> tuple[LossTerms, bool, bool]:
    """Return the mean losses of all processes, whether any must stop, and whether any met a new broken image.

    One all-reduce a step.
    """
    flags = [torch.tensor(float(flag), device=device) for flag in (stop, broken)]
    values = torch.stack([*losses.values(), *flags])
    distributed.all_reduce(values)
    *means, any_stop, any_broken = values.double().cpu() / get_world_size()
    return dict(zip(losses, means, strict=True)), bool(any_stop), bool(any_broken)


def _delete_unusable(folder: Path, checkpoint: Checkpoint | None, damaged: list[str], title: str) -> None:
    """Report damaged checkpoints, and delete them and unfinished ones."""
    source = f"the training resumes at step {checkpoint.step}" if checkpoint else "the training starts again"
    for tag in damaged:
        print(f"  {title}: the checkpoint {tag} is damaged; {source}", flush=True)
    for path in folder.glob("*step*"):
        if path.name in damaged or not (path / checkpoints.MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


def check_broken_images(broken: dict[str, str], count: int, config: TrainingConfig) -> None:
    """Raise DgmrError if more than ``max_broken`` of ``count`` images are broken."""
    if len(broken) > config.max_broken * count:
        name, error = next(iter(broken.items()))
        raise DgmrError(
            f"{len(broken)} of {count} images do not decode, more than {config.section}.max_broken = "
            f"{config.max_broken:g}; first: {name}: {error}. Raise the limit to resume, or repair or remove the images "
            f"and start again with --redo {config.section}."
        )


def _not_finite_message(what: str, step: int, own_names: list[str], folder: Path, config: TrainingConfig) -> str:
    """Return an error message with the names of the step's samples. Every process must call it."""
    names = list(all_gather_dict(dict.fromkeys(own_names, "")))
    first_names = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the {what} at step {step} (images {first_names}). The step is not saved, and the last checkpoint is in "
        f"{folder}. Set a lower {config.section}.base_lr or look at these images."
    )


def curve_names(directory: Path) -> list[str]:
    """Return the names of the curves that DeepSpeed's monitor has written."""
    return sorted(path.stem.removeprefix(f"{CURVE_PREFIX}_") for path in directory.glob(f"log/{CURVE_PREFIX}_*.csv"))


def read_curve(directory: Path, name: str) -> list[tuple[int, float]]:
    """Return a curve, such as ``loss``, as (step, value). If a resumed run repeated a step, the last value counts."""
    path = directory / "log" / f"{CURVE_PREFIX}_{name}.csv"
    values: dict[int, float] = {}
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the header, or half a line that a full disk left
                step, value = line.split(",")
                values[int(step)] = float(value)
    return sorted(values.items())
