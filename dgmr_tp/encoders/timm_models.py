"""timm: opening by name or directory, saving so that ``timm.create_model`` opens it again."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from dgmr_tp.encoders import eva_clip_8b  # noqa: F401  (registers its name with timm)
from dgmr_tp.encoders.checkpoint import Weights, empty, load_by_shape, read_tensors, weights_file
from dgmr_tp.encoders.hub import is_file_name, local_file
from dgmr_tp.encoders.model import OpenedModel, nearest, read_json
from dgmr_tp.encoders.widths import said
from dgmr_tp.errors import DgmrError, first_line

WEIGHTS = "model.safetensors"


def by_name(name: str, pretrained: str | None, weights: Weights, image_size: int | None) -> OpenedModel:
    size = {} if image_size is None else {"img_size": image_size}
    if not timm.is_model(name):
        raise DgmrError(f"unknown model timm:{name}{nearest(name, timm.list_models())}")
    tag = f".{pretrained}" if pretrained and not is_file_name(pretrained) else ""
    if tag and not timm.is_model_pretrained(f"{name}{tag}"):
        known = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        raise DgmrError(f"timm:{name} has no weights {pretrained!r}; there are: {', '.join(known) or 'none'}")
    if weights == "none" or (pretrained and is_file_name(pretrained)):
        with empty(weights):
            module = timm.create_model(f"{name}{tag}", **size)
        if pretrained and weights != "none":
            load_by_shape(module, in_timms_names(read_tensors(local_file(pretrained)), module, pretrained), pretrained)
            classifier = module.get_classifier()
            if isinstance(classifier, nn.Linear):  # a fine-tuned checkpoint has classes of its own
                module.num_classes = classifier.out_features  # type: ignore[assignment]
        return opened(module, f"timm:{name}", image_size)
    try:
        module = timm.create_model(f"{name}{tag}", pretrained=bool(tag), **size)
    except Exception as error:  # no network: timm raises many kinds
        raise DgmrError(f"timm:{name}: cannot load pretrained {pretrained!r}: {first_line(error)}") from error
    return opened(module, f"timm:{name}", image_size)


def in_timms_names(tensors: dict[str, Tensor], module: nn.Module, source: str) -> dict[str, Tensor]:
    """A published checkpoint under timm's own keys, by the filter that timm keeps beside each family."""
    translate = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return tensors
    try:
        return translate(tensors, module)
    except Exception as error:  # a checkpoint of another family
        raise DgmrError(
            f"{source} is not laid out like any release of {type(module).__name__}: {first_line(error)}"
        ) from error


def from_directory(directory: Path, name: str, weights: Weights) -> OpenedModel:
    read_json(directory / "config.json")
    try:
        with empty(weights):
            module = timm.create_model(f"local-dir:{directory.resolve()}", pretrained=False)
    except Exception as error:  # whatever a wrong config leads to inside timm
        raise DgmrError(f"{directory}/config.json describes no model: {first_line(error)}") from error
    if weights != "none":
        path = weights_file(directory)
        load_by_shape(module, read_tensors(path), path)
    return opened(module, name)


def opened(module: nn.Module, name: str, image_size: int | None = None) -> OpenedModel:
    config = resolve_data_config({} if image_size is None else {"img_size": image_size}, model=module)
    return OpenedModel("timm", module, "", name, create_transform(**config), config)


def save_config(model: OpenedModel, directory: Path, final: Path) -> str | None:
    arguments = said_in_config(model.module)
    data = {
        key: model.preprocess_config[key]
        for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    }
    save_config_for_hf(model.module, directory / "config.json", model_args=arguments, data_config=data)
    # without pretrained=True timm silently leaves the weights random
    return None if arguments is None else "timm.create_model('local-dir:{path}', pretrained=True)"


def said_in_config(module: nn.Module) -> dict[str, float] | None:
    """What a timm config has to say for its tower to have the hidden widths of ``module``; None if it cannot."""
    if not type(module).__module__.startswith("timm."):  # a name that this package registered
        return None
    with TemporaryDirectory() as scratch:

        def build(arguments: dict[str, float]) -> nn.Module:
            save_config_for_hf(module, f"{scratch}/config.json", model_args=arguments)
            return timm.create_model(f"local-dir:{scratch}")

        return said(module, build)
