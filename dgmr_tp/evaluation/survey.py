"""The compatibility of two encoders on a person's own images: what :mod:`~dgmr_tp.evaluation.compatibility` compares, and how it looks."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgmr_tp.data.embeddings import Progress, embedded_share
from dgmr_tp.data.images import Images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.evaluation.compatibility import Limits, compatibility
from dgmr_tp.extras import require

THUMBNAIL = 112
"""Pixels of the longer side."""
PROMPTS = "zeroshot_classification_templates.txt"


class Side(NamedTuple):
    """One of the two encoders."""

    embed: Callable[[Tensor], Tensor]
    """Preprocessed images to embeddings."""
    preprocess: Callable[[Any], Tensor]
    """A PIL image to a tensor."""


def survey(
    old: Side,
    new: Side,
    images: str | Path,
    *,
    classifier: Tensor | None = None,
    count: int = 5000,
    queries: int = 1000,
    limits: Limits | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    progress: Progress = lambda title, done, total: None,
) -> dict[str, Any]:
    """Embed the same images by both encoders and compare.

    Args:
        old: the encoder of the index; new: the one that is to be served.
        images: a folder, a tar or shards of images like those in the index.
        classifier: class embeddings, see :func:`text_classifier`; None: decisions are not compared.
        count: how many of the images, drawn by ``seed``.
        queries, limits: see :func:`~dgmr_tp.evaluation.compatibility.compatibility`.
        device, workers: where images are embedded and how many processes read them.
        progress: called with a title, images done and images in all.

    Returns:
        What ``compatibility`` returns; the ``worst`` images have their ``name`` and a ``thumbnail``, a data URI. ``left_out`` is the number
        of images that do not decode.

    Raises:
        DgmrError: no images, or as ``compatibility``.
    """
    found = Images.find(images)
    if len(found) > count:
        found, _ = found.divided(count, seed)
    how: dict[str, Any] = {"device": device, "workers": workers, "progress": progress}
    before, places = embedded_share(*old, found, title="old embeddings", **how)
    after, _ = embedded_share(*new, found, title="new embeddings", **how)
    result = compatibility(before.cpu(), after.cpu(), classifier=classifier, queries=queries, limits=limits, seed=seed)
    result["left_out"] = len(found.broken)
    for worst in result["worst"]:
        record = found.records[int(places[worst.pop("row")])]
        worst |= {"name": record.name, "thumbnail": _thumbnail(record.read())}
    return result


def text_classifier(model: OpenedModel, classes: Path) -> Tensor:
    """Class embeddings ``[width, classes]`` of a model's text tower, as clip_benchmark makes them.

    Args:
        model: a CLIP.
        classes: a text file with a class name a line; a folder with ``classnames.txt`` and, if there are prompts,
            ``zeroshot_classification_templates.txt`` (``a photo of a {c}``); or class embeddings that clip_benchmark saved (``.pt``).

    Raises:
        DgmrError: the file cannot be read, or the model has no text tower.
    """
    if classes.suffix == ".pt":
        return saved_classifier(classes)
    tower = model.text
    if model.tokenizer is None or tower is None:
        raise DgmrError(f"{model.name} has no text tower for the classes of {classes}")
    names, prompts = (classes / "classnames.txt", classes / PROMPTS) if classes.is_dir() else (classes, classes.with_name(PROMPTS))
    try:
        lines = [line.strip() for line in names.read_text("utf-8").splitlines() if line.strip()]
        templates = [line for line in prompts.read_text("utf-8").splitlines() if "{c}" in line] if prompts.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DgmrError(f"cannot read the class names {names}: {first_line(error)}") from error
    if len(lines) < 2:
        raise DgmrError(f"{names} names {len(lines)} classes; decisions need at least two, one a line")
    metric = require("clip_benchmark.metrics.zeroshot_classification", "eval")
    device = next(tower.parameters()).device.type
    model.module.eval()  # text towers with dropout
    prompts_or_one = templates or ["a photo of a {c}."]
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return metric.zero_shot_classifier(tower, model.tokenizer, lines, prompts_or_one, device, amp=False).float().cpu()


def saved_classifier(path: Path) -> Tensor:
    """Class embeddings ``[width, classes]`` as clip_benchmark's ``--save_clf`` keeps them."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True).float()
    except Exception as error:  # pickle and torch raise many kinds
        raise DgmrError(f"cannot read the class embeddings {path}: {first_line(error)}") from error


def _thumbnail(image: Any) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
