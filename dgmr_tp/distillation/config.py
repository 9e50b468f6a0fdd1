"""Configuration of the two trainings: the keys of a recipe's ``distill`` and ``tune_text`` sections.

The recipe imports these classes. They know the schedule and the batch arithmetic, and nothing of models or data.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dgmr_tp.distillation.losses import DistillationLoss
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.config import Config, DataPath

NON_OUTCOME_KEYS = {
    "processes",
    "hostfile",
    "workers",
    "micro_batch",
    "recompute",
    "compile",
    "shard_teacher",
    "keep_features",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "max_broken",
}
"""Keys that do not decide the outcome of a training: they may change when it is resumed."""
MIN_WARMUP_STEPS = 20
"""Minimum default warm-up if the learning rate is found. Adam's second moments average over 1 / (1 − β₂) = 20 steps."""
NUM_SEARCH_BATCHES = 4
"""Global batches that the search for a learning rate reads: one for the gradient, the others for the loss."""


class LoopOptions(Config):
    """Options of the training loop that only ``distill`` sets. ``tune_text`` trains with the defaults."""

    micro_batch: int | None = Field(default=None, ge=1)
    """Maximum number of images a process works on at a time. Gradients are accumulated. Default: its share."""
    evaluate_every: int = Field(default=100, ge=1)
    """Steps between two evaluations on the held-out images."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights. With it, the average is the result."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """State in CPU memory: the optimizer states, or the parameters too (``all``, which needs zero_stage: 3)."""
    compile: bool = False
    """Use ``torch.compile`` for student and teacher. It needs a C++ compiler."""


class TrainingConfig(Config):
    """Keys that both trainings have. AdamW (0.9, 0.95) with a linear warm-up and a cosine schedule."""

    section: ClassVar[str]
    """The recipe section, for error messages."""
    title: ClassVar[str]
    """The training's name in messages and progress meters."""
    memory_advice: ClassVar[str]
    """A sentence for the out-of-memory error: what to change."""

    processes: int = Field(default=1, ge=1)
    """Processes on this machine. With fewer GPUs than that, one process a GPU."""
    hostfile: Annotated[str | None, DataPath("file")] = None
    """DeepSpeed host file, to train on more than one machine: lines such as ``node1 slots=8``."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Images a step, over all processes and accumulated micro-batches."""
    base_lr: float | None = Field(default=None, ge=0)
    """The peak learning rate is ``base_lr · batch_size / 256``. Default: it is found by a line search before the first
    step, so that the first steps do not undo a recovery."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate of the cosine schedule. Not scaled by the batch size."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps in which the learning rate rises linearly from 0. Default: 0 with ``base_lr``. Without it 5 % of the
    steps, at least 20 and at most half of them."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices. Norms, biases and embeddings are not decayed."""
    final_weight_decay: float | None = Field(default=None, ge=0)
    """Final weight decay of a cosine schedule. Default: the weight decay is constant."""
    gradient_clipping: float = Field(default=0.0, ge=0)
    """Maximum norm of the gradient. 0: no clipping."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """State that DeepSpeed shards over the processes: 1 optimizer states, 2 also gradients, 3 also parameters."""
    bf16: bool = False
    """Compute in bfloat16. Master weights, losses and averages are always float32."""
    deepspeed: Annotated[str | None, DataPath("file")] = None
    """A DeepSpeed JSON file that is merged with what this section sets."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints that stay on disk."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two points of the curves."""
    workers: int = Field(default=0, ge=0)
    """Data loading processes for each training process."""
    max_broken: float = Field(default=0.01, ge=0, le=1)
    """Maximum share of images that may fail to decode before the run stops."""

    @property
    def options(self) -> LoopOptions:
        """The loop options: this section's own, or the defaults where the section does not have them."""
        return LoopOptions()

    @property
    def outcome_settings(self) -> dict[str, Any]:
        """The settings that decide the outcome. The others may change when a training is resumed."""
        return self.model_dump(exclude=NON_OUTCOME_KEYS)

    @property
    def precision(self) -> torch.dtype:
        """The compute dtype."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def micro_batch_of(self, world: int) -> int:
        """Return the number of images that each of ``world`` processes works on at a time.

        It is the largest divisor of the process's share of the batch that is at most ``micro_batch``, so that the
        global batch stays the same at any number of processes.

        Raises:
            DgmrError: the batch cannot be divided over the processes, or the largest such divisor is below half of
                ``micro_batch``.
        """
        share, rest = divmod(self.batch_size, world)
        if rest:
            raise DgmrError(
                f"{self.section}.batch_size = {self.batch_size} cannot be divided over {world} processes. "
                "Choose a multiple of that number."
            )
        limit = min(share, self.options.micro_batch or share)
        micro = next(size for size in range(limit, 0, -1) if share % size == 0)
        if micro < limit / 2:
            raise DgmrError(
                f"{self.section}.batch_size = {self.batch_size} gives each of {world} processes {share} images, which "
                f"divide into pieces of {micro}, far below micro_batch = {self.options.micro_batch}. "
                "Choose a batch_size with more divisors."
            )
        return micro

    @property
    def peak_learning_rate(self) -> float | None:
        """The peak learning rate; None if it is to be found."""
        return None if self.base_lr is None else self.base_lr * self.batch_size / 256

    @property
    def num_warmup_steps(self) -> int:
        """The value or the default of ``warmup_steps``."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 0 if self.base_lr is not None else min(self.steps // 2, max(MIN_WARMUP_STEPS, self.steps // 20))

    def learning_rate(self, step: int, peak: float) -> float:
        """Return the learning rate at ``step``, counted from 0.

        A linear warm-up to ``peak``, then a cosine to ``min_lr``.
        """
        warmup = self.num_warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        if not peak:
            return 0.0
        return _cosine(peak, self.min_lr, step - warmup, self.steps - warmup)

    def decay(self, step: int) -> float:
        """Return the weight decay at ``step``, counted from 0: a cosine to ``final_weight_decay``, or constant."""
        if self.final_weight_decay is None:
            return self.weight_decay
        return _cosine(self.weight_decay, self.final_weight_decay, step, self.steps)


