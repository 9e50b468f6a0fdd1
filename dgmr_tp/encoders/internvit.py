"""Convert OpenGVLab's InternViT release (``InternVisionModel``) to transformers' ``InternVLVisionModel``.

Works on the release's config and tensors. Its remote code is not run.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers import InternVLVisionConfig

RELEASE_ARCHITECTURE = "InternVisionModel"
"""Architecture in the config of the release."""
SHARED_CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "norm_type",
    "num_channels",
)
"""Config keys that the release and transformers have in common."""
KEY_PATTERNS = (
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
"""Patterns of the release's keys and their names in transformers, applied in this order."""


def config_from_release(config: dict[str, Any]) -> InternVLVisionConfig:
    """Convert the release's config."""
    size, patch = config["image_size"], config["patch_size"]
    return InternVLVisionConfig(
        **{key: config[key] for key in SHARED_CONFIG_KEYS if key in config},
        image_size=[size, size],
        patch_size=[patch, patch],
        use_qk_norm=config.get("qk_normalization", False),
        attention_bias=config.get("qkv_bias", True),
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # removes transformers' norm after the last block, which the release does not have
    )


def tensors_from_release(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the release's tensors: rename them, and split the fused query, key and value."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in KEY_PATTERNS:
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}_proj.")] = rows
        else:
            renamed[name] = tensor
    return renamed
