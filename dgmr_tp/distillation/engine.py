"""DeepSpeed as the trainings use it: configuration, parameter groups, full parameters, and the moving average.

It works on any module that maps a tensor to a dictionary of tensors. It does not know tasks, data or checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dgmr_tp.distillation.config import TrainingConfig
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import get_rank
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.modules import meta_copy

MAX_REDUCE_BUCKET = 500_000_000
"""Maximum number of gradient elements that DeepSpeed reduces at a time."""
OFFLOAD_VALUES = {"zero_optimization.offload_optimizer": "optimizer", "zero_optimization.offload_param": "all"}
"""Keys of a DeepSpeed file that need this value of the recipe's ``offload``, which the memory estimate reads."""
UNSUPPORTED_KEYS = ("zero_optimization.round_robin_gradients", "zero_optimization.mics_shard_size")
"""DeepSpeed options with which ``safe_get_full_fp32_param`` does not find the master weights of a parameter."""
COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Maximum time that processes wait for one of them. Converting a large checkpoint takes long."""


def start_deepspeed() -> Any:
    """Initialize DeepSpeed's process group and return the module. On a CPU: plain gloo, which needs no compiler."""
    deepspeed = require("deepspeed", "distill")
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not distributed.is_initialized():
        deepspeed.init_distributed(verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return deepspeed


def current_device() -> torch.device:
    """Return the device of this process."""
    return torch.device(require("deepspeed", "distill").accelerator.get_accelerator().current_device_name())


def stop_deepspeed() -> None:
    """Leave the process group together. A process that exits while others still work may be aborted by its threads."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def deepspeed_config(config: TrainingConfig, world: int, directory: Path) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a training, merged with the JSON file that ``config.deepspeed`` names.

    Args:
        config: of the training.
        world: number of processes.
        directory: of the training; DeepSpeed writes the curves to ``directory/log``.

    Raises:
        DgmrError: the file is not a JSON object, or contradicts the recipe.
    """
    micro = config.micro_batch_of(world)
    offload = config.options.offload
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    defaults = {"steps_per_print": 10**9, "wall_clock_breakdown": False}
    ours = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.batch_size // world // micro,
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW instead: nothing is compiled
        "bf16": {"enabled": config.bf16},
        "data_types": {
            "grad_accum_dtype": "fp32" if config.zero_stage >= 2 else None,
            # EVA's biases and Swin's masks are buffers that are added to the activations.
            "buffer_dtype": "bf16" if config.bf16 else None,
        },
        "csv_monitor": {"enabled": True, "output_path": str(directory), "job_name": "log"},
    }
    if config.deepspeed is None:
        return {**defaults, **ours}
    path = Path(config.deepspeed)
    try:
        theirs = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DgmrError(
            f"{config.section}.deepspeed: cannot read {path}: {error}. Name a readable JSON file."
        ) from error
    if not isinstance(theirs, dict):
        raise DgmrError(
            f"{config.section}.deepspeed: {path} is not a JSON object. Write it as in DeepSpeed's documentation."
        )
    return {**defaults, **_merge(ours, theirs, path, config.section)}


def _merge(ours: dict[str, Any], theirs: dict[str, Any], path: Path, section: str, prefix: str = "") -> dict[str, Any]:
    """Merge the user's DeepSpeed file into the recipe's values. Raise DgmrError where they contradict each other."""
    merged = dict(ours)
    for key, value in theirs.items():
        if value == "auto":  # as in files written for transformers: the recipe's value, or DeepSpeed's default
            continue
        name = f"{prefix}{key}"
        if name in ("optimizer", "scheduler", "train_batch_size", "fp16.enabled") and value is not False:
            raise DgmrError(
                f"{path}: {name} must not be set here, because the recipe sets the optimizer, schedule, batch and "
                "precision. Remove it."
            )
        if name in UNSUPPORTED_KEYS and value not in (False, -1):
            raise DgmrError(f"{path}: with {name}, DeepSpeed cannot return the trained weights. Remove it.")
        offload = OFFLOAD_VALUES.get(name)
        if offload and key not in ours and isinstance(value, dict) and value.get("device", "none") != "none":
            raise DgmrError(
                f"{path}: {name} is set, but the recipe's {section} section has no offload: {offload}. Set it there."
            )
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            merged[key] = _merge(ours.get(key, {}), value, path, section, f"{name}.")
        elif key not in ours or value == ours[key]:
            merged[key] = value
        else:
            raise DgmrError(
                f"{path}: {name} = {value!r}, but {section} in the recipe makes it {ours[key]!r}. "
                "Remove it here or change it there."
            )
    return merged


