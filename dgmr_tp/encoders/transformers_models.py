"""Open directories of transformers' models, and save them so that ``from_pretrained`` opens them again.

Imported by ``dgmr_tp.encoders.model`` for the library ``transformers``. Remote code is not run.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging

from dgmr_tp.encoders.checkpoint import Weights, build_device, checkpoint_dtype, load_by_shape, weights_file
from dgmr_tp.encoders.checkpoint_file import check_weights_file, read_tensors
from dgmr_tp.encoders.internvit import RELEASE_ARCHITECTURE, config_from_release, tensors_from_release
from dgmr_tp.encoders.model import TOKENIZER_FILE_PREFIXES, OpenedModel, has_adapter, read_json
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import Site, find_sites
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.pruning.sites import sites_inside

WEIGHTS_NAME = "model.safetensors"
TOWER_PATHS = ("", "vision_model", "vision_tower", "model.vision_tower")
"""Paths of the vision tower in models of transformers, tried in this order."""
MAX_SHARD_SIZE = "5GB"
MAX_MLP_RATIO = 8
"""Largest ``mlp_ratio`` that is tried as an expression of the hidden width."""


def from_directory(
    directory: Path, name: str, weights: Weights, hidden: Mapping[str, int] | None = None
) -> OpenedModel:
    """Open a model directory; see :func:`dgmr_tp.encoders.load_pruned`.

    ``hidden`` contains the tower's hidden widths by site name, for a config that cannot express them.
    """
    config = read_json(directory / "config.json")
    architecture = next(iter(config.get("architectures") or []), "")
    if architecture == RELEASE_ARCHITECTURE:
        try:
            with build_device(weights):
                module: nn.Module = transformers.InternVLVisionModel(config_from_release(config))
        except Exception as error:  # a missing key or an impossible value
            raise DgmrError(
                f"{directory}/config.json does not describe an InternViT: {first_line(error)}. "
                "Correct it, or fetch it again."
            ) from error
        dtype = torch.float32
        if weights != "none":
            path = weights_file(directory)
            dtype = load_by_shape(module, tensors_from_release(read_tensors(path)), path)
    elif weights == "none":
        module, dtype = _build_on_meta(directory, architecture, hidden or {}), torch.float32
    else:  # transformers maps the weights from disk, too
        module = _load_by_transformers(directory, architecture, hidden or {})
        dtype = checkpoint_dtype(module.state_dict())
    tower_path = _tower_path(module)
    if tower_path is None:
        raise DgmrError(
            f"{architecture} in {directory} holds no known vision tower. Use a CLIP, SigLIP, DINOv2 or InternViT."
        )
    processor = _processor(directory)
    has_tokenizer = any(file.name.startswith(TOKENIZER_FILE_PREFIXES) for file in directory.iterdir())
    tokenizer = None
    if has_tokenizer and hasattr(module, "get_text_features"):
        tokenizer = _Tokenizer(directory, module.config.text_config.max_position_embeddings)
    preprocess, config = _Preprocess(processor), _preprocess_config(processor)
    return OpenedModel(
        "transformers", module.eval(), tower_path, name, preprocess, config, tokenizer=tokenizer, dtype=dtype
    )


def _class(directory: Path, architecture: str) -> Any:
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise DgmrError(
            f"{directory}/config.json names the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} does not have. Remote code is never run: convert the checkpoint to a class of "
            "transformers."
        )
    return cls


def _build_on_meta(directory: Path, architecture: str, hidden: Mapping[str, int]) -> nn.Module:
    cls = _class(directory, architecture)
    try:
        with torch.device("meta"):
            module = _resized(cls, hidden)(
                transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            )
    except Exception as error:  # a wrong config fails with exceptions of many types
        raise DgmrError(
            f"{directory}/config.json does not describe a {architecture}: {first_line(error)}. "
            "Correct it, or fetch it again."
        ) from error
    module.__class__ = cls
    return module


def _load_by_transformers(directory: Path, architecture: str, hidden: Mapping[str, int]) -> nn.Module:
    cls = _class(directory, architecture)
    check_weights_file(weights_file(directory))
    try:
        with _no_progress_bar():
            module, loading = _resized(cls, hidden).from_pretrained(
                directory, local_files_only=True, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # a damaged file or a wrong config fails with many types
        raise DgmrError(f"cannot open {directory} as {architecture}: {first_line(error)}") from error
    module.__class__ = cls
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, loading[problem])):
            raise DgmrError(
                f"the weights in {directory} do not fit {architecture}: {problem.replace('_', ' ')}, first {keys[0]}. "
                "Check that they belong to this config."
            )
    return module


def _resized(cls: Any, hidden: Mapping[str, int]) -> Any:
    """Return a subclass of ``cls`` whose constructor narrows the tower to the widths ``hidden``, by site name.

    transformers' own loader can then load pruned weights.
    """

    def __init__(self: nn.Module, config: Any) -> None:
        cls.__init__(self, config)
        if hidden and (path := _tower_path(self)) is not None:
            resize(self.get_submodule(path), hidden)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _tower_path(module: nn.Module) -> str | None:
    """Return the path of the first vision tower in ``module`` that has an adapter, or None."""
    modules = dict(module.named_modules())
    return next((path for path in TOWER_PATHS if path in modules and has_adapter(modules[path])), None)


class _Preprocess:
    """Maps a PIL image to ``[3, height, width]`` with transformers' image processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class TextTower(nn.Module):
    """Text tower of a CLIP of transformers, with the method of open_clip's CLIPs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        embedding = self.module.get_text_features(tokens).pooler_output  # type: ignore[operator]
        return F.normalize(embedding, dim=-1) if normalize else embedding


class _Tokenizer:
    """Maps texts to token ids of the model's text length. The tokenizer is loaded at the first call."""

    def __init__(self, directory: Path, length: int) -> None:
        self.directory, self.length = directory, length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )["input_ids"]

    @cached_property
    def tokenizer(self) -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a damaged file, or a missing package
            raise DgmrError(f"{self.directory}: cannot load its tokenizer: {first_line(error)}") from error


