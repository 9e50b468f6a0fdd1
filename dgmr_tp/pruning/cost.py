"""What a tower costs: parameters and floating-point operations of one image, in all and per hidden neuron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dgmr_tp.pruning.sites import Site
from dgmr_tp.utils.modules import evaluating


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops(module: nn.Module, image_size: int) -> int:
    """Operations of one forward pass of one image, a multiply-add as two, attention products included.

    Nothing is computed: the pass runs on the meta device, so that a tower of any size costs nothing.
    """
    return _counted(module, image_size).get_total_flops()


@dataclass(frozen=True)
class Cost:
    """A tower's cost, and what each hidden neuron contributes to it; all of it integers."""

    total: int
    neuron: dict[str, int]
    """By site name."""

    def without(self, cut: Mapping[str, int]) -> int:
        """The tower's cost when so many neurons of each site are gone."""
        return self.total - sum(self.neuron[name] * count for name, count in cut.items())


def parameter_cost(model: nn.Module, sites: Sequence[Site]) -> Cost:
    """Parameters: a neuron's rows and biases, its column, and its scale and shift in a norm over the hidden neurons."""
    neuron = {}
    for site in sites:
        consumer = cast(nn.Linear, model.get_submodule(site.consumer))
        made = sum(parameters(model.get_submodule(path)) for path in site.producers)
        norms = [layer for layer in model.get_submodule(site.name).modules() if hasattr(layer, "normalized_shape")]
        scaled = (
            0
            if site.exact
            else sum(parameters(norm) for norm in norms if tuple(norm.normalized_shape) == (site.hidden,))
        )
        neuron[site.name] = (made + consumer.weight.numel() + scaled) // site.hidden
    return Cost(parameters(model), neuron)


def flop_cost(model: nn.Module, sites: Sequence[Site], image_size: int) -> Cost:
    """Floating-point operations of one image; those of an MLP are all in its Linear layers."""
    counted = _counted(model, image_size)
    by_module = {name.partition(".")[2]: sum(counts.values()) for name, counts in counted.get_flop_counts().items()}
    return Cost(counted.get_total_flops(), {site.name: by_module[site.name] // site.hidden for site in sites})


def costs(model: nn.Module, sites: Sequence[Site], image_size: int | None) -> dict[str, Cost]:
    """What a budget can be of: ``params``, and ``flops`` where the image size is known."""
    found = {"params": parameter_cost(model, sites)}
    if image_size is not None:
        found["flops"] = flop_cost(model, sites, image_size)
    return found


def _counted(module: nn.Module, image_size: int) -> FlopCounterMode:
    like = next(module.parameters())
    images = torch.empty(1, 3, image_size, image_size, dtype=like.dtype, device="meta")
    state: dict[str, Tensor] = {
        name: torch.empty_like(tensor, device="meta") for name, tensor in module.state_dict(keep_vars=True).items()
    }
    buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in module.named_buffers()}
    # With gradients on, nn.MultiheadAttention takes the path whose products the counter sees.
    with evaluating(module), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, {**buffers, **state}, (images.requires_grad_(True),))
    return counter
