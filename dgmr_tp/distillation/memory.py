"""Estimate of the device memory that a distillation needs, computed on the meta device before anything is loaded.

Weights, gradients and optimizer states are counted. Activations are measured: the student runs once on the meta device,
and what autograd saves is added up. Workspaces and fragmentation are not counted but reserved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dgmr_tp.distillation.config import DistillConfig
from dgmr_tp.distillation.engine import MAX_REDUCE_BUCKET, freeze_unused_parameters
from dgmr_tp.distillation.losses import FeatureTap
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import TowerAdapter
from dgmr_tp.pruning.cost import ImageSize, image_shape
from dgmr_tp.utils.modules import meta_copy

MAX_LIVE_PARAMETERS = 1_000_000_000
"""Maximum number of elements of sharded parameters that DeepSpeed keeps gathered at a time."""
RESERVED_FRACTION = 0.1
"""Fraction of a device's memory for the driver, workspaces and fragmentation."""


@dataclass(frozen=True)
class Devices:
    """Devices of the same size."""

    count: int
    memory: float
    """Bytes of each."""

    @classmethod
    def parse(cls, text: str) -> Devices:
        """Parse text such as ``8x48GB``.

        Raises:
            DgmrError: the text has another form.
        """
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)GB", text)
        if not match or int(match[1]) == 0:
            raise DgmrError(f"--devices {text} is not a number and a size of devices. Write it as in 8x48GB.")
        return cls(int(match[1]), float(match[2]) * 1e9)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory on each device, bytes."""

    states: float
    """Weights, gradients, optimizer states and reduction buffers, or what the search for a learning rate needs."""
    image: float
    """Activations of each image that a process works on at a time."""
    startup: float
    """Peak before anything is sharded: the teacher, then the student in float32."""

    def max_images(self, devices: Devices) -> int:
        """Return how many images fit at a time; 0 if the states alone do not fit."""
        available = (1 - RESERVED_FRACTION) * devices.memory
        return max(0, int((available - self.states) / self.image)) if self.startup <= available else 0


class MemoryEstimator:
    """Estimates the memory of one student and its teacher under different settings.

    Args:
        student: on the meta device, with the pruned widths.
        teacher: on the meta device.
        config: the loss and the precision of the distillation.
        image_size: height and width of the images.
    """

    def __init__(
        self, student: TowerAdapter, teacher: TowerAdapter, config: DistillConfig, image_size: ImageSize
    ) -> None:
        probe = torch.zeros(1, *image_shape(student.tower, image_size), device="meta", dtype=config.precision)
        self.itemsize = config.precision.itemsize
        tap = FeatureTap(student, config.loss)
        freeze_unused_parameters(tap, probe.float())
        self.student = _count(tap.parameters())
        self.trained = _count(parameter for parameter in tap.parameters() if parameter.requires_grad)
        self.teacher = _count(teacher.tower.parameters())
        taps = (FeatureTap(student, config.loss, recompute=recompute) for recompute in (False, True))
        plain, recomputed = (_saved_bytes(meta_copy(tap).to(config.precision).eval(), probe) for tap in taps)
        student_block, teacher_block = (_largest_block_bytes(adapter, probe) for adapter in (student, teacher))
        # The teacher saves nothing, but while a block runs it needs at most what a trained block saves.
        self.image_bytes = {False: plain + teacher_block, True: recomputed + student_block + teacher_block}

    def estimate(self, config: DistillConfig, world: int) -> MemoryEstimate:
        """Return the memory that ``world`` processes need, with a device each."""
        stage, itemsize, trained = config.zero_stage, self.itemsize, self.trained
        shards = world if stage else 1
        # Every stage but 0 stores separate float32 master weights, also when it computes in float32.
        moments, master, copy, average = 8, 4 if stage else 0, 4 if stage else 0, 4 if config.ema else 0
        optimizer = (moments + master + copy) * trained / shards
        weights, gradients = float(itemsize * self.student), float(itemsize * trained)
        teacher = float(itemsize * self.teacher)
        if stage >= 2:
            gradients /= world
        if stage == 3:
            live = itemsize * min(MAX_LIVE_PARAMETERS, self.student)
            weights = (weights / world if config.offload != "all" else 0) + live
        if config.shard_teacher:
            teacher = teacher / world + itemsize * min(MAX_LIVE_PARAMETERS, self.teacher)
        states = weights + gradients + (0 if config.offload != "none" else optimizer) + teacher
        states += itemsize * min(MAX_REDUCE_BUCKET, trained) if stage else 0
        states += average * trained / shards
        if config.base_lr is None and stage < 3:  # the search for it needs a float32 gradient and copy of all weights
            states = max(states, teacher + 4 * self.student + 8 * trained)
        startup = max(itemsize * self.teacher, teacher + 4 * self.student)
        return MemoryEstimate(states, self.image_bytes[config.recompute], startup)

    def table(self, config: DistillConfig, devices: Devices) -> str:
        """Return a table of the ZeRO stages, with and without recomputation, and a line about ``config`` itself."""
        lines = [
            f"student {self.student / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M trained, "
            f"teacher {self.teacher / 1e6:,.1f} M, {'bf16' if config.bf16 else 'float32'}",
            "zero_stage                 states, GB   MB an image: images   recomputed: images",
        ]
        for stage, sharded in ((0, False), (1, False), (2, False), (3, False), (3, True)):
            if stage == 0 and config.bf16:  # not a valid config
                continue
            plain = config.model_copy(update={"zero_stage": stage, "shard_teacher": sharded, "offload": "none"})
            changes = ({"recompute": recompute} for recompute in (False, True))
            estimates = [self.estimate(plain.model_copy(update=change), devices.count) for change in changes]
            images = "".join(f"{each.image / 1e6:13.0f}: {each.max_images(devices):6d}" for each in estimates)
            name = f"{stage}, shard_teacher" if sharded else str(stage)
            lines.append(f"{name:<26} {estimates[0].states / 1e9:10.1f} {images}")
        estimate, micro = self.estimate(config, devices.count), config.micro_batch_of(devices.count)
        total = (estimate.states + micro * estimate.image) / 1e9
        use = f"{devices.count} devices, about {total:.1f} of {devices.memory / 1e9:g} GB"
        return "\n".join([*lines, f"the recipe: {micro} images at a time on each of {use}"])

    def fits(self, config: DistillConfig, devices: Devices) -> bool:
        """Return whether the batch fits with the micro-batch of ``config``."""
        return config.micro_batch_of(devices.count) <= self.estimate(config, devices.count).max_images(devices)

    def smallest_change(self, config: DistillConfig, devices: Devices) -> dict[str, Any] | None:
        """Return the keys to change so that the batch fits, or None if nothing helps.

        Tried in this order, each added to the ones before: a smaller micro-batch, recomputation, sharding, offload.
        """
        share = config.batch_size // devices.count
        changes: dict[str, Any] = {}
        steps: list[dict[str, Any]] = [{}, {"recompute": True}]
        steps += [{"zero_stage": stage} for stage in (1, 2, 3) if stage > config.zero_stage]
        steps += [{"shard_teacher": True}, {"offload": "optimizer"}, {"offload": "all"}]
        for step in steps:
            changes |= step
            limit = self.estimate(config.model_copy(update=changes), devices.count).max_images(devices)
            if limit:
                micro = next(size for size in range(min(share, limit), 0, -1) if share % size == 0)
                return {**changes, "micro_batch": micro}
        return None


def _count(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _largest_block_bytes(adapter: TowerAdapter, probe: Tensor) -> int:
    """Return the maximum number of bytes that autograd saves for a single block."""
    tap = FeatureTap(adapter)
    copied = meta_copy(tap).to(probe.dtype).eval().adapter
    with torch.no_grad():
        state = copied.stem(probe)
    largest = 0
    for block in copied.blocks():
        state = state.detach().requires_grad_(True)
        largest = max(largest, _saved_bytes(block, state, block.module))
        with torch.no_grad():
            state = block(state)
    return largest


def _saved_bytes(run: Callable[[Tensor], Any], argument: Tensor, module: nn.Module | None = None) -> int:
    """Return the bytes that autograd saves for the backward pass of ``run(argument)``, without parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in (module or run).parameters()}  # type: ignore[union-attr]
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), _fused_attention(), hooks:
        output = run(argument)
    del output
    return sum(storage.nbytes() for storage in saved.values())


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Use a fused attention kernel on the meta device too, which saves no tokens × tokens matrix."""

    def fused(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return operation(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]

    with patch.object(nn.functional, "scaled_dot_product_attention", fused):
        yield
