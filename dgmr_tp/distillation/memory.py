"""What a distillation needs on each device, counted before anything is loaded.

States by arithmetic; activations by running the student once on the meta device and adding up what autograd keeps. It is an
estimate: what lies between the states and the activations (buckets, workspaces, fragmentation) is reserved, not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dgmr_tp.distillation.config import DistillSettings
from dgmr_tp.distillation.engine import BUCKET, freeze_what_outputs_do_not_need
from dgmr_tp.distillation.losses import FeatureTap
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import TowerAdapter
from dgmr_tp.utils.modules import meta_copy

LIVE = 1_000_000_000
"""Elements of sharded parameters that DeepSpeed holds whole until they are needed again."""
RESERVED = 0.1
"""Part of a device's memory for the driver, workspaces and fragmentation."""


@dataclass(frozen=True)
class Devices:
    """``count`` devices of ``memory`` bytes."""

    count: int
    memory: float

    @classmethod
    def parse(cls, text: str) -> Devices:
        """From words such as ``8x48GB``. Raises DgmrError for others."""
        found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)GB", text)
        if not found or int(found[1]) == 0:
            raise DgmrError(f"--devices {text}: write how many and how large, such as 8x48GB")
        return cls(int(found[1]), float(found[2]) * 1e9)


@dataclass(frozen=True)
class Needs:
    """Bytes on each device."""

    states: float
    """Weights, gradients, optimiser, and the gradients on their way."""
    image: float
    """More for every image that a process works on at a time."""
    start: float
    """Before anything is sharded: the original, then the student in float32."""

    def most_images(self, devices: Devices) -> int:
        """How many images fit at a time; 0 if not even the states do."""
        there = (1 - RESERVED) * devices.memory
        return max(0, int((there - self.states) / self.image)) if self.start <= there else 0


class Planner:
    """What different settings need for one student and its teacher.

    Args:
        student, teacher: on the meta device, the student resized.
        settings: of the recipe.
        image_size: height and width of the images.
    """

    def __init__(
        self, student: TowerAdapter, teacher: TowerAdapter, settings: DistillSettings, image_size: int
    ) -> None:
        probe = torch.zeros(1, 3, image_size, image_size, device="meta", dtype=settings.precision)
        self.width = settings.precision.itemsize
        tap = FeatureTap(student, settings.loss)
        freeze_what_outputs_do_not_need(tap, probe.float())
        self.student = _total(tap.parameters())
        self.trained = _total(parameter for parameter in tap.parameters() if parameter.requires_grad)
        self.teacher = _total(teacher.tower.parameters())
        kept = [
            _kept(meta_copy(FeatureTap(student, settings.loss, recompute=again)).to(settings.precision).eval(), probe)
            for again in (False, True)
        ]
        once, of_teacher = (_one_block(tower, probe) for tower in (student, teacher))
        # A teacher's block keeps nothing, but what it holds while it runs is at most what a trained one keeps.
        self.images = {False: kept[0] + of_teacher, True: kept[1] + once + of_teacher}

    def needs(self, settings: DistillSettings, world: int) -> Needs:
        """Of ``world`` processes, a device each."""
        stage, width, trained = settings.zero_stage, self.width, self.trained
        parts = world if stage else 1
        # Every stage but 0 has master weights of its own, in float32 too.
        moments, master, copy, average = 8, 4 if stage else 0, 4 if stage else 0, 4 if settings.ema else 0
        optimizer = (moments + master + copy) * trained / parts
        weights, gradients, teacher = float(width * self.student), float(width * trained), float(width * self.teacher)
        if stage >= 2:
            gradients /= world
        if stage == 3:
            weights = (weights / world if settings.offload != "all" else 0) + width * min(LIVE, self.student)
        if settings.shard_teacher:
            teacher = teacher / world + width * min(LIVE, self.teacher)
        states = weights + gradients + (0 if settings.offload != "none" else optimizer) + teacher
        states += width * min(BUCKET, trained) if stage else 0
        states += average * trained / parts
        return Needs(
            states, self.images[settings.recompute], start=max(width * self.teacher, teacher + 4 * self.student)
        )

    def table(self, settings: DistillSettings, devices: Devices) -> str:
        """States, and images at a time, in every ZeRO stage with and without recomputation; then the settings as they are."""
        lines = [
            f"student {self.student / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M trained, original {self.teacher / 1e6:,.1f} M, "
            f"{'bf16' if settings.bf16 else 'float32'}",
            "zero_stage                 states, GB   MB an image: images   recomputed: images",
        ]
        for stage, sharded in ((0, False), (1, False), (2, False), (3, False), (3, True)):
            if stage == 0 and settings.bf16:  # refused by the recipe
                continue
            plain = replace(settings, zero_stage=stage, shard_teacher=sharded, offload="none")
            both = [self.needs(replace(plain, recompute=again), devices.count) for again in (False, True)]
            shown = "".join(f"{needs.image / 1e6:13.0f}: {needs.most_images(devices):6d}" for needs in both)
            lines.append(
                f"{f'{stage}, shard_teacher' if sharded else stage!s:<26} {both[0].states / 1e9:10.1f} {shown}"
            )
        needs, micro = self.needs(settings, devices.count), settings.micro_batch_of(devices.count)
        total = (needs.states + micro * needs.image) / 1e9
        there = f"{devices.count} devices, about {total:.1f} of {devices.memory / 1e9:g} GB"
        return "\n".join([*lines, f"the recipe: {micro} images at a time on each of {there}"])

    def fits(self, settings: DistillSettings, devices: Devices) -> bool:
        """Whether the recipe's batch can be worked on as ``settings`` say."""
        return settings.micro_batch_of(devices.count) <= self.needs(settings, devices.count).most_images(devices)

    def remedy(self, settings: DistillSettings, devices: Devices) -> dict[str, Any] | None:
        """The least that has to change: fewer images at a time, then recomputation, sharding, offload as well. None: nothing helps."""
        share = settings.batch_size // devices.count
        changes: dict[str, Any] = {}
        steps: list[dict[str, Any]] = [{}, {"recompute": True}]
        steps += [{"zero_stage": stage} for stage in (1, 2, 3) if stage > settings.zero_stage]
        steps += [{"shard_teacher": True}, {"offload": "optimizer"}, {"offload": "all"}]
        for step in steps:
            changes |= step
            most = self.needs(replace(settings, **changes), devices.count).most_images(devices)
            if most:
                return {**changes, "micro_batch": next(n for n in range(min(share, most), 0, -1) if share % n == 0)}
        return None


def _total(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _one_block(adapter: TowerAdapter, probe: Tensor) -> int:
    """What autograd would keep of the block that keeps most."""
    tap = FeatureTap(adapter)
    walk = meta_copy(tap).to(probe.dtype).eval().walk
    with torch.no_grad():
        state = walk.stem(probe)
    most = 0
    for block in walk.blocks():
        state = state.detach().requires_grad_(True)
        most = max(most, _kept(block, state, block.module))
        with torch.no_grad():
            state = block(state)
    return most


def _kept(run: Callable[[Tensor], Any], given: Tensor, module: nn.Module | None = None) -> int:
    """Bytes that autograd keeps between forward and backward pass, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in (module or run).parameters()}  # type: ignore[union-attr]
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), _fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = run(given)
    del answer
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention keeps no matrix of tokens by tokens where it is computed for good; on the meta device it would."""

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
