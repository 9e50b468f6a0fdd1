"""InternViT as OpenGVLab released it (``InternVisionModel``, remote code that is never run) as transformers' InternVLVisionModel."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers import InternVLVisionConfig

RELEASED = "InternVisionModel"
SAME = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "norm_type",
    "num_channels",
)
NAMES = (
    (r"^(vision_model|vision_tower)\.", ""),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"class_embedding", "cls_token"),
    (r"position_embedding$", "position_embeddings"),
    (r"patch_embedding\.", "patch_embeddings.projection."),
    (r"\.ls(\d)$", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
)


def config_from_release(config: dict[str, Any]) -> InternVLVisionConfig:
    """transformers' configuration of a released one."""
    size, patch = config["image_size"], config["patch_size"]
    return InternVLVisionConfig(
        **{key: config[key] for key in SAME if key in config},
        image_size=[size, size],
        patch_size=[patch, patch],
        use_qk_norm=config.get("qk_normalization", False),
        attention_bias=config.get("qkv_bias", True),
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # in transformers: no norm after the last block, as in the release
    )


def tensors_from_release(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released tensors under transformers' names; the fused query, key and value are taken apart."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}_proj.")] = rows
        else:
            renamed[name] = tensor
    return renamed
