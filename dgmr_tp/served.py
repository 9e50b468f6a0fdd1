"""Whatever can be evaluated: a model of any library, or an exported file with the model that it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Tower

ENDINGS = (".onnx", ".pt", ".pt2")


@dataclass(frozen=True)
class Served:
    """An image encoder that answers, and what belongs to it."""

    name: str
    model: OpenedModel
    """Preprocessing, tokenizer and text tower."""
    clip: nn.Module
    """With ``encode_image`` and, if there is a text tower, ``encode_text``."""
    embed: Callable[[Tensor], Tensor]
    device: str
    """Where images must be: exported files run on the CPU."""


def open_served(
    source: str, pretrained: str | None = None, *, text: str | None = None, trusted: bool = False, device: str = "cpu"
) -> Served:
    """Open a model, or an exported file.

    Args:
        source: what :func:`dgmr_tp.open_model` takes, or a ``.onnx``, ``.pt`` or ``.pt2``.
        pretrained: the weights of a NAME.
        text: for a file: the model whose preprocessing and text tower go with it; by default the one that the ``export.json`` beside
            it names.
        trusted: open files of code wherever they come from; otherwise only those of a run directory whose manifest has their SHA-256.
        device: where a model runs.

    Raises:
        DgmrError: as :func:`dgmr_tp.open_model`; or a file of code that is not trusted, or whose model is not known.
    """
    path = Path(source)
    if path.suffix not in ENDINGS:
        model = open_model(source, pretrained)
        return Served(path.name, model, model.module.to(device).eval(), Tower(model.encoder), device)
    from dgmr_tp.evaluation.zero_shot import CLIPWithEncoder
    from dgmr_tp.export.formats import open_exported

    embed = open_exported(path, trusted=trusted or _in_manifest(path))
    model = open_model(text or _origin(path), pretrained)
    return Served(path.name, model, CLIPWithEncoder(model.module.eval(), embed), embed, "cpu")


def _origin(path: Path) -> str:
    """The model that a file was exported from, by the ``export.json`` beside it."""
    beside = path.parent / "export.json"
    try:
        named = json.loads(beside.read_text())["model"]
    except (OSError, ValueError, KeyError) as error:
        raise DgmrError(f"{path}: no {beside.name} beside it says which model it came from; name that model with --text") from error
    return str(path.parent / named) if (path.parent / named).is_dir() else named


def _in_manifest(path: Path) -> str | bool:
    """The SHA-256 that the run directory around a file has for it."""
    try:
        figures = json.loads((path.parent / "manifest.json").read_text())["figures"]
        known = [entry["sha256"].get(path.name) for tower in figures["towers"].values() for entry in tower["files"].values()]
    except (OSError, ValueError, KeyError):
        return False
    return next((digest for digest in known if digest), False)
