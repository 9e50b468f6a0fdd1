"""What a tower costs: parameters and floating-point operations of one image."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops(module: nn.Module, image_size: int) -> int:
    """Operations of one forward pass of one image, a multiply-add as two, attention products included."""
    like = next(module.parameters())
    images = torch.zeros(1, 3, image_size, image_size, dtype=like.dtype, device=like.device)
    # With gradients on, nn.MultiheadAttention takes the path whose products the counter sees.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        module(images.requires_grad_(True))
    return counter.get_total_flops()