class DistillConfig(LoopOptions, TrainingConfig):
    """Distillation: train the pruned tower to reproduce the dense tower's features."""

    section = "distill"
    title = "distillation"
    memory_advice = (
        "Set distill.recompute: true or a smaller distill.micro_batch and run again to resume, or set a higher "
        "distill.zero_stage with offload (--redo distill)."
    )

    held_out: int = Field(default=0, ge=0)
    """Held-out images, which are not trained on. The result is the student that is closest to the teacher on them."""
    loss: DistillationLoss = Field(default_factory=DistillationLoss)
    augment: Literal["clip", "dinov2"] = "clip"
    """``clip``: random crops, flipped. ``dinov2``: also DINOv2's color jitter, blur and solarization."""
    min_crop: float = Field(default=0.2, gt=0, le=1)
    """Minimum area of a random crop, as a share of the image."""
    flip: bool = True
    """Mirror half of the crops."""
    fixed_crops: bool = False
    """Crop an image the same way in every epoch."""
    keep_features: bool = False
    """Cache the teacher's features of every crop on disk, for the recipe's other sizes and for later epochs of fixed
    crops."""
    shard_teacher: bool = False
    """Shard the teacher's parameters over the processes."""
    recompute: bool = False
    """Keep only the input of each block and run the block again in the backward pass (activation checkpointing)."""

    @property
    def options(self) -> LoopOptions:
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> DistillConfig:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: optimizer does not work with zero_stage: 0. Set zero_stage to 1, 2 or 3")
        if self.bf16 and self.zero_stage == 0:
            raise ValueError("bf16 with zero_stage: 0 has no float32 master weights. Set zero_stage to 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload: all does not work with zero_stage: {self.zero_stage}. Set zero_stage: 3")
        if self.base_lr is None and self.steps < NUM_SEARCH_BATCHES:
            raise ValueError(
                f"steps: {self.steps} is below the {NUM_SEARCH_BATCHES} batches on which base_lr is found. Set base_lr"
            )
        if self.base_lr is None and self.zero_stage == 3:
            raise ValueError(
                "zero_stage: 3 shards the parameters, but finding the learning rate needs all of them on each device. "
                "Set base_lr"
            )
        if self.keep_features and self.shard_teacher:
            raise ValueError(
                "keep_features does not work with shard_teacher, because processes that share a teacher must all run "
                "it. Remove one of them"
            )
        if self.compile and (self.zero_stage == 3 or self.shard_teacher):
            raise ValueError(
                "compile does not work with sharded parameters (zero_stage: 3, shard_teacher: true). Remove one of them"
            )
        return self


class TuneTextConfig(TrainingConfig):
    """Tuning of a CLIP's text tower. There are no micro-batches, because the loss contrasts all captions of a batch."""

    section = "tune_text"
    title = "text tuning"
    memory_advice = "Start more processes, or set tune_text.bf16: true, and run again (--redo tune_text)."

    captions: Annotated[str, DataPath()]
    """Images with a ``.txt`` next to each, in a folder or in tars; or a Karpathy JSON; or ``scenes:pairs``."""
    images: Annotated[str | None, DataPath("directory")] = None
    """For a Karpathy JSON: the folder of its images."""
    first_caption: bool = False
    """Always use the first of several captions, as in the paper, instead of drawing one for every epoch."""
    base_lr: float = Field(ge=0)
    """The peak learning rate is ``base_lr · batch_size / 256``."""
    zero_stage: Literal[1, 2] = 1
    """State that DeepSpeed shards over the processes: 1 optimizer states, 2 also gradients."""


def _cosine(first: float, last: float, step: int, steps: int) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
