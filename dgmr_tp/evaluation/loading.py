"""Whatever can be evaluated: a model of any library, or an exported file with the model that it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.export.formats import SUFFIXES, open_exported
from dgmr_tp.pruning import ImageEncoder


@dataclass(frozen=True)
class Served:
    """An image encoder that answers, and what belongs to it."""

    model: OpenedModel
    """Preprocessing, tokenizer and text tower, on ``device``."""
    clip: nn.Module
    """With ``encode_image`` and, if there is a text tower, ``encode_text``."""
    embed: Callable[[Tensor], Tensor]
    """Images to embeddings, both on ``device``."""
    device: str


def is_file(source: str) -> bool:
    """Whether ``source`` names an exported file, not a model."""
    return Path(source).suffix in SUFFIXES


def open_served(
    source: str, pretrained: str | None = None, *, text: str | None = None, trusted: bool = False, device: str = "cpu"
) -> Served:
    """Open a model, or an exported file (which runs on the CPU, wherever the images are).

    Args:
        source: what :func:`dgmr_tp.open_model` takes, or a ``.onnx``, ``.pt`` or ``.pt2``.
        pretrained: the weights, if ``source`` is ``open_clip:NAME`` or ``timm:NAME``; or of the NAME that goes with a file.
        text: for a file: the model whose preprocessing and text tower go with it; by default the one that its ``export.json`` names.
        trusted: open files of code.
        device: where models run and images are.

    Raises:
        DgmrError: as :func:`dgmr_tp.open_model`; or a file of code that is not trusted, or whose model is not known.
    """
    from dgmr_tp.evaluation.zero_shot import as_clip

    exported = open_exported(Path(source), trusted=trusted) if is_file(source) else None
    name = (text or _origin(Path(source))) if exported else source
    model = open_model(name, pretrained if name.startswith(("open_clip:", "timm:")) else None)
    model.module.to(device).eval()
    return Served(model, as_clip(model, exported), exported or ImageEncoder(model.adapter), device)


def _origin(path: Path) -> str:
    """The model that a file was exported from, by the ``export.json`` of its bundle: beside it, or above it in some layouts."""
    for folder in (path.parent, path.parent.parent):
        try:
            named = json.loads((folder / "export.json").read_text())["model"]
        except (OSError, ValueError, KeyError):
            continue
        return str(folder / named) if (folder / named).is_dir() else named
    raise DgmrError(f"{path}: no export.json beside it says which model it came from; name that model with --text")
