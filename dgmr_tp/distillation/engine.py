"""DeepSpeed as the distillation uses it: its configuration, the processes, what is decayed, what comes out in the end."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgmr_tp.distillation.losses import FeatureTap
from dgmr_tp.distillation.settings import Settings
from dgmr_tp.errors import DgmrError
from dgmr_tp.extras import require


def start_deepspeed() -> Any:
    """DeepSpeed with its process group: on a CPU plain gloo, for which nothing is compiled and no compiler has to be there."""
    deepspeed = require("deepspeed", "distill")
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return deepspeed


def stop_deepspeed() -> None:
    """Leave together: a process that ends while another still works can be aborted by its threads."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


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
    ours = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": settings.batch_size // world // micro,
        "gradient_clipping": settings.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # AdamW of torch: nothing is compiled
        "bf16": {"enabled": settings.bf16},
        "csv_monitor": {"enabled": True, "output_path": str(directory), "job_name": "log"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if settings.deepspeed is None:
        return ours
    path = Path(settings.deepspeed)
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DgmrError(f"distill.deepspeed: cannot read {path}: {error}") from error
    if not isinstance(theirs, dict):
        raise DgmrError(f"distill.deepspeed: {path} is no JSON object")
    return _joined(ours, theirs, path)


def _joined(ours: dict[str, Any], theirs: dict[str, Any], path: Path, where: str = "") -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        name = f"{where}{key}"
        if name in ("optimizer", "scheduler", "train_batch_size", "fp16.enabled") and value not in ("auto", False):
            raise DgmrError(
                f"{path}: {name} is not for DeepSpeed to say: the recipe has the optimiser, schedule, batch and precision; remove it"
            )
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            result[key] = _joined(ours.get(key, {}), value, path, f"{name}.")
        elif key not in ours or value == ours[key]:
            result[key] = value
        elif value != "auto":
            raise DgmrError(f"{path}: {name} = {value!r}, but the recipe's distill section makes it {ours[key]!r}; remove one of them")
    return result


def freeze_what_features_do_not_need(tap: FeatureTap, image_size: int) -> None:
    """What no part of the loss depends on gets no gradient; left trainable it would still be decayed."""
    parameters = list(tap.requires_grad_(True).parameters())
    found = tap(torch.zeros(1, 3, image_size, image_size).to(parameters[0].device, parameters[0].dtype))
    total = sum(features.sum() for features in found.values())
    for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
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


def gather_where_used(tap: FeatureTap, image_size: int) -> None:
    """For ZeRO-3, before the parameters are sharded: a walk calls a tower's parts, so that DeepSpeed's hooks miss the parameters of
    modules which are never called themselves (tokens, positions, projections). They are gathered with the nearest one that is."""
    deepspeed = require("deepspeed", "distill")
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in tap.modules()]
    like = next(tap.parameters())
    with torch.no_grad():
        tap(torch.zeros(1, 3, image_size, image_size).to(like.device, like.dtype))
    for handle in handles:
        handle.remove()
    modules = dict(tap.named_modules())
    for name, module in modules.items():
        owner = name
        while modules[owner] not in called:
            owner = owner.rpartition(".")[0]
        for parameter in module.parameters(recurse=False) if owner != name else ():
            deepspeed.zero.register_external_parameter(modules[owner], parameter)


def trained_parameters(engine: Any) -> dict[str, Tensor]:
    """The trained parameters in float32 on the CPU, whatever ZeRO stage sharded them. Every rank has to call it."""
    deepspeed = require("deepspeed", "distill")
    full = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            value = deepspeed.utils.safe_get_full_fp32_param(parameter)
            full[name] = (parameter.detach() if value is None else value).float().cpu().clone()
    return full


class Average:
    """An exponential moving average of the trained parameters, float32, held by one process.

    All processes have to call :meth:`update`, which gathers what ZeRO-3 shards.
    """

    def __init__(self, module: nn.Module, decay: float, holder: bool) -> None:
        self.decay, self.holder = decay, holder
        self.trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.values = {name: parameter.detach().float().clone() for name, parameter in self.trained.items()} if holder else {}

    @torch.no_grad()
    def update(self) -> None:
        """``average ← decay · average + (1 − decay) · parameter``."""
        for name, parameter in self.trained.items():
            with gathered(parameter):
                if self.holder:
                    average = self.values[name] = self.values[name].to(parameter.device)
                    average.lerp_(parameter.float(), 1 - self.decay)


def gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """A context in which the whole parameter is there, also where ZeRO-3 shards it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    return require("deepspeed", "distill").zero.GatheredParameters([parameter])
