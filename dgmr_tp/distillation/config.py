"""The hyper-parameters of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch

from dgmr_tp.distillation.losses import Objective
from dgmr_tp.errors import DgmrError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every training is told; see :class:`dgmr_tp.pipeline.recipe.Training` for the defaults."""

    section: ClassVar[str]
    """The recipe's section that says it."""
    what: ClassVar[str]
    """What is done, in messages."""
    needs_less_memory: ClassVar[str]
    """What to do when there is too little."""

    steps: int
    batch_size: int
    """Global: over all processes and all accumulated batches."""
    micro_batch: int | None = None
    """The most images that one process works on at a time; the gradients of several are accumulated. None: all at once."""
    base_lr: float
    """The learning rate is ``base_lr · batch_size / 256``."""
    min_lr: float
    warmup_steps: int
    weight_decay: float
    final_weight_decay: float | None
    """Where the decay goes on a cosine; None: it stays."""
    gradient_clipping: float
    """Largest norm of the gradient; 0: any."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which then is the result."""
    zero_stage: int
    offload: str = "none"
    """What lies in the CPU's memory: ``none``, ``optimizer`` (its states), ``all`` (the parameters too; ZeRO-3)."""
    bf16: bool
    compile: bool = False
    deepspeed: str | None
    checkpoint_every: int
    keep_checkpoints: int
    log_every: int
    evaluate_every: int = 100
    """Steps between two looks at what is held out."""
    workers: int
    max_broken: float
    """Share of the images that may fail to decode before the run stops."""
    seed: int

    @property
    def precision(self) -> torch.dtype:
        """What is computed in; master weights, losses and averages are float32 always."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @classmethod
    def of(cls, section: dict[str, Any], seed: int) -> Self:
        """From the content of a recipe's section, which also says where it runs and what it reads."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in section.items() if key in known}
        if "loss" in values:
            values["loss"] = Objective(**values["loss"])
        return cls(**values, seed=seed)

    def micro_batch_of(self, world: int) -> int:
        """Images that one of ``world`` processes works on at a time: the largest divisor of its share up to ``micro_batch``.

        So the global batch stays what it is, whatever the number of processes.

        Raises:
            DgmrError: the batch cannot be divided over the processes, or a share only into pieces below half of ``micro_batch``.
        """
        share, rest = divmod(self.batch_size, world)
        if rest:
            raise DgmrError(f"{self.section}.batch_size = {self.batch_size} cannot be divided over {world} processes")
        most = min(share, self.micro_batch or share)
        micro = next(n for n in range(most, 0, -1) if share % n == 0)
        if micro < most / 2:
            raise DgmrError(
                f"{self.section}.batch_size = {self.batch_size} is {share} images for each of {world} processes, which divide into "
                f"pieces of {micro}, not near micro_batch = {self.micro_batch}; choose a batch_size with more divisors"
            )
        return micro

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from 0 to ``base_lr · batch_size / 256``, then a cosine to ``min_lr``; ``step`` counts from 0."""
        peak = self.base_lr * self.batch_size / 256
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        return (
            self._cosine(peak, self.min_lr, step - self.warmup_steps, self.steps - self.warmup_steps) if peak else 0.0
        )

    def decay(self, step: int) -> float:
        """The weight decay at ``step``, counted from 0: a cosine from ``weight_decay`` to ``final_weight_decay``."""
        if self.final_weight_decay is None:
            return self.weight_decay
        return self._cosine(self.weight_decay, self.final_weight_decay, step, self.steps)

    @staticmethod
    def _cosine(first: float, last: float, step: int, steps: int) -> float:
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """What the recipe's ``distill`` section says; see :class:`dgmr_tp.pipeline.recipe.Distill` for the defaults."""

    section = "distill"
    what = "distillation"
    needs_less_memory = (
        "set distill.recompute: true or a smaller distill.micro_batch and run again to go on, or a higher distill.zero_stage with "
        "offload (--redo distill)"
    )

    loss: Objective
    augment: str
    min_crop: float
    flip: bool
    fixed_crops: bool
    """Whether an image is cropped alike in every epoch."""
    held_out: int
    """Images that are not trained on, on which the student is compared with the teacher; the best student is the result."""
    shard_teacher: bool
    recompute: bool


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """What the recipe's ``tune_text`` section says; see :class:`dgmr_tp.pipeline.recipe.TuneText` for the defaults."""

    section = "tune_text"
    what = "text tuning"
    needs_less_memory = "start more processes, or set tune_text.bf16: true, and run again (--redo tune_text)"

    first_caption: bool
