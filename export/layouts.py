"""Names, folders and side files as other programs expect them.

``plain``: ``model.onnx`` (``image`` → ``embedding``) and ``text.onnx`` (``text`` → ``embedding``).
``huggingface``: what transformers.js and optimum look for: ``onnx/vision_model.onnx`` (``pixel_values`` → ``image_embeds``),
``onnx/text_model.onnx`` (``input_ids`` → ``text_embeds``) and ``preprocessor_config.json``.
``immich``: what immich's machine-learning service opens (``immich_ml/models/clip``, read in November 2026): ``visual/model.onnx``
(``image`` → ``image_embedding``), ``textual/model.onnx`` (``text``, int32 → ``text_embedding``), both of length 1,
``visual/preprocess_cfg.json``, ``textual/tokenizer.json`` with ``tokenizer_config.json``, and ``config.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.export.bundle import export_bundle
from dgmr_tp.export.export_tower import Part
from dgmr_tp.export.towers import parts_of
from dgmr_tp.utils.files import write_whole
from dgmr_tp.utils.lazy_imports import require

LAYOUTS = ("plain", "huggingface", "immich")
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which transformers uses."""


def export_model(
    model: OpenedModel,
    images: Tensor,
    directory: Path,
    *,
    source: str,
    layout: str = "plain",
    outputs: Sequence[str] = ("embedding",),
    normalised: bool = False,
    text: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export a model's towers in a layout.

    Args:
        model: the towers, the tokenizer and the preprocessing.
        images: preprocessed, for the proof, ``[n, 3, size, size]``.
        directory: where to.
        source: what ``export.json`` calls the model.
        layout: one of :data:`LAYOUTS`.
        outputs, normalised, text: see :func:`~dgmr_tp.export.towers.parts_of`.
        options: of :func:`~dgmr_tp.export.bundle.export_bundle`, which says what is returned and raised.
    """
    if len(images) < 2:
        raise DgmrError("a file that takes any number of images is proved on two or more; give more images")
    if layout == "immich" and model.library != "open_clip":
        raise DgmrError(
            f"immich takes CLIPs of open_clip's, {model.name} is one of {model.library}'s; use another layout"
        )
    processor = getattr(model.preprocess, "processor", None)
    described = (
        image_processor(model.preprocess_config, model.image_size)
        if layout == "huggingface" and processor is None
        else None
    )
    parts = lay_out(
        layout, parts_of(model, images, outputs=outputs, normalised=normalised or layout == "immich", text=text)
    )
    result = export_bundle(parts, directory, model=source, preprocess=model.preprocess_config, **options)
    if described is not None:
        _write(directory / "preprocessor_config.json", described)
    elif layout == "huggingface":
        processor.save_pretrained(str(directory))
    if layout == "immich":
        _write(directory / "visual" / "preprocess_cfg.json", {**model.preprocess_config, "size": model.image_size})
        _write(directory / "config.json", model.config)
        if text:
            _tokenizer(model).save_pretrained(str(directory / "textual"))
    return result


def lay_out(layout: str, parts: Sequence[Part]) -> list[Part]:
    """The parts with the names of a layout.

    Raises:
        DgmrError: unknown layout, or immich's with patches.
    """
    if layout not in LAYOUTS:
        raise DgmrError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if layout == "plain":
        return list(parts)
    if layout == "huggingface":
        names = {
            "image": ("pixel_values", "image_embeds", "onnx/vision_model"),
            "text": ("input_ids", "text_embeds", "onnx/text_model"),
        }
    else:
        names = {
            "image": ("image", "image_embedding", "visual/model"),
            "text": ("text", "text_embedding", "textual/model"),
        }
        if any(part.outputs != ("embedding",) for part in parts):
            raise DgmrError("immich takes embeddings and nothing else; leave out the patches")
    found = []
    for part in parts:
        given, embedding, file = names[part.tower]
        outputs = tuple(embedding if name == "embedding" else name for name in part.outputs)
        examples = part.examples.to(torch.int32) if layout == "immich" and part.tower == "text" else part.examples
        found.append(replace(part, input=given, outputs=outputs, file=file, examples=examples))
    return found


def image_processor(preprocess: dict[str, Any], size: int) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of transformers' CLIPImageProcessor that does what ``preprocess`` says.

    Raises:
        DgmrError: that processor cannot do it.
    """
    mode, crop = preprocess.get("resize_mode", preprocess.get("crop_mode", "center")), preprocess.get("crop_pct") or 1.0
    squash = mode == "squash"
    if mode not in ("shortest", "center", "squash") or (squash and crop != 1.0):
        raise DgmrError(
            f"transformers' CLIPImageProcessor cannot resize by {mode!r} with crop_pct {crop}; use the layout plain"
        )
    if preprocess.get("interpolation", "bicubic") not in RESAMPLE:
        raise DgmrError(
            f"transformers' CLIPImageProcessor has no interpolation {preprocess['interpolation']!r}; use the layout plain"
        )
    edge = math.floor(size / crop)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": edge},
        "resample": RESAMPLE[preprocess.get("interpolation", "bicubic")],
        "do_center_crop": not squash,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def _tokenizer(model: OpenedModel) -> Any:
    """The model's tokenizer as transformers keeps one."""
    inner = getattr(model.tokenizer, "tokenizer", None)
    if hasattr(inner, "save_pretrained"):
        return inner
    # open_clip's own: the byte pairs of the first CLIP, which transformers knows as well.
    simple: Any = model.tokenizer
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.get)
    end = "<|endoftext|>"
    vocabulary = {
        token.replace("<end_of_text>", end).replace("<start_of_text>", "<|startoftext|>"): i
        for token, i in simple.encoder.items()
    }
    return require("transformers", "encoders").CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=end)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
