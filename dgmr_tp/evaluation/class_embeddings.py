"""Class embeddings of a CLIP's text tower for zero-shot decisions, as clip_benchmark computes and stores them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from dgmr_tp.data.labels import CLASSNAMES_FILE, TEMPLATES_FILE, read_class_names, read_prompts
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.utils.lazy_imports import require

DEFAULT_TEMPLATES = ["a photo of a {c}."]


def class_embeddings(model: OpenedModel, classes: Path) -> Tensor:
    """Return the class embeddings of a model's text tower, float32 ``[width, classes]`` on the CPU.

    Args:
        model: a CLIP.
        classes: a text file with one class name per line; a directory with ``classnames.txt``; or class embeddings that
            clip_benchmark saved (``.pt``), which need no text tower. Prompts such as ``a photo of a {c}`` are read from
            ``zeroshot_classification_templates.txt`` in the same directory, if it exists.

    Raises:
        DgmrError: the file cannot be read, it names fewer than two classes, a name is empty, a prompt is wrong, or the
            model has no text tower.
    """
    if classes.suffix == ".pt":
        return read_class_embeddings(classes)
    if model.tokenizer is None or model.text is None:
        raise DgmrError(
            f"{model.name} has no text tower for the classes of {classes}. Use a CLIP, or saved class embeddings (.pt)."
        )
    names_path = classes / CLASSNAMES_FILE if classes.is_dir() else classes
    names, templates_path = read_class_names(names_path, numbered=False), names_path.with_name(TEMPLATES_FILE)
    templates = read_prompts(templates_path) if templates_path.exists() else DEFAULT_TEMPLATES
    metric = require("clip_benchmark.metrics.zeroshot_classification", "eval")
    device = next(model.text.parameters()).device.type
    model.module.eval()  # some text towers have dropout
    with contextlib.redirect_stderr(io.StringIO()):  # hide the progress bar
        embeddings = metric.zero_shot_classifier(model.text, model.tokenizer, names, templates, device, amp=False)
    return check_embeddings(embeddings, "the classes").float().cpu()


def read_class_embeddings(path: Path) -> Tensor:
    """Read class embeddings, float32 ``[width, classes]``, that clip_benchmark's ``--save_clf`` stored.

    Raises:
        DgmrError: the file cannot be read, or has another content.
    """
    try:
        embeddings = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and torch raise many kinds
        raise DgmrError(
            f"cannot read the class embeddings {path}: {first_line(error)}. Give a file that --save-classifier wrote."
        ) from error
    is_matrix = isinstance(embeddings, Tensor) and embeddings.ndim == 2 and embeddings.shape[1] >= 2
    if not is_matrix or not embeddings.isfinite().all() or (embeddings == 0).all(0).any():
        shape = f"its shape is {list(embeddings.shape)}" if isinstance(embeddings, Tensor) else "it is not a tensor"
        raise DgmrError(
            f"{path} is not the class embeddings of two or more classes: {shape}, a number in it is not finite, or a "
            "class is all zeros. Give a file that --save-classifier wrote."
        )
    return embeddings.float()
