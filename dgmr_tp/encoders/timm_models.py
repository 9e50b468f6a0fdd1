"""Open timm models by name or directory, and save them so that ``timm.create_model`` opens them again.

Imported by ``dgmr_tp.encoders.model`` for the library ``timm``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from dgmr_tp.encoders import eva_clip_8b  # noqa: F401  (registers its name with timm)
from dgmr_tp.encoders.checkpoint import Weights, build_device, load_by_shape, read_tensors, weights_file
from dgmr_tp.encoders.hub import is_file_name, local_file
from dgmr_tp.encoders.model import OpenedModel, read_json, suggest_names
from dgmr_tp.encoders.widths import config_arguments_for
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import Site

WEIGHTS_NAME = "model.safetensors"


def by_name(name: str, pretrained: str | None, weights: Weights, image_size: int | None) -> OpenedModel:
    """Open ``timm:name``; see :func:`dgmr_tp.encoders.open_model`. ``pretrained`` None means random weights."""
    size = {} if image_size is None else {"img_size": image_size}
    if not timm.is_model(name):
        raise DgmrError(f"unknown model timm:{name}.{suggest_names(name, timm.list_models())}")
    tag = f".{pretrained}" if pretrained and not is_file_name(pretrained) else ""
    if tag and not timm.is_model_pretrained(f"{name}{tag}"):
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        raise DgmrError(f"timm:{name} has no weights {pretrained!r}. Its tags are: {', '.join(tags) or 'none'}.")
    if weights == "none" or (pretrained and is_file_name(pretrained)):
        with build_device(weights):
            module = timm.create_model(f"{name}{tag}", **size)
        if pretrained and weights != "none":
            tensors = to_timm_keys(read_tensors(local_file(pretrained)), module, pretrained)
            load_by_shape(module, tensors, pretrained)
            classifier = module.get_classifier()
            if isinstance(classifier, nn.Linear):  # a fine-tuned checkpoint may have another number of classes
                module.num_classes = classifier.out_features  # type: ignore[assignment]
        return _opened(module, f"timm:{name}", image_size)
    try:
        module = timm.create_model(f"{name}{tag}", pretrained=bool(tag), **size)
    except Exception as error:  # without network, timm raises exceptions of many types
        raise DgmrError(f"timm:{name}: cannot load pretrained {pretrained!r}: {first_line(error)}") from error
    return _opened(module, f"timm:{name}", image_size)


def to_timm_keys(tensors: dict[str, Tensor], module: nn.Module, source: str) -> dict[str, Tensor]:
    """Convert a published checkpoint to timm's keys with the ``checkpoint_filter_fn`` of the family.

    Args:
        tensors: tensors of the checkpoint by name.
        module: the timm model that they are for.
        source: name of the checkpoint in messages.

    Raises:
        DgmrError: the checkpoint belongs to another family.
    """
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        return convert(tensors, module)
    except Exception as error:  # a checkpoint of another family
        raise DgmrError(
            f"{source} does not have the layout of any release of {type(module).__name__}: {first_line(error)}"
        ) from error


def from_directory(directory: Path, name: str, weights: Weights) -> OpenedModel:
    """Open a model directory; see :func:`dgmr_tp.encoders.load_pruned`."""
    read_json(directory / "config.json")
    try:
        with build_device(weights):
            module = timm.create_model(f"local-dir:{directory.resolve()}", pretrained=False)
    except Exception as error:  # a wrong config fails inside timm with exceptions of many types
        raise DgmrError(f"{directory}/config.json does not describe a timm model: {first_line(error)}") from error
    if weights != "none":
        path = weights_file(directory)
        load_by_shape(module, read_tensors(path), path)
    return _opened(module, name)


def _opened(module: nn.Module, name: str, image_size: int | None = None) -> OpenedModel:
    config = resolve_data_config({} if image_size is None else {"img_size": image_size}, model=module)
    return OpenedModel("timm", module, "", name, create_transform(**config), config)


def save_config(model: OpenedModel, directory: Path, final: Path, sites: Sequence[Site]) -> str | None:
    """Write the config.

    Args:
        model: the model.
        directory: the staging directory.
        final: path of the finished directory.
        sites: all sites of ``model.module``.

    Returns:
        Python expression by which timm opens ``{path}``, or None if the config cannot express the hidden widths.
    """
    arguments = config_arguments(model.module, sites)
    data = {
        key: model.preprocess_config[key]
        for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    }
    save_config_for_hf(model.module, directory / "config.json", model_args=arguments, data_config=data)
    # without pretrained=True timm leaves the weights random
    return None if arguments is None else "timm.create_model('local-dir:{path}', pretrained=True)"


def config_arguments(module: nn.Module, sites: Sequence[Site]) -> dict[str, float] | None:
    """Return the ``model_args`` of a timm config for a model with these widths, or None if timm cannot express them.

    Args:
        module: a timm model.
        sites: all its sites.
    """
    if not type(module).__module__.startswith("timm."):  # registered by this package, unknown to stock timm
        return None
    with TemporaryDirectory() as scratch:

        def build(arguments: dict[str, float]) -> nn.Module:
            save_config_for_hf(module, f"{scratch}/config.json", model_args=arguments)
            return timm.create_model(f"local-dir:{scratch}")

        return config_arguments_for(sites, build)
