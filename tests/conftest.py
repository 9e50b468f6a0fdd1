"""Shared by all tests: small encoders whose every parameter is drawn anew, and pictures for them."""

from __future__ import annotations

import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from dgmr_tp.encoders import as_encoder


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value that matters: fresh LayerScales, norms and biases hide the MLPs from any test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            else:
                parameter.copy_(0.5 + 0.5 * torch.rand(parameter.shape, generator=generator))
    return module.eval()


def open_clip_tower(layers: int = 3) -> nn.Module:
    return VisionTransformer(32, 8, 48, layers, 3, 4.0, ls_init_value=0.1, output_dim=24)


def timm_tower(layers: int = 3, **kwargs: object) -> nn.Module:
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": layers,
        "num_heads": 3,
        "num_classes": 10,
        "init_values": 0.1,
        **kwargs,
    }
    return timm.models.VisionTransformer(**options)


TOWERS = {"open_clip": open_clip_tower, "timm": timm_tower}


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> nn.Module:
    """A small ViT in eval mode whose MLPs are known to matter: zeroing one moves the output by more than 1 %."""
    module = redraw(TOWERS[request.param]())
    images = pictures(4)
    with torch.no_grad():
        before = module(images)
        block = as_encoder(module).blocks()[0].module
        last = [layer for layer in block.mlp.modules() if isinstance(layer, nn.Linear)][-1]
        weight = last.weight.clone()
        last.weight.zero_()
        moved = (module(images) - before).norm() / before.norm()
        last.weight.copy_(weight)
    assert moved > 0.01, f"zeroing an MLP moves the output by {moved:.2%} only: this model proves nothing"
    return module


def pictures(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
