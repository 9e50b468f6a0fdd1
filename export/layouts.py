"""Export a model with the names, folders and side files that another program expects.

- ``plain``: ``model.onnx`` (``image`` → ``embedding``) and ``text.onnx`` (``text`` → ``embedding``).
- ``huggingface``: the files that transformers.js and optimum load: ``onnx/vision_model.onnx`` (``pixel_values`` →
  ``image_embeds``), ``onnx/text_model.onnx`` (``input_ids`` → ``text_embeds``) and ``preprocessor_config.json``.
- ``immich``: the files that immich's machine-learning service loads (``immich_ml/models/clip``, as of November 2026):
  ``visual/model.onnx`` (``image`` → ``image_embedding``) and ``textual/model.onnx`` (``text``, int32 →
  ``text_embedding``), both normalized to length 1, ``visual/preprocess_cfg.json``, ``textual/tokenizer.json`` with
  ``tokenizer_config.json``, and ``config.json``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.encoders.model import is_model_name
from dgmr_tp.errors import DgmrError
from dgmr_tp.export.bundle import export_bundle
from dgmr_tp.export.export_tower import ExportTower
from dgmr_tp.export.formats import LAYOUTS
from dgmr_tp.export.towers import export_towers
from dgmr_tp.utils.files import write_json
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.modules import state_sha256

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers of the interpolations, which transformers uses too."""