def freeze_unused_parameters(module: nn.Module, probe: Tensor) -> None:
    """Make exactly those parameters trainable that some output of ``module(probe)`` depends on.

    The others get no gradient, and would only be decayed. With a probe on the meta device nothing is computed; some
    text towers need a probe with values.
    """
    parameters = list(module.requires_grad_(True).parameters())
    traced = meta_copy(module).float() if probe.is_meta else module
    total = sum(output.sum() for output in traced(probe).values())
    gradients = torch.autograd.grad(total, list(traced.parameters()), allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: matrices of Linear, convolution and attention layers, with decay, and the others."""
    decayed_names = set()
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, nn.Linear | nn.Conv2d):
            decayed_names.add(f"{prefix}weight")
        elif isinstance(layer, nn.MultiheadAttention):
            decayed_names.add(f"{prefix}in_proj_weight")
    trained = list(_trained_parameters(module))
    decayed = [parameter for name, parameter in trained if name in decayed_names]
    plain = [parameter for name, parameter in trained if name not in decayed_names]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def register_external_parameters(module: nn.Module, probe: Tensor) -> None:
    """Tell ZeRO-3 which parameters to gather with which module. Call it before the parameters are sharded.

    An adapter calls parts of a tower, so that DeepSpeed's hooks miss the parameters of modules that are never called
    themselves (tokens, positions, projections). They are gathered with the nearest enclosing module that is called.
    """
    deepspeed = require("deepspeed", "distill")
    traced, called = meta_copy(module).float(), set()
    for name, part in traced.named_modules():
        part.register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name))
    with torch.no_grad():
        traced(probe.to("meta"))
    modules = dict(module.named_modules())
    for name, part in modules.items():
        owner = name
        while owner not in called:
            owner = owner.rpartition(".")[0]
        for parameter in part.parameters(recurse=False) if owner != name else ():
            deepspeed.zero.register_external_parameter(modules[owner], parameter)


def full_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained parameters one by one, unsharded and in float32: the master weights of any ZeRO stage.

    Every process must iterate over all of them.
    """
    get_full_parameter = require("deepspeed", "distill").utils.safe_get_full_fp32_param
    for name, parameter in _trained_parameters(module):
        value = get_full_parameter(parameter)
        yield name, (parameter.detach() if value is None else value).float()


@torch.no_grad()
def set_master_weights(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the float32 master weights that DeepSpeed made from the rounded parameters of a bf16 training.

    Args:
        module: as DeepSpeed wraps it.
        values: the trained parameters by name, unsharded and in float32.
    """
    set_local_shard = require("deepspeed", "distill").utils.safe_set_local_fp32_param
    for name, parameter in _trained_parameters(module):
        shard, start = _local_shard(parameter)
        value = values[name].flatten()[start:][: len(shard)].to(shard)
        if hasattr(parameter, "ds_id"):
            set_local_shard(parameter, nn.functional.pad(value, (0, len(shard) - len(value))))  # the last one is padded
        else:
            shard.copy_(value)


class WeightAverage:
    """Exponential moving average of the trained parameters' float32 master weights. Each process averages its shards.

    Args:
        module: as DeepSpeed wraps it.
        decay: weight of the old average in every step.
        saved: the full average of a checkpoint, by name. Empty: the average starts at the weights.
    """

    def __init__(self, module: nn.Module, decay: float, saved: dict[str, Tensor]) -> None:
        self.module, self.decay = module, decay
        self.shards = {}
        for name, parameter in _trained_parameters(self.module):
            shard, start = _local_shard(parameter)
            self.shards[name] = shard.clone()
            if saved:
                values = saved[name].flatten()[start:][: len(shard)]
                self.shards[name][: len(values)] = values

    @torch.no_grad()
    def update(self) -> None:
        """Set ``average ← decay · average + (1 − decay) · parameter``."""
        for name, parameter in _trained_parameters(self.module):
            self.shards[name].lerp_(_local_shard(parameter)[0], 1 - self.decay)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the averages of the parameters one by one, unsharded. Every process must iterate over all of them."""
        for name, parameter in _trained_parameters(self.module):
            _, start = _local_shard(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty parameter
            value = torch.zeros(shape.numel(), device=current_device())
            target = value[start:][: len(self.shards[name])]  # ZeRO-3 pads the last shard
            target.copy_(self.shards[name][: len(target)])
            if _is_sharded(parameter):
                distributed.all_reduce(value)
            yield name, value.view(shape)


def _trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _local_shard(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Return this process's flat shard of the master weights, and its offset in the flat parameter.

    DeepSpeed has a function for it in ZeRO-3 only. In the other stages this reads the fields that DeepSpeed's
    ``safe_get_full_fp32_param`` reads.
    """
    if hasattr(parameter, "ds_id"):
        shard = require("deepspeed", "distill").utils.safe_get_local_fp32_param(parameter)
        return shard, get_rank() * len(shard)
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        return (mapping.hp_fragment, mapping.lp_fragment_address.start) if mapping else (torch.empty(0), 0)
    return parameter.detach().flatten(), 0
