"""Training under DeepSpeed: one loop, run by every process of the launcher, for whatever task.

What is trained, on what and towards what comes in as a :class:`Task`; recipes and run directories are not known here.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import threading
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
from dgmr_tp.distillation.config import Settings
from dgmr_tp.distillation.data import Sample
from dgmr_tp.distillation.engine import (
    BUCKET,
    Average,
    deepspeed_config,
    device_here,
    freeze_what_outputs_do_not_need,
    gather_where_used,
    parameter_groups,
    start_deepspeed,
    whole_parameters,
)
from dgmr_tp.distillation.throughput import Speed, in_words, peak_flops
from dgmr_tp.distillation.validation import Best
from dgmr_tp.errors import DgmrError, Preempted, first_line
from dgmr_tp.utils.distributed import all_gather_dict, get_rank, get_world_size, is_main_process
from dgmr_tp.utils.files import hold
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.progress import Meter

STOP = "stop"
"""A file in the directory of a training that asks it to save and leave."""
FAILED = "failed"
"""A file there that a process leaves which has failed."""
LAST_WORDS = 10
"""Seconds that the others then have to notice it by themselves, and to say so."""
CHECKPOINTS = "checkpoints"
"""Folder in the directory of a training with all that a run goes on from, and that nobody needs in the end."""
LAUNCHERS_PATIENCE = 30
"""Seconds from SIGTERM to SIGKILL."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""How torch, CUDA's libraries and NCCL say it."""
FEW = 1000
"""Images of a stream after which the share of broken ones is judged."""
CURVES = "train"
"""The curves' common name for DeepSpeed's monitor."""
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and towards what."""

    module: nn.Module
    """On the CPU; from a sample's input to a dictionary of tensors."""
    probe: Tensor
    """An input of one sample: what no output depends on is not trained."""
    samples: Callable[[Checkpoint], Generator[Sample]]
    """This process's samples from a checkpoint on, a micro-batch each."""
    losses: Callable[[Callable[..., Any], Sample], Losses]
    """The parts of the loss, by name and unweighted, of a sample and the module as DeepSpeed wraps it."""
    total: Callable[[Losses], Tensor]
    """Their weighted sum."""
    count: int | None
    """Samples in an epoch; None for a stream, which does not know."""
    place: Callable[[Checkpoint], str] = lambda _: ""
    """Where a run goes on, in words, beside the step."""
    flops: Callable[[], float] | None = None
    """Operations that a sample of the last step cost, backward pass included."""
    scores: Callable[[Callable[..., Any]], dict[str, float]] | None = None
    """How good the module is on what it is not trained on, ``score`` (higher is better) and other curves. Called in every process."""


class Outcome(NamedTuple):
    """What became of a training."""

    step: int
    """Behind which the weights stand: the best one, where there is a score."""
    broken: dict[str, str]
    """Images that did not decode, and why."""


@contextmanager
def training(directory: Path, settings: Settings) -> Iterator[Callable[[], bool]]:
    """DeepSpeed is started and ``directory`` held; gives what tells whether to stop.

    Raises:
        DgmrError: another run is in ``directory``; or there was not enough memory for what the context does.
    """
    lock = None
    try:
        start_deepspeed()
        if is_main_process():
            lock = hold(directory, f"{settings.what} is running")
            (directory / FAILED).unlink(missing_ok=True)
        distributed.barrier()  # until the first process has prepared the directory
        with _told_to_stop(directory / STOP) as stop, _failing_together(directory / FAILED):
            yield stop
    except RuntimeError as error:
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise DgmrError(f"out of memory: {first_line(error)}; {settings.needs_less_memory}") from error
        if checkpoints.is_about_another_process(error):
            raise DgmrError(
                f"another process of this training is gone ({first_line(error)}); see its message, and run again"
            ) from error
        raise
    finally:
        if lock is not None:
            lock.close()