def _processor(directory: Path) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise DgmrError(
            f"transformers cannot read the image processor (preprocessor_config.json) of {directory}: "
            f"{first_line(error)}"
        ) from error


def _preprocess_config(processor: Any) -> dict[str, Any]:
    crop_size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", True) else None
    size = dict(crop_size or processor.size)
    return {
        "size": [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))],
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }


def save_weights(model: OpenedModel, directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the weights ``tensors`` with transformers, which renames keys and makes shards."""
    with _no_progress_bar():
        model.module.save_pretrained(directory, state_dict=tensors, max_shard_size=MAX_SHARD_SIZE)
    # transformers writes the dtype of the module, and opens a model in the dtype of the config
    model.module.config.dtype = checkpoint_dtype(tensors)


def save_config(model: OpenedModel, directory: Path, final: Path, sites: Sequence[Site]) -> str | None:
    """Write the config and the image processor.

    Args:
        model: the model.
        directory: the staging directory.
        final: path of the finished directory.
        sites: all sites of ``model.module``.

    Returns:
        Python expression by which transformers opens ``{path}``, or None if the config cannot express the hidden
        widths.

    Raises:
        DgmrError: a site outside the vision tower was pruned.
    """
    expressible = _set_config_width(model.tower, sites_inside(sites, model.tower_path))
    _check_sites_outside_tower(model, sites)
    model.module.config.architectures = [type(model.module).__name__]
    model.module.config.save_pretrained(directory)
    model.preprocess.processor.save_pretrained(directory)  # type: ignore[attr-defined]
    name = type(model.module).__name__
    cls = "AutoModel" if name in MODEL_MAPPING_NAMES.values() else name
    return f"transformers.{cls}.from_pretrained('{{path}}')" if expressible else None


def _check_sites_outside_tower(model: OpenedModel, sites: Sequence[Site]) -> None:
    """Raise DgmrError if a site outside the vision tower was pruned. A model directory cannot express its width."""
    with torch.device("meta"):
        dense = type(model.module)(copy.deepcopy(model.module.config))
    inside = f"{model.tower_path}." if model.tower_path else ""
    dense_hidden = {site.name: site.hidden for site in find_sites(dense)}
    for site in sites:
        if not site.name.startswith(inside) and site.hidden != dense_hidden[site.name]:
            raise DgmrError(
                f"{site.name} is outside the vision tower and was pruned to {site.hidden}. For models of transformers, "
                "prune the vision tower only."
            )


def _set_config_width(tower: nn.Module, sites: Sequence[Site]) -> bool:
    """Set the tower's hidden width in its config. Returns False if the config cannot express it."""
    widths = [(site.name, site.hidden) for site in sites]
    [width, *other_widths] = {hidden for _, hidden in widths}
    if other_widths:
        return False
    ratios = [{"mlp_ratio": ratio} for ratio in range(1, MAX_MLP_RATIO + 1)]
    candidates: list[dict[str, int]] = [{}, {"intermediate_size": width}, *ratios]
    for candidate in candidates:
        config = copy.deepcopy(tower.config)
        if not all(hasattr(config, key) for key in candidate):
            continue
        for key, value in candidate.items():
            setattr(config, key, value)
        with torch.device("meta"):
            built = type(tower)(config)
        if [(site.name, site.hidden) for site in find_sites(built)] == widths:
            for key, value in candidate.items():
                setattr(tower.config, key, value)
            return True
    return False
