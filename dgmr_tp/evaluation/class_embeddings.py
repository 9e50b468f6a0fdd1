"""Class embeddings of a CLIP's text tower for zero-shot decisions, as clip_benchmark computes and stores them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.utils.lazy_imports import require

CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES = ["a photo of a {c}."]


def class_embeddings(model: OpenedModel, classes: Path) -> Tensor:
    """Return the class embeddings of a model's text tower, float32 ``[width, classes]`` on the CPU.

    Args:
        model: a CLIP.
        classes: a text file with one class name per line; a directory with ``classnames.txt``; or class embeddings that
            clip_benchmark saved (``.pt``), which need no text tower. Prompts such as ``a photo of a {c}`` are read from
            ``zeroshot_classification_templates.txt`` in the same directory, if it exists.

    Raises:
        DgmrError: the file cannot be read, it names fewer than two classes, or the model has no text tower.
    """
    if classes.suffix == ".pt":
        return read_class_embeddings(classes)
    if model.tokenizer is None or model.text is None:
        raise DgmrError(
            f"{model.name} has no text tower for the classes of {classes}. Use a CLIP, or saved class embeddings (.pt)."
        )
    names_path = classes / CLASSNAMES_FILE if classes.is_dir() else classes
    names, templates = _read_names(names_path, names_path.with_name(TEMPLATES_FILE))
    if len(names) < 2:
        raise DgmrError(f"{names_path} names {len(names)} classes. Give at least two, one per line.")
    metric = require("clip_benchmark.metrics.zeroshot_classification", "eval")
    device = next(model.text.parameters()).device.type
    model.module.eval()  # some text towers have dropout
    with contextlib.redirect_stderr(io.StringIO()):  # hide the progress bar
        embeddings = metric.zero_shot_classifier(model.text, model.tokenizer, names, templates, device, amp=False)
    return check_embeddings(embeddings, "the classes").float().cpu()


def read_class_embeddings(path: Path) -> Tensor:
    """Read class embeddings, float32 ``[width, classes]``, that clip_benchmark's ``--save_clf`` stored.

    Raises:
        DgmrError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True).float()
    except Exception as error:  # pickle and torch raise many kinds
        raise DgmrError(f"cannot read the class embeddings {path}: {first_line(error)}") from error


def _read_names(names_path: Path, templates_path: Path) -> tuple[list[str], list[str]]:
    """Return the class names and the prompt templates, or the default template."""
    try:
        names = [line.strip() for line in names_path.read_text("utf-8").splitlines() if line.strip()]
        lines = templates_path.read_text("utf-8").splitlines() if templates_path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DgmrError(f"cannot read the class names {names_path}: {first_line(error)}") from error
    return names, [line for line in lines if "{c}" in line] or DEFAULT_TEMPLATES