def train(task: Task, settings: Settings, directory: Path, stop: Callable[[], bool]) -> Outcome:
    """Train ``task.module``, resuming from ``directory`` if a checkpoint lies there; every process has to call it.

    AdamW (0.9, 0.95), warm-up, cosine; norms, biases and embeddings are not decayed. On a CPU with the same number of processes a
    run that was interrupted ends with the bits of one that was not; with another number it sees the same global batches.

    Args:
        task: see :class:`Task`. On rank 0 the module holds the trained weights in the end, elsewhere it is of no use any more.
        settings: see :class:`Settings`.
        directory: checkpoints and the curves (``log/``, CSV) go here.
        stop: asks to save and leave.

    Returns:
        See :class:`Outcome`.

    Raises:
        DgmrError: the batch cannot be divided over the processes, the loss is not finite, too many images are broken, or a checkpoint
            cannot be written.
        Preempted: it was told to stop; a checkpoint was written.
    """
    deepspeed = require("deepspeed", "distill")
    rank, world, device = get_rank(), get_world_size(), device_here()
    config = deepspeed_config(settings, world, directory)
    module = (
        task.module.eval()
    )  # no dropout, no stochastic depth: the teacher's features are to be hit, and the same for any batch
    freeze_what_outputs_do_not_need(module, task.probe)
    untouched = {
        name: t.detach().clone()
        for name, t in [*module.named_parameters(), *module.named_buffers()]
        if not t.requires_grad
    }
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    config["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, trained))  # DeepSpeed allocates all of it
    module.to(device, torch.float32)
    if settings.zero_stage == 3:
        gather_where_used(module, task.probe)
    optimizer = torch.optim.AdamW(parameter_groups(module, settings.weight_decay), lr=1.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate)

    folder = directory / CHECKPOINTS
    found, damaged = checkpoints.newest(folder)
    if rank == 0:
        _clean(folder, found, damaged, settings.what)
    with checkpoints.for_processes(folder, found) if found else nullcontext((None, False)) as (tag, universal):
        config.setdefault("checkpoint", {})["load_universal"] = universal
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)
        engine.eval()
        if tag:
            engine.load_checkpoint(str(folder), tag=tag)
        for state in (
            optimizer.state.values() if universal else ()
        ):  # ZeRO-3 reads one counter for all groups, which would all advance it
            state["step"] = state["step"].clone()
    done = found or Checkpoint(0, world, settings.zero_stage)
    if rank == 0 and done.step:
        print(f"  {settings.what}: goes on at step {done.step} of {settings.steps}{task.place(done)}", flush=True)
    average = (
        Average(engine.module, settings.ema, checkpoints.average_of(folder, found) if found else {})
        if settings.ema
        else None
    )
    if settings.compile:
        engine.compile()

    best = Best(directory / CHECKPOINTS)
    broken = _steps(task, engine, optimizer, settings, average, best, done, directory, stop)
    result = average.whole() if average else whole_parameters(engine.module)
    weights = {name: value.cpu().clone() for name, value in result if rank == 0}
    step = settings.steps
    if not average and best.step >= 0:
        step, weights = best.step, best.weights() if rank == 0 else {}
    engine.destroy()
    if rank == 0:
        whole = {**untouched, **weights}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:  # DeepSpeed may have sharded them
            tensor.data = whole[name]
    return Outcome(step, broken)


