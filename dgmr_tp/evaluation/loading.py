"""Load what can be evaluated: a model of any library, or an exported file together with the model that it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel, is_library_name, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.evaluation.zero_shot import as_clip
from dgmr_tp.export.bundle import MANIFEST
from dgmr_tp.export.formats import is_exported_file, open_exported
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.files import read_json


@dataclass(frozen=True)
class LoadedEncoder:
    """An image encoder that is ready to run, with its preprocessing, tokenizer and text tower."""

    model: OpenedModel
    """The model, on ``device``. For an exported file, the model that it came from."""
    clip: nn.Module
    """Module with ``encode_image`` and, if the model has a text tower, ``encode_text``."""
    embed: Callable[[Tensor], Tensor]
    """Maps images to embeddings, both on ``device``."""
    device: str


def load_encoder(
    source: str, pretrained: str | None = None, *, text: str | None = None, trusted: bool = False, device: str = "cpu"
) -> LoadedEncoder:
    """Load a model or an exported file. A file runs on the CPU, and its images and embeddings are on ``device``.

    Args:
        source: a source of :func:`dgmr_tp.open_model`, or an exported ``.onnx``, ``.pt`` or ``.pt2`` file.
        pretrained: weights if ``source`` (or, for a file, ``text``) is ``open_clip:NAME`` or ``timm:NAME``.
        text: for a file, the model with its preprocessing and text tower. Default: the model in the file's
            ``export.json``.
        trusted: open exported files that contain code.
        device: device of the model and of the images.

    Raises:
        DgmrError: as :func:`dgmr_tp.open_model` and :func:`~dgmr_tp.export.formats.open_exported`, or the model of a
            file is not known.
    """
    exported = open_exported(Path(source), trusted=trusted) if is_exported_file(source) else None
    name = (text or _model_of_file(Path(source))) if exported else source
    model = open_model(name, pretrained if is_library_name(name) else None)
    model.module.to(device).eval()
    return LoadedEncoder(model, as_clip(model, exported), exported or ImageEncoder(model.adapter), device)


def _model_of_file(path: Path) -> str:
    """Return the model that a file was exported from, as its ``export.json`` states it.

    ``export.json`` is in the file's directory or, in some layouts, one level above.
    """
    for folder in (path.parent, path.parent.parent):
        if not (folder / MANIFEST).exists():
            continue
        model = read_json(
            folder / MANIFEST, lambda content: str(content["model"]), remedy="Name the model with --text."
        )
        return str(folder / model) if (folder / model).is_dir() else model
    raise DgmrError(f"{path} has no {MANIFEST} next to it that names its model. Name the model with --text.")
