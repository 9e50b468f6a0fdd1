"""DeepSpeed as the training uses it: its configuration, the processes, what is decayed, what comes out in the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dgmr_tp.distillation.config import Settings
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import get_rank
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.modules import meta_copy

BUCKET = 500_000_000
"""Elements of gradients that DeepSpeed reduces at a time, where there are so many."""
OFFLOADS = {"zero_optimization.offload_optimizer": "optimizer", "zero_optimization.offload_param": "all"}
"""What of a DeepSpeed file the recipe has to say, for the memory plan and the optimiser to know."""
SCRAMBLING = ("zero_optimization.round_robin_gradients", "zero_optimization.mics_shard_size")
"""Options with which DeepSpeed itself does not find a parameter's master weights again (``safe_get_full_fp32_param``)."""
PATIENCE = timedelta(hours=2)
"""How long the processes wait for one of them: the conversion of a large checkpoint takes its time."""


def start_deepspeed() -> Any:
    """DeepSpeed with its process group: on a CPU plain gloo, for which nothing is compiled and no compiler has to be there."""
    deepspeed = require("deepspeed", "distill")
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not distributed.is_initialized():
        deepspeed.init_distributed(verbose=False, timeout=PATIENCE)
    return deepspeed


def device_here() -> torch.device:
    """Where this process computes."""
    return torch.device(require("deepspeed", "distill").accelerator.get_accelerator().current_device_name())


def stop_deepspeed() -> None:
    """Leave together: a process that ends while another still works can be aborted by its threads."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def deepspeed_config(settings: Settings, world: int, directory: Path) -> dict[str, Any]:
    """DeepSpeed's own configuration for these settings, joined with the file that ``settings.deepspeed`` names.

    Raises:
        DgmrError: the file is no JSON object, or says something else than the recipe.
    """
    micro = settings.micro_batch_of(world)
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    own_defaults = {"steps_per_print": 10**9, "wall_clock_breakdown": False}
    ours = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": settings.batch_size // world // micro,
        "gradient_clipping": settings.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # AdamW of torch: nothing is compiled
        "bf16": {"enabled": settings.bf16},
        "data_types": {
            "grad_accum_dtype": "fp32" if settings.zero_stage >= 2 else None,
            "buffer_dtype": "bf16"
            if settings.bf16
            else None,  # as the teacher's: EVA's biases and Swin's masks meet the activations
        },
        "csv_monitor": {"enabled": True, "output_path": str(directory), "job_name": "log"},
    }
    if settings.deepspeed is None:
        return {**own_defaults, **ours}
    path = Path(settings.deepspeed)
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DgmrError(f"{settings.section}.deepspeed: cannot read {path}: {error}") from error
    if not isinstance(theirs, dict):
        raise DgmrError(f"{settings.section}.deepspeed: {path} is no JSON object")
    return {**own_defaults, **_joined(ours, theirs, path, settings.section)}


def _joined(ours: dict[str, Any], theirs: dict[str, Any], path: Path, section: str, where: str = "") -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        if value == "auto":  # as in files written for transformers: the recipe says it, or DeepSpeed's default
            continue
        name = f"{where}{key}"
        if name in ("optimizer", "scheduler", "train_batch_size", "fp16.enabled") and value is not False:
            raise DgmrError(
                f"{path}: {name} is not for DeepSpeed to say: the recipe has the optimiser, schedule, batch and precision; remove it"
            )
        if name in SCRAMBLING and value not in (False, -1):
            raise DgmrError(f"{path}: {name}: with it DeepSpeed cannot give the trained weights back; remove it")
        if name in OFFLOADS and key not in ours and isinstance(value, dict) and value.get("device", "none") != "none":
            raise DgmrError(
                f"{path}: {name}, but the recipe's {section} section does not say offload: {OFFLOADS[name]}; say it there"
            )
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            result[key] = _joined(ours.get(key, {}), value, path, section, f"{name}.")
        elif key not in ours or value == ours[key]:
            result[key] = value
        else:
            raise DgmrError(
                f"{path}: {name} = {value!r}, but {section} in the recipe makes it {ours[key]!r}; remove it here or change it there"
            )
    return result


def freeze_what_outputs_do_not_need(module: nn.Module, probe: Tensor) -> None:
    """What no output of ``module(probe)``, a dictionary of tensors, depends on gets no gradient; left trainable it would be decayed.

    With a probe on the meta device nothing is computed; not every text tower can do without values.
    """
    parameters = list(module.requires_grad_(True).parameters())
    shapes = meta_copy(module).float() if probe.is_meta else module
    total = sum(output.sum() for output in shapes(probe).values())
    gradients = torch.autograd.grad(total, list(shapes.parameters()), allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
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


def gather_where_used(module: nn.Module, probe: Tensor) -> None:
    """For ZeRO-3, before the parameters are sharded: a walk calls a tower's parts, so that DeepSpeed's hooks miss the parameters of
    modules which are never called themselves (tokens, positions, projections). They are gathered with the nearest one that is."""
    deepspeed = require("deepspeed", "distill")
    shapes, called = meta_copy(module).float(), set()
    for name, part in shapes.named_modules():
        part.register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name))
    with torch.no_grad():
        shapes(probe.to("meta"))
    modules = dict(module.named_modules())
    for name, part in modules.items():
        owner = name
        while owner not in called:
            owner = owner.rpartition(".")[0]
        for parameter in part.parameters(recurse=False) if owner != name else ():
            deepspeed.zero.register_external_parameter(modules[owner], parameter)


def whole_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters one after the other, whole and in float32: the master weights, whatever ZeRO stage shards them.

    Every process has to go through all of them.
    """
    whole = require("deepspeed", "distill").utils.safe_get_full_fp32_param
    for name, parameter in _trained(module):
        value = whole(parameter)
        yield name, (parameter.detach() if value is None else value).float()


