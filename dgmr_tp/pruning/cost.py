"""Cost of a tower: parameters and floating-point operations of one image, in total and per hidden neuron.

Works on modules, on the meta device too, and runs no real forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dgmr_tp.pruning.sites import Site
from dgmr_tp.utils.modules import evaluating

ImageSize = int | tuple[int, int]
"""Height and width of an image in pixels. One number stands for both."""


def parameters(module: nn.Module) -> int:
    """Return the number of parameters of ``module``."""
    return sum(parameter.numel() for parameter in module.parameters())


def image_shape(tower: nn.Module, image_size: ImageSize) -> tuple[int, int, int]:
    """Return the shape ``[channels, height, width]`` of the images that ``tower`` takes.

    The channels are those of its first convolution. A tower without one takes RGB images.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    convolution = next((layer for layer in tower.modules() if isinstance(layer, nn.Conv2d)), None)
    return 3 if convolution is None else convolution.in_channels, height, width


def flops(module: nn.Module, image_size: ImageSize) -> int:
    """Return the floating-point operations of one forward pass of one image.

    A multiply-add counts as two, and attention products are included. The pass runs on the meta device, so that it
    takes no memory.

    Args:
        module: a vision tower.
        image_size: height and width of the image in pixels, or one number for both.
    """
    return _count_flops(module, image_size).get_total_flops()


@dataclass(frozen=True)
class Cost:
    """Cost of a tower and of each of its hidden neurons, as integers."""

    total: int
    """Cost of the tower."""
    neuron: dict[str, int]
    """Cost of one hidden neuron by site name."""

    def without(self, removed: Mapping[str, int]) -> int:
        """Return the tower's cost without ``removed`` neurons, a number by site name."""
        return self.total - sum(self.neuron[name] * count for name, count in removed.items())


def parameter_cost(model: nn.Module, sites: Sequence[Site]) -> Cost:
    """Return the parameters of a tower and of its neurons.

    A neuron has its rows and biases, its column, and its scale and shift in a norm over the hidden neurons.
    """
    neuron = {}
    for site in sites:
        consumer = cast(nn.Linear, model.get_submodule(site.consumer))
        total = consumer.weight.numel() + sum(parameters(model.get_submodule(path)) for path in site.producers)
        if not site.exact:
            norms = [layer for layer in model.get_submodule(site.name).modules() if hasattr(layer, "normalized_shape")]
            total += sum(parameters(norm) for norm in norms if tuple(norm.normalized_shape) == (site.hidden,))
        neuron[site.name] = total // site.hidden
    return Cost(parameters(model), neuron)


def flop_cost(model: nn.Module, sites: Sequence[Site], image_size: ImageSize) -> Cost:
    """Return the floating-point operations of a tower and of its neurons, for one image.

    Only an MLP's Linears count.
    """
    counter = _count_flops(model, image_size)
    by_module = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return Cost(counter.get_total_flops(), {site.name: by_module[site.name] // site.hidden for site in sites})


def costs(model: nn.Module, sites: Sequence[Site], image_size: ImageSize | None) -> dict[str, Cost]:
    """Return the costs by budget key: ``params``, and ``flops`` if the image size is known."""
    by_key = {"params": parameter_cost(model, sites)}
    if image_size is not None:
        by_key["flops"] = flop_cost(model, sites, image_size)
    return by_key


def _count_flops(module: nn.Module, image_size: ImageSize) -> FlopCounterMode:
    reference = next(module.parameters())
    images = torch.empty(1, *image_shape(module, image_size), dtype=reference.dtype, device="meta")
    state: dict[str, Tensor] = {
        name: torch.empty_like(tensor, device="meta") for name, tensor in module.state_dict(keep_vars=True).items()
    }
    buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in module.named_buffers()}
    # With gradients, nn.MultiheadAttention takes a path that the counter can follow.
    with evaluating(module), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, {**buffers, **state}, (images.requires_grad_(True),))
    return counter
