"""Load what can be evaluated: a model of any library, or an exported file together with the model that it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel, is_library_name, open_model
from dgmr_tp.encoders.model import is_model_name
from dgmr_tp.errors import DgmrError
from dgmr_tp.evaluation.zero_shot import as_clip
from dgmr_tp.export.bundle import MANIFEST
from dgmr_tp.export.formats import is_exported_file, open_exported
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.compute import ComputeConfig
from dgmr_tp.utils.files import read_json, sha256
from dgmr_tp.utils.modules import state_sha256


@dataclass(frozen=True)
class LoadedEncoder:
    """An image encoder that is ready to run, with its preprocessing, tokenizer and text tower."""

    model: OpenedModel
    """The model, on ``device``. For an exported file, the model that it came from."""
    clip: nn.Module
    """Module with ``encode_image`` and, if the model has a text tower, ``encode_text``."""
    embed: Callable[[Tensor], Tensor]
    """Maps images to embeddings, both on ``device``."""
    device: torch.device


def load_encoder(
    source: str,
    pretrained: str | None = None,
    *,
    text: str | None = None,
    trusted: bool = False,
    compute: ComputeConfig | None = None,
) -> LoadedEncoder:
    """Load a model or an exported file. A file runs on the CPU, and its images and embeddings are on ``device``.

    Args:
        source: a source of :func:`dgmr_tp.open_model`, or an exported ``.onnx``, ``.pt`` or ``.pt2`` file.
        pretrained: weights if ``source`` (or, for a file, ``text``) is ``open_clip:NAME`` or ``timm:NAME``.
        text: for a file, the model with its preprocessing and text tower. Default: the model in the file's
            ``export.json``.
        trusted: open exported files that contain code.
        compute: device of the model and of the images, and precision of the forward passes. Default: float32 on the
            CPU.

    Raises:
        DgmrError: as :func:`dgmr_tp.open_model` and :func:`~dgmr_tp.export.formats.open_exported`, or the model of a
            file is not known, does not exist, or has other weights than at the export.
    """
    exported = open_exported(Path(source), trusted=trusted) if is_exported_file(source) else None
    origin = _origin_of_file(Path(source)) if exported and text is None else None
    name = origin.model if origin else text or source
    model = open_model(name, pretrained if is_library_name(name) else None)
    if origin and origin.sha256 not in (None, state_sha256(model.module)):
        remedy = "Name its weights with --pretrained" if is_library_name(name) else "Name that model with --text"
        raise DgmrError(f"{name} has other weights than the model that {source} was exported from. {remedy}.")
    model = model.with_compute(compute or ComputeConfig(device="cpu", dtype="float32"))
    device = model.device
    model.module.to(device).eval()
    return LoadedEncoder(model, as_clip(model, exported), exported or ImageEncoder(model.adapter), device)


@dataclass(frozen=True)
class _Origin:
    """The model that a file was exported from, as its ``export.json`` states it."""

    model: str
    """A source of :func:`dgmr_tp.open_model`."""
    sha256: str | None
    """:func:`~dgmr_tp.utils.modules.state_sha256` of the model. Files of older versions have none."""


def _origin_of_file(path: Path) -> _Origin:
    """Find the origin of a file in the ``export.json`` in its directory or, in some layouts, one level above.

    The file is recognized by its SHA-256.

    Raises:
        DgmrError: no ``export.json`` describes this file, or the path of its model does not exist.
    """
    digest = sha256(path)
    for folder in (path.resolve().parent, path.resolve().parent.parent):
        if not (folder / MANIFEST).exists():
            continue
        model, model_sha256, digests = read_json(
            folder / MANIFEST,
            lambda bundle: (
                str(bundle["model"]),
                bundle.get("model_sha256"),
                [entry["sha256"].values() for tower in bundle["towers"].values() for entry in tower["files"].values()],
            ),
            remedy="Export again, or name the model with --text.",
        )
        if not any(digest in values for values in digests):
            continue
        directory = (folder / model).resolve()
        if is_model_name(model):
            return _Origin(model, model_sha256)
        if not directory.is_dir():
            raise DgmrError(
                f"{path} was exported from {model}, and {directory} does not exist. Restore it, or name the model "
                "with --text."
            )
        return _Origin(str(directory), model_sha256)
    raise DgmrError(f"{path} has no {MANIFEST} next to it that describes it. Name the model with --text.")
