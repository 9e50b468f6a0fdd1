"""Open timm models by name or directory, and save them so that ``timm.create_model`` opens them again.

Imported by ``dgmr_tp.encoders.model`` for the library ``timm``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

from dgmr_tp.encoders import eva_clip_8b  # noqa: F401  (registers its name with timm)
from dgmr_tp.encoders.checkpoint import Weights, build_device, load_by_shape, weights_file
from dgmr_tp.encoders.checkpoint_file import read_tensors
from dgmr_tp.encoders.hub import is_file_name, local_file
from dgmr_tp.encoders.model import OpenedModel, read_json, suggest_names
from dgmr_tp.encoders.widths import config_arguments_for
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import Site

logger = logging.getLogger(__name__)
WEIGHTS_NAME = "model.safetensors"


def by_name(name: str, pretrained: str | None, weights: Weights, image_size: int | None) -> OpenedModel:
    """Open ``timm:name``; see :func:`dgmr_tp.encoders.open_model`. ``pretrained`` None means random weights.

    A tag in the name gives the preprocessing of weights from a file.
    """
    size = {} if image_size is None else {"img_size": image_size}
    if not timm.is_model(name):
        raise DgmrError(f"unknown model timm:{name}.{suggest_names(name, timm.list_models())}")
    architecture, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    is_file = pretrained is not None and pretrained not in tags and is_file_name(pretrained)
    if pretrained and not is_file:
        if tag:
            raise DgmrError(f"timm:{name} names a tag, and {pretrained!r} is another one. Give one of them.")
        tag = pretrained
    if tag and tag not in tags:
        raise DgmrError(f"timm:{architecture} has no weights {tag!r}. Its tags are: {', '.join(tags) or 'none'}.")
    full_name = f"{architecture}.{tag}" if tag else architecture
    if is_file or weights == "none":
        with build_device(weights):
            module = timm.create_model(full_name, **size)
        dtype = torch.float32
        if is_file and weights != "none":
            dtype = _load_file(module, str(pretrained))
            if not tag:
                _report_preprocessing(architecture, tags)
        return _opened(module, f"timm:{name}", dtype, image_size)
    try:
        module = timm.create_model(full_name, pretrained=pretrained is not None, **size)
    except Exception as error:  # without network, timm raises exceptions of many types
        raise DgmrError(f"timm:{name}: cannot load pretrained {tag!r}: {first_line(error)}") from error
    return _opened(module, f"timm:{name}", torch.float32, image_size)


def _report_preprocessing(architecture: str, tags: Sequence[str]) -> None:
    """Log which preprocessing weights from a file get, if the architecture has been trained with several."""
    configs = [timm.get_pretrained_cfg(f"{architecture}.{tag}") for tag in tags]
    if len({(config.mean, config.std) for config in configs}) > 1:
        used = timm.get_pretrained_cfg(architecture)
        logger.warning(
            "the weights of timm:%s differ in their preprocessing, and a file does not say its own. Used: mean %s, std "
            "%s. For another one name its tag: timm:%s.TAG.",
            architecture,
            used.mean,
            used.std,
            architecture,
        )


def _load_file(module: nn.Module, file: str) -> torch.dtype:
    """Load a published checkpoint, whatever head it has, and whether it has one or not. Returns its dtype."""
    tensors = to_timm_keys(read_tensors(local_file(file)), module, file)
    head = [name for name, layer in module.named_modules() if layer is module.get_classifier() and name]
    if head and not any(name.startswith(f"{head[0]}.") for name in tensors):
        logger.info("%s: has no head, so the model has none", file)
        module.reset_classifier(0)
    dtype = load_by_shape(module, tensors, file)
    classifier = module.get_classifier()
    if isinstance(classifier, nn.Linear):  # a fine-tuned checkpoint may have another number of classes
        module.num_classes = classifier.out_features  # type: ignore[assignment]
    return dtype


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
        raise DgmrError(
            f"{directory}/config.json does not describe a timm model: {first_line(error)}. "
            "Correct it, or fetch it again."
        ) from error
    dtype = torch.float32
    if weights != "none":
        path = weights_file(directory)
        dtype = load_by_shape(module, read_tensors(path), path)
    return _opened(module, name, dtype)


def _opened(module: nn.Module, name: str, dtype: torch.dtype, image_size: int | None = None) -> OpenedModel:
    try:
        config = resolve_data_config({} if image_size is None else {"img_size": image_size}, model=module)
        transform = create_transform(**config)
        if config["input_size"][0] == 1:
            transform = Compose([Grayscale(), transform])
    except Exception as error:  # a value that torchvision does not take
        raise DgmrError(
            f"{name}: its pretrained_cfg does not describe a preprocessing: {first_line(error)}. Correct config.json."
        ) from error
    return OpenedModel("timm", module, "", name, transform, config, dtype=dtype)


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