def _steps(
    task: Task,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    average: Average | None,
    best: Best,
    done: Checkpoint,
    directory: Path,
    stop: Callable[[], bool],
) -> dict[str, str]:
    """The steps that are left after ``done``."""
    rank, world, device, folder = (
        get_rank(),
        get_world_size(),
        device_here(),
        directory / CHECKPOINTS,
    )
    accumulated = engine.gradient_accumulation_steps()
    loader = task.samples(done)
    speed = Speed(settings.batch_size, world * peak_flops(device, settings.precision) if task.flops else 0.0)
    broken, shards = dict(done.broken), {}

    def judged(step: int) -> dict[str, float]:
        if task.scores is None or (step % settings.evaluate_every and step < settings.steps):
            return {}
        scores = task.scores(engine)
        if average is None:
            best.keep(scores["score"], step, whole_parameters(engine.module))
            distributed.barrier()  # the first process writes; elsewhere the others would wait in a group with less patience
        return scores

    def draw(step: int, curves: dict[str, float]) -> None:
        if curves:
            engine.monitor.write_events(
                [(f"{CURVES}/{name.replace(' ', '_')}", value, step) for name, value in curves.items()]
            )

    if done.step == 0:
        draw(0, judged(0))
    with (
        contextlib.closing(loader),
        Meter(settings.what, settings.steps, done=done.step) if rank == 0 else nullcontext() as meter,
    ):
        for step in range(done.step + 1, settings.steps + 1):
            started = time.monotonic()
            losses: Losses = {}
            met: dict[str, str] = {}
            names: list[str] = []
            for piece in range(accumulated):
                sample = next(loader)
                met |= {name: error for name, error in sample.broken.items() if name not in broken}
                names += sample.names
                shards[sample.shard[0]] = sample.shard[1]
                parts = task.losses(engine, sample)
                engine.backward(task.total(parts))
                for name, part in parts.items():
                    losses[name] = losses.get(name, 0) + part.detach().float() / accumulated
                if piece < accumulated - 1:
                    engine.step()
            means, stopped, any_broken = _agree(losses, stop(), bool(met), device)
            total = float(task.total(means))
            if not math.isfinite(total):
                raise DgmrError(_not_finite(f"loss is {total}", step, names, folder, settings))
            # Both groups: ZeRO-3 reads a universal checkpoint with the first group's values in all of them.
            for group, decay in zip(optimizer.param_groups, (settings.decay(step - 1), 0.0), strict=True):
                group["weight_decay"] = decay
            norm = _step(engine, settings)
            if not 0 <= norm < math.inf:
                raise DgmrError(_not_finite("gradient is not finite", step, names, folder, settings))
            if average:
                average.update()
            if any_broken:
                broken |= all_gather_dict(met)
                check_broken(broken, task.count or max(FEW, settings.batch_size * step), settings)
            reached = speed.step(task.flops() if task.flops else None)
            if meter:
                each = ", ".join(f"{name.replace('_', ' ')} {float(value):.4f}" for name, value in means.items())
                meter.step(step, f"loss {total:.4f} {in_words(reached)}", f"{each}, gradient {norm:.3g}")
            curves = judged(step)
            if step % settings.log_every == 0 or step == settings.steps:
                curves |= {
                    "loss": total,
                    "learning_rate": settings.learning_rate(step - 1),
                    "gradient_norm": norm,
                    **{f"loss_{name}": float(value) for name, value in means.items()},
                    **reached,
                }
            draw(step, curves)
            first = step == done.step + 1  # says at the start whether the disk takes a checkpoint, and how long that is
            if step % settings.checkpoint_every == 0 or step == settings.steps or stopped or first:
                known = all_gather_dict(shards)  # a reader that has not delivered yet may be at the first of them
                shard = min(known.values()) if len(known) == world * max(1, settings.workers) else done.shard
                here = Checkpoint(step, world, settings.zero_stage, broken=broken, shard=shard)
                began = time.monotonic()
                checkpoints.save(engine, folder, here, average.whole() if average else (), settings.keep_checkpoints)
                if first and rank == 0:
                    ended = time.monotonic()
                    said = save_in_words(folder / here.tag, ended - began, leaving=ended - started)
                    print(f"  {settings.what}: {said}", flush=True)
            if stopped and step < settings.steps:
                if rank == 0:
                    (directory / STOP).unlink(missing_ok=True)
                raise Preempted(f"preempted at step {step} of {settings.steps}; run again to go on from there")
    return broken


