"""transformers: opening a directory as ``from_pretrained`` does, saving so that it opens it again. Never remote code."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging

from dgmr_tp.encoders.checkpoint import Weights, empty, load_by_shape, read_tensors, weights_file
from dgmr_tp.encoders.internvit import RELEASED, config_from_release, tensors_from_release
from dgmr_tp.encoders.model import TEXT_FILES, OpenedModel, has_adapter, read_json
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import find_sites
from dgmr_tp.pruning.pruner import resize

WEIGHTS = "model.safetensors"
TOWERS = ("", "vision_model", "vision_tower", "model.vision_tower")
"""Where the vision tower stands in transformers' models."""


def from_directory(
    directory: Path, name: str, weights: Weights, hidden: Mapping[str, int] | None = None
) -> OpenedModel:
    """``hidden`` is the hidden width of each site of the tower, where its config cannot say it."""
    config = read_json(directory / "config.json")
    architecture = next(iter(config.get("architectures") or []), "")
    if architecture == RELEASED:
        try:
            with empty(weights):
                module: nn.Module = transformers.InternVLVisionModel(config_from_release(config))
        except Exception as error:  # a key that is missing, or a value that is impossible
            raise DgmrError(f"{directory}/config.json describes no InternViT: {first_line(error)}") from error
        if weights != "none":
            path = weights_file(directory)
            load_by_shape(module, tensors_from_release(read_tensors(path)), path)
    elif weights != "memory":
        module = _on_meta(directory, architecture, hidden or {})
        if weights == "disk":  # for checkpoints that stand there under the names that the class has in memory
            path = weights_file(directory)
            load_by_shape(module, read_tensors(path), path)
    else:
        module = _by_transformers(directory, architecture, hidden or {})
    where = _where(module)
    if where is None:
        raise DgmrError(f"{architecture} in {directory} holds no vision tower that is known")
    processor = _processor(directory)
    speaks = hasattr(module, "get_text_features") and any(
        file.name.startswith(TEXT_FILES) for file in directory.iterdir()
    )
    tokenizer = _Tokenizer(directory, module.config.text_config.max_position_embeddings) if speaks else None
    described = _in_words(processor)
    return OpenedModel(
        "transformers", module.eval(), where, name, _Preprocess(processor), described, tokenizer=tokenizer
    )


def _class(directory: Path, architecture: str) -> Any:
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise DgmrError(
            f"{directory}/config.json names the architecture {architecture!r}, which transformers {transformers.__version__} does not "
            "have; remote code is never run: convert the checkpoint to a class of transformers' own"
        )
    return cls


def _on_meta(directory: Path, architecture: str, hidden: Mapping[str, int]) -> nn.Module:
    cls = _class(directory, architecture)
    try:
        with torch.device("meta"):
            module = _resized(cls, hidden)(transformers.AutoConfig.from_pretrained(directory, local_files_only=True))
    except Exception as error:  # whatever a wrong config leads to inside transformers
        raise DgmrError(f"{directory}/config.json describes no {architecture}: {first_line(error)}") from error
    module.__class__ = cls
    return module


def _by_transformers(directory: Path, architecture: str, hidden: Mapping[str, int]) -> nn.Module:
    cls = _class(directory, architecture)
    try:
        with _no_progress_bar():
            module, loading = _resized(cls, hidden).from_pretrained(
                directory, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever a damaged file or a wrong config leads to inside transformers
        raise DgmrError(f"cannot open {directory} as {architecture}: {first_line(error)}") from error
    module.__class__ = cls
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, loading[problem])):
            raise DgmrError(
                f"the weights in {directory} do not fit {architecture}: {problem.replace('_', ' ')}, first {keys[0]}"
            )
    return module


def _resized(cls: Any, hidden: Mapping[str, int]) -> Any:
    """``cls`` whose tower has the widths ``hidden`` as soon as it is built, so that transformers' own loader fills it."""

    def __init__(self: nn.Module, config: Any) -> None:
        cls.__init__(self, config)
        if hidden and (where := _where(self)) is not None:
            resize(self.get_submodule(where), hidden)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _where(module: nn.Module) -> str | None:
    """The path of the vision tower in ``module``."""
    modules = dict(module.named_modules())
    return next((path for path in TOWERS if path in modules and has_adapter(modules[path])), None)


class _Preprocess:
    """PIL image to ``[3, height, width]`` by transformers' image processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class TextTower(nn.Module):
    """What open_clip's CLIPs have, for a CLIP of transformers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        embedding = self.module.get_text_features(tokens).pooler_output  # type: ignore[operator]
        return F.normalize(embedding, dim=-1) if normalize else embedding


class _Tokenizer:
    """Texts to token ids, all of the length that the model was trained with. Loaded when it is asked: who prunes needs none."""

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
        except Exception as error:  # a damaged file, or a package that this tokenizer wants
            raise DgmrError(f"{self.directory}: cannot load its tokenizer: {first_line(error)}") from error


def _processor(directory: Path) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise DgmrError(
            f"{directory} has no image processor (preprocessor_config.json) that transformers reads: {first_line(error)}"
        ) from error


def _in_words(processor: Any) -> dict[str, Any]:
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    return {
        "size": [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))],
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }


def save_weights(model: OpenedModel, directory: Path) -> None:
    """By transformers itself, which renames keys and makes shards."""
    with _no_progress_bar():
        model.module.save_pretrained(directory, max_shard_size="5GB")


def save_config(model: OpenedModel, directory: Path, final: Path) -> str | None:
    tower = model.tower
    opens = _say(tower)
    _refuse_other_cuts(model)
    model.module.config.architectures = [type(model.module).__name__]
    model.module.config.save_pretrained(directory)
    model.preprocess.processor.save_pretrained(directory)  # type: ignore[attr-defined]
    name = type(model.module).__name__
    cls = "AutoModel" if name in MODEL_MAPPING_NAMES.values() else name
    return f"transformers.{cls}.from_pretrained('{{path}}')" if opens else None


def _refuse_other_cuts(model: OpenedModel) -> None:
    """Nothing in a model directory says the widths of what is no vision tower."""
    with torch.device("meta"):
        built = type(model.module)(copy.deepcopy(model.module.config))
    inside = f"{model.tower_path}." if model.tower_path else ""
    wanted = {site.name: site.hidden for site in find_sites(built)}
    for site in find_sites(model.module):
        if not site.name.startswith(inside) and site.hidden != wanted[site.name]:
            raise DgmrError(
                f"{site.name} lies outside the vision tower and was cut to {site.hidden}; transformers' models save cuts of the tower alone"
            )


def _say(tower: nn.Module) -> bool:
    """Put the tower's hidden width into its config, if its library can read it from there."""
    wanted = [(site.name, site.hidden) for site in find_sites(tower)]
    [width, *others] = {hidden for _, hidden in wanted}
    if others:
        return False
    choices: list[dict[str, int]] = [{}, {"intermediate_size": width}, *({"mlp_ratio": ratio} for ratio in range(1, 9))]
    for choice in choices:
        config = copy.deepcopy(tower.config)
        if not all(hasattr(config, key) for key in choice):
            continue
        for key, value in choice.items():
            setattr(config, key, value)
        with torch.device("meta"):
            built = type(tower)(config)
        if [(site.name, site.hidden) for site in find_sites(built)] == wanted:
            for key, value in choice.items():
                setattr(tower.config, key, value)
            return True
    return False
