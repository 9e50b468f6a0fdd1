"""timm: opening by name or directory, saving so that ``timm.create_model`` opens it again."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_config_for_hf
from torch import nn

from dgmr_tp.encoders.checkpoint import first_line, load_by_shape
from dgmr_tp.encoders.model import OpenedModel, nearest, read_json
from dgmr_tp.encoders.widths import said
from dgmr_tp.errors import DgmrError


def by_name(name: str, pretrained: str | None) -> OpenedModel:
    if not timm.is_model(name):
        raise DgmrError(f"unknown model timm:{name}{nearest(name, timm.list_models())}")
    checkpoint = pretrained if pretrained and Path(pretrained).exists() else ""
    try:
        tagged = f"{name}.{pretrained}" if pretrained and not checkpoint else name
        module = timm.create_model(tagged, pretrained=tagged != name)
        if checkpoint:
            timm.models.load_checkpoint(module, checkpoint, weights_only=True)
    except Exception as error:
        raise DgmrError(f"timm:{name}: cannot load pretrained {pretrained!r}: {first_line(error)}") from error
    return opened(module, f"timm:{name}")


def from_directory(directory: Path, name: str) -> OpenedModel:
    read_json(directory / "config.json")
    try:
        module = timm.create_model(f"local-dir:{directory.resolve()}", pretrained=False)
    except Exception as error:  # whatever a wrong config leads to inside timm
        raise DgmrError(f"{directory}/config.json describes no model: {first_line(error)}") from error
    load_by_shape(module, directory / "model.safetensors")
    return opened(module, name)


def opened(module: nn.Module, name: str) -> OpenedModel:
    config = resolve_data_config({}, model=module)
    return OpenedModel("timm", module, "", name, create_transform(**config), config)


def save(model: OpenedModel, directory: Path, final: Path) -> str | None:
    arguments = said_in_config(model.module)
    timm.models.save_for_hf(model.module, directory, model_args=arguments, safe_serialization=True)
    # without pretrained=True timm silently leaves the weights random
    return None if arguments is None else "timm.create_model('local-dir:{path}', pretrained=True)"


def said_in_config(module: nn.Module) -> dict[str, float] | None:
    """What a timm config has to say for its tower to have the hidden widths of ``module``; None if it cannot."""
    with TemporaryDirectory() as scratch:

        def build(arguments: dict[str, float]) -> nn.Module:
            save_config_for_hf(module, f"{scratch}/config.json", model_args=arguments)
            return timm.create_model(f"local-dir:{scratch}")

        return said(module, build)