class Average:
    """An exponential moving average of the trained parameters' master weights, float32. Each process averages what it holds of them.

    Args:
        module: as DeepSpeed wraps it.
        decay: what of the average stays in every step.
        known: the average so far, whole, by name; empty: it begins with the weights.
    """

    def __init__(self, module: nn.Module, decay: float, known: dict[str, Tensor]) -> None:
        self.module, self.decay = module, decay
        self.parts = {}
        for name, parameter in _trained(self.module):
            part, start = _held(parameter)
            self.parts[name] = part.clone()
            if known:
                given = known[name].flatten()[start:][: len(part)]
                self.parts[name][: len(given)] = given

    @torch.no_grad()
    def update(self) -> None:
        """``average ← decay · average + (1 − decay) · parameter``."""
        for name, parameter in _trained(self.module):
            self.parts[name].lerp_(_held(parameter)[0], 1 - self.decay)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """One parameter's average after the other. Every process has to go through all of them."""
        for name, parameter in _trained(self.module):
            _, start = _held(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty one
            value = torch.zeros(shape.numel(), device=device_here())
            place = value[start:][: len(self.parts[name])]  # ZeRO-3 pads the last part
            place.copy_(self.parts[name][: len(place)])
            if _is_sharded(parameter):
                distributed.all_reduce(value)
            yield name, value.view(shape)


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _held(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """What this process holds of the master weights, flat, and where that begins in the whole.

    DeepSpeed has a function for it in ZeRO-3 alone; in the other stages this reads what its ``safe_get_full_fp32_param`` reads.
    """
    if hasattr(parameter, "ds_id"):
        part = require("deepspeed", "distill").utils.safe_get_local_fp32_param(parameter)
        return part, get_rank() * len(part)
    if hasattr(parameter, "_hp_mapping"):
        there = parameter._hp_mapping
        return (there.hp_fragment, there.lp_fragment_address.start) if there else (torch.empty(0), 0)
    return parameter.detach().flatten(), 0