def save_in_words(folder: Path, seconds: float, leaving: float) -> str:
    """How large a checkpoint is, how long it took, and a warning where a step and a save, ``leaving`` seconds, are too long to be
    preempted by SIGTERM to the launcher."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    said = f"a checkpoint is {size / 1e6:,.0f} MB and takes {seconds:.1f} s"
    if leaving < LAUNCHERS_PATIENCE:
        return said
    return (
        f"{said}; a step and that are {leaving:.0f} s, but the deepspeed launcher waits {LAUNCHERS_PATIENCE} s after SIGTERM: let the "
        "scheduler signal the processes earlier (docs/distillation.md)"
    )


def _step(engine: Any, settings: Settings) -> float:
    """The optimiser's step; gives the norm of the gradient. Where that is not finite, or negative, nothing may be kept of the engine.

    In bf16 ZeRO skips such a step; in float32 it takes it.
    """
    norm = torch.tensor(0.0)
    if settings.zero_stage == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        if not torch.isfinite(norm := torch.nn.utils.get_total_norm(gradients)):
            return math.nan
    engine.step()
    if not engine.was_step_applied():
        return math.nan
    return float(norm if settings.zero_stage == 0 else engine.get_global_grad_norm())


def _agree(losses: Losses, stop: bool, broken: bool, device: torch.device) -> tuple[Losses, bool, bool]:
    """Mean losses over the processes, whether any was told to stop, and whether any met a new broken image: one exchange a step."""
    flags = [torch.tensor(float(flag), device=device) for flag in (stop, broken)]
    both = torch.stack([*losses.values(), *flags])
    distributed.all_reduce(both)
    *means, stopped, met = both.double().cpu() / get_world_size()
    return dict(zip(losses, means, strict=True)), bool(stopped), bool(met)


@contextmanager
def _told_to_stop(file: Path) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came here, or to the process that waits for these, which then made ``file``.

    All processes look together at the end of a step.
    """
    told = threading.Event()
    first = is_main_process()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda: told.is_set() or (first and file.exists())
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _failing_together(file: Path) -> Iterator[None]:
    """A process that fails makes ``file``, which ends the others: on a GPU they would wait for it until NCCL loses patience."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            if file.exists():
                if not over.wait(LAST_WORDS):
                    os._exit(1)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except Preempted:
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            file.touch()
        raise
    finally:
        over.set()


def _clean(folder: Path, found: Checkpoint | None, damaged: list[str], what: str) -> None:
    """Say which checkpoints are damaged; drop them and those that were never finished."""
    for name in damaged:
        print(
            f"  {what}: the checkpoint {name} is damaged; {f'the one of step {found.step} is used' if found else 'from the start'}",
            flush=True,
        )
    for path in folder.glob("*step*"):
        if path.name in damaged or not (path / checkpoints.SEAL).exists():
            shutil.rmtree(path, ignore_errors=True)


def check_broken(broken: dict[str, str], count: int, settings: Settings) -> None:
    """Raises DgmrError if more of ``count`` images are broken than the settings allow."""
    if len(broken) > settings.max_broken * count:
        name, error = next(iter(broken.items()))
        raise DgmrError(
            f"{len(broken)} of {count} images do not decode, more than {settings.section}.max_broken = {settings.max_broken:g}; first: "
            f"{name}: {error}; raise the limit to go on, or repair or remove them and begin with --redo {settings.section}"
        )


def _not_finite(what: str, step: int, mine: list[str], folder: Path, settings: Settings) -> str:
    """One sentence with the names of the step's samples. Every process has to call it."""
    names = list(all_gather_dict(dict.fromkeys(mine, "")))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the {what} at step {step} (images {shown}); nothing of it is kept; lower {settings.section}.base_lr or look at these "
        f"images; the last checkpoint is kept in {folder}"
    )


def curves_of(directory: Path) -> list[str]:
    """The names of what DeepSpeed's monitor wrote."""
    return sorted(path.stem.removeprefix(f"{CURVES}_") for path in directory.glob(f"log/{CURVES}_*.csv"))


def read_curve(directory: Path, name: str) -> list[tuple[int, float]]:
    """What DeepSpeed's monitor wrote, such as ``loss``: (step, value). After a resume a step may stand twice; the last counts."""
    path = directory / "log" / f"{CURVES}_{name}.csv"
    values: dict[int, float] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the heading, or half a line that a full disk left
                step, value = line.split(",")
                values[int(step)] = float(value)
    return sorted(values.items())