def export_model(
    model: OpenedModel,
    images: Tensor,
    directory: Path,
    *,
    source: str,
    layout: str = "plain",
    outputs: Sequence[str] = ("embedding",),
    normalized: bool = False,
    text: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export the towers of a model in a layout, and verify the files.

    Args:
        model: the model, with its tokenizer and preprocessing.
        images: preprocessed images for the verification, ``[n, 3, size, size]``, n ≥ 2.
        directory: output directory.
        source: name of the model in ``export.json``.
        layout: name in :data:`~dgmr_tp.export.formats.LAYOUTS`.
        outputs, normalized, text: see :func:`~dgmr_tp.export.towers.export_towers`. ``immich`` always normalizes.
        options: arguments of :func:`~dgmr_tp.export.bundle.export_bundle`.

    Returns:
        The content of ``export.json``; see :func:`~dgmr_tp.export.bundle.export_bundle`.

    Raises:
        DgmrError: there are fewer than two images, the layout is unknown or does not fit the model, or as
            ``export_bundle``.
    """
    if len(images) < 2:
        raise DgmrError(
            f"the verification of a dynamic batch needs at least two images, got {len(images)}. Give more images."
        )
    if layout == "immich" and model.library != "open_clip":
        raise DgmrError(
            f"immich takes CLIP models of open_clip, and {model.name} is from {model.library}. Use another layout."
        )
    size = (images.shape[-2], images.shape[-1])
    processor = getattr(model.preprocess, "processor", None)
    processor_config = None
    if layout == "huggingface" and processor is None:
        processor_config = image_processor(model.preprocess_config, size)
    normalized = normalized or layout == "immich"
    if layout == "immich" and size[0] != size[1]:
        raise DgmrError(
            f"immich takes square images, and {model.name} takes {size[0]} × {size[1]} pixels. Use another layout."
        )
    towers = apply_layout(layout, export_towers(model, images, outputs=outputs, normalized=normalized, text=text))
    notes = _processor_notes(processor_config) if processor_config else []
    result = export_bundle(
        towers,
        directory,
        model=source,
        preprocess=model.preprocess_config,
        notes=notes,
        model_sha256=state_sha256(model.module),
        **options,
    )
    if processor_config is not None:
        _write_json(directory / "preprocessor_config.json", processor_config)
    elif layout == "huggingface":
        processor.save_pretrained(str(directory))
    if layout == "immich":
        preprocess = {**model.preprocess_config, "size": size[0]}
        _write_json(directory / "visual" / "preprocess_cfg.json", preprocess)
        _write_json(directory / "config.json", model.config)
        if text:
            _transformers_tokenizer(model).save_pretrained(str(directory / "textual"))
    return result


def recorded_source(source: str, model: OpenedModel, directory: Path) -> str:
    """Return how ``export.json`` names a model.

    Args:
        source: the source that was opened.
        model: the opened model.
        directory: the directory of ``export.json``.

    Returns:
        ``source`` if it is a name. Otherwise the path relative to ``directory``, which starts with a dot.
    """
    if model.source is None or is_model_name(source):
        return source
    relative = os.path.relpath(model.source.resolve(), directory.resolve())
    return relative if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)


def apply_layout(layout: str, towers: Sequence[ExportTower]) -> list[ExportTower]:
    """Return the towers with the names of a layout.

    Raises:
        DgmrError: the layout is unknown, or it is ``immich`` and a tower returns patches.
    """
    if layout not in LAYOUTS:
        raise DgmrError(f"unknown layout {layout!r}. Use {', '.join(LAYOUTS)}.")
    if layout == "immich" and any(tower.output_names != ("embedding",) for tower in towers):
        raise DgmrError("the layout immich has no patches output. Remove patches from the outputs.")
    renamed = []
    for tower in towers:
        names = LAYOUTS[layout].image if tower.kind == "image" else LAYOUTS[layout].text
        outputs = tuple(names.embedding if name == "embedding" else name for name in tower.output_names)
        examples = tower.examples.to(torch.int32) if layout == "immich" and tower.kind == "text" else tower.examples
        renamed.append(
            replace(tower, input_name=names.input, output_names=outputs, file_stem=names.file_stem, examples=examples)
        )
    return renamed


def image_processor(preprocess: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return a ``preprocessor_config.json`` that makes transformers' CLIPImageProcessor preprocess as the model does.

    Args:
        preprocess: the model's preprocessing (mean, std, interpolation, resize_mode or crop_mode, crop_pct).
        size: height and width of the preprocessed images.

    Raises:
        DgmrError: CLIPImageProcessor cannot do this preprocessing.
    """
    mode, crop = preprocess.get("resize_mode", preprocess.get("crop_mode", "center")), preprocess.get("crop_pct") or 1.0
    squash = mode == "squash"
    if mode not in ("shortest", "center", "squash") or (squash and crop != 1.0):
        raise DgmrError(
            f"transformers' CLIPImageProcessor cannot resize by {mode!r} with crop_pct {crop}. Use the layout plain."
        )
    interpolation = preprocess.get("interpolation", "bicubic")
    if interpolation not in RESAMPLE:
        raise DgmrError(
            f"transformers' CLIPImageProcessor has no interpolation {interpolation!r}. Use the layout plain."
        )
    height, width = size
    # CLIPImageProcessor keeps the aspect ratio only if the shorter edge is given. It has to be long enough for both.
    edge = math.floor(max(size) / crop)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": edge},
        "resample": RESAMPLE[interpolation],
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def _processor_notes(processor_config: dict[str, Any]) -> list[str]:
    """Return where a ``preprocessor_config.json`` of :func:`image_processor` differs from the model's preprocessing."""
    height, width = processor_config["crop_size"]["height"], processor_config["crop_size"]["width"]
    if height == width or not processor_config["do_center_crop"]:
        return []
    return [
        f"preprocessor_config.json crops {'portrait' if height > width else 'landscape'} images more than the model's "
        "own preprocessing, because CLIPImageProcessor resizes by the shorter edge. Other images are the same."
    ]


def _transformers_tokenizer(model: OpenedModel) -> Any:
    """Return the model's tokenizer as an object of transformers."""
    inner = getattr(model.tokenizer, "tokenizer", None)
    if hasattr(inner, "save_pretrained"):
        return inner
    # open_clip's SimpleTokenizer has the byte pairs of the first CLIP, which CLIPTokenizer accepts.
    simple: Any = model.tokenizer
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.get)
    end = "<|endoftext|>"
    vocabulary = {
        token.replace("<end_of_text>", end).replace("<start_of_text>", "<|startoftext|>"): i
        for token, i in simple.encoder.items()
    }
    return require("transformers", "encoders").CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=end)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
