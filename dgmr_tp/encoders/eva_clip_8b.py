"""EVA-CLIP-8B's vision tower as a timm model, ``timm:eva_clip_8b_patch14_224``.

timm contains the layers of this tower but no entry for it. This module registers one. It reads both releases:
``EVA_CLIP_8B_psz14_s9B.pt`` with EVA-CLIP's own keys, and the shards of the Hugging Face repository, whose remote code
is not run.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.layers import RmsNorm
from timm.models import eva, generate_default_cfgs, register_model
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {
        "eva_clip_8b_patch14_224.untrained": {
            "url": "",
            "num_classes": 1280,
            "input_size": (3, 224, 224),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.48145466, 0.4578275, 0.40821073),
            "std": (0.26862954, 0.26130258, 0.27577711),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)

TRANSFORMERS_KEY_PATTERNS = (
    (r"^vision_model\.encoder\.layers\.", "blocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^vision_model\.post_layernorm\.", "norm."),
    (r"^visual_projection\.", "head."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
)
"""Patterns of the Hugging Face release's keys and their timm names, applied in this order."""


class EvaCLIP8B(eva.Eva):
    """timm's Eva as a class of this module.

    Loaders look for :func:`checkpoint_filter_fn` in the module of the class.
    """


@register_model
def eva_clip_8b_patch14_224(pretrained: bool = False, **kwargs: Any) -> eva.Eva:
    """Build EVA-CLIP-8B's tower: 32 blocks of width 4096, hidden width 20480, RMS norms, no bias for q, k and v."""
    arguments: dict[str, Any] = {
        "img_size": 224,
        "patch_size": 14,
        "embed_dim": 4096,
        "depth": 32,
        "num_heads": 32,
        "mlp_ratio": 5,
        "qkv_bias": False,
        "global_pool": "token",
        "norm_layer": RmsNorm,
    }
    return eva.build_model_with_cfg(
        EvaCLIP8B,
        "eva_clip_8b_patch14_224",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**arguments, **kwargs},
    )


def checkpoint_filter_fn(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the keys of either release to timm's. The text tower is left out."""
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = _from_transformers(tensors)
    else:
        tensors = eva.checkpoint_filter_fn(tensors, model)
    if "head.weight" in tensors and "head.bias" not in tensors:  # timm's classifier has a bias
        tensors["head.bias"] = torch.zeros_like(tensors["head.weight"][:, 0])
    return tensors


def _from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(("vision_model.", "visual_projection.")) or name.endswith("position_ids"):
            continue
        for pattern, replacement in TRANSFORMERS_KEY_PATTERNS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if name.endswith(".attn.q_proj.weight")]:
        prefix = name.removesuffix("q_proj.weight")
        renamed[f"{prefix}qkv.weight"] = torch.cat([renamed.pop(f"{prefix}{part}_proj.weight") for part in "qkv"])
    renamed["cls_token"] = renamed["cls_token"].view(1, 1, -1)
    renamed["pos_embed"] = renamed["pos_embed"][None]
    return renamed
