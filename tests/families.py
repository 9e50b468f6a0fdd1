"""Small random encoders of every supported family, as directories written by the family's own library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import timm
import torch
import transformers
from conftest import redraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn

from dgmr_tp.data.scenes import CLASSNAMES, TEMPLATES
from dgmr_tp.encoders import OpenedModel

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "num_classes": 10,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
OPEN_CLIP = {
    "image_size": 32,
    "patch_size": 8,
    "width": 48,
    "layers": 2,
    "head_width": 16,
    "mlp_ratio": 4.3637,
    "ls_init_value": 0.1,
}
EVA = {"image_size": 32, "timm_pool": "token", "timm_proj": None}
COCA = {"attentional_pool": True, "attn_pooler_heads": 3, "output_tokens": True}


def in_timm(name: str, **options: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        module = redraw(timm.create_model(name, **options))
        timm.models.save_for_hf(module, directory, safe_serialization=True)

    return write


def in_open_clip(vision: dict, trunk: dict | None = None, **config: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        directory.mkdir()
        model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, **config}
        if trunk is not None:  # timm has no name for a small trunk, and open_clip accepts a local directory instead
            in_timm(vision["timm_model_name"], **trunk)(directory / "trunk")
            (directory / "trunk" / "model.safetensors").unlink()
            model_cfg["vision_cfg"] = {**vision, "timm_model_name": f"local-dir:{directory / 'trunk'}"}
        preprocess = {
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.25],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        }
        (directory / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
        )
        module = redraw(open_clip.create_model(f"local-dir:{directory}", load_weights=False))
        save_file(module.state_dict(), directory / "open_clip_model.safetensors")

    return write


def in_transformers(model: str, config: str, **options: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        module = redraw(getattr(transformers, model)(getattr(transformers, config)(**options)))
        module.save_pretrained(directory)
        size = {"height": 32, "width": 32}
        transformers.CLIPImageProcessor(
            size=size, crop_size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3
        ).save_pretrained(directory)

    return write


def with_words(write: Callable[[Path], None], length: int = 16) -> Callable[[Path], None]:
    """Add a tokenizer with the words of the generated scenes to a family's directory."""

    def write_both(directory: Path) -> None:
        write(directory)
        words = sorted({word for text in (*CLASSNAMES, *TEMPLATES) for word in text.replace("{c}", "").lower().split()})
        vocabulary = {word: number for number, word in enumerate(["[pad]", "[unk]", "[end]", *words])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[unk]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.normalizer = Lowercase()
        tokenizer.post_processor = TemplateProcessing(single="$A [end]", special_tokens=[("[end]", 2)])
        special = {"pad_token": "[pad]", "unk_token": "[unk]", "eos_token": "[end]", "model_max_length": length}
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)

    return write_both


WORDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def hf_clip(directory: Path) -> None:
    in_transformers("CLIPModel", "CLIPConfig", vision_config=VISION, text_config=WORDS, projection_dim=24)(directory)


def hf_siglip(directory: Path) -> None:
    in_transformers("SiglipModel", "SiglipConfig", vision_config=VISION, text_config={**WORDS, "projection_size": 48})(
        directory
    )


INTERN = {
    **VISION,
    "image_size": [32, 32],
    "patch_size": [8, 8],
    "norm_type": "rms_norm",
    "use_qk_norm": True,
    "use_mean_pooling": False,
}
FAMILIES: dict[str, Callable[[Path], None]] = {
    # The first five cover each form of MLP: plain, fused gate, split gate, split gate with a norm, hierarchical.
    "open_clip": in_open_clip(OPEN_CLIP),
    "timm DINOv2-g": in_timm("vit_giant_patch14_dinov2", **VIT),
    "transformers DINOv2 SwiGLU": in_transformers(
        "Dinov2Model",
        "Dinov2Config",
        **{**VISION, "mlp_ratio": 4, "use_swiglu_ffn": True, "reshape_hidden_states": False},
    ),
    "open_clip EVA02-L": in_open_clip(
        {"timm_model_name": "eva02_large_patch14_clip_224", **EVA}, trunk=VIT, custom_text=True
    ),
    "timm Swin": in_timm("swin_tiny_patch4_window7_224", **SWIN),
    "open_clip EVA02-E+": in_open_clip(
        {"timm_model_name": "eva02_enormous_patch14_clip_224", **EVA}, trunk=VIT, custom_text=True
    ),
    "open_clip SigLIP": in_open_clip(
        {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 32, "timm_pool": "map", "timm_proj": "none"},
        trunk=VIT,
        custom_text=True,
        embed_dim=48,
    ),
    "open_clip CoCa": in_open_clip(
        {**OPEN_CLIP, **COCA},
        text_cfg={**TEXT, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**TEXT, "attn_pooler_heads": 2, "mlp_ratio": 4},
        custom_text=True,
    ),
    "timm ViT": in_timm("vit_tiny_patch16_224", **VIT),
    "timm DINOv2 with registers": in_timm("vit_small_patch14_reg4_dinov2", **VIT),
    "timm DeiT": in_timm("deit_tiny_distilled_patch16_224", **VIT),
    "timm SigLIP": in_timm("vit_base_patch16_siglip_224", **VIT),
    "timm EVA-g": in_timm("eva_giant_patch14_clip_224", **VIT),
    "timm EVA02-B": in_timm("eva02_base_patch14_224", **VIT),
    "timm EVA02-S": in_timm("eva02_small_patch14_224", **VIT),
    "timm Perception Encoder": in_timm("vit_pe_core_base_patch16_224", **VIT),
    "timm DINOv3": in_timm("vit_small_patch16_dinov3", **VIT),
    "timm DINOv3 SwiGLU": in_timm("vit_small_plus_patch16_dinov3", **VIT),
    "timm AIMv2": in_timm("aimv2_large_patch14_224", **VIT),
    "timm SwinV2": in_timm("swinv2_tiny_window8_256", **SWIN),
    "transformers CLIPVisionModel": in_transformers("CLIPVisionModel", "CLIPVisionConfig", **VISION),
    "transformers CLIPModel": with_words(hf_clip),
    "transformers SiglipModel": with_words(hf_siglip),
    "transformers SigLIP": in_transformers("SiglipVisionModel", "SiglipVisionConfig", **VISION),
    "transformers DINOv2": in_transformers("Dinov2Model", "Dinov2Config", **{**VISION, "mlp_ratio": 4}),
    "transformers InternViT": in_transformers("InternVLVisionModel", "InternVLVisionConfig", **INTERN),
}
FORMS = list(FAMILIES)[:5]


def plain_output(tower: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the embedding by the tower's own forward, without its library's output class."""
    with torch.no_grad():
        out = tower(images)
    if isinstance(out, tuple):  # CoCa
        return out[0]
    if isinstance(out, torch.Tensor):
        return out
    return out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output


def plain_embedding(model: OpenedModel, images: torch.Tensor) -> torch.Tensor:
    """Return the embedding by the model's own library, projection included."""
    if hasattr(model.module, "get_image_features"):
        with torch.no_grad():
            return model.module.get_image_features(images).pooler_output
    return plain_output(model.tower, images)


def bf16_shards(directory: Path) -> None:
    """Write a timm directory in bf16 with two shards and an index, like large releases."""
    FAMILIES["timm EVA-g"](directory)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    write_shards(directory, tensors)


def write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write two shards and their index, ``model.safetensors.index.json``."""
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / shard)
    index = {"weight_map": {name: shard for shard, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
