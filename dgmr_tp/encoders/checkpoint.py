"""Read checkpoints as data, and load them into modules of other hidden widths.

Works on files and ``nn.Module``, and executes nothing from a file. Does not know any model library.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError, first_line

Weights = Literal["memory", "disk", "none"]
"""Location of an opened model's weights: in memory, memory-mapped on disk, or none (shapes on the meta device)."""
WRAPPER_KEYS = ("state_dict", "model_ema", "model", "module", "teacher")
"""Keys under which training programs store the weights."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name.

    Pickles are read by torch's weights-only loader, which executes nothing. Keys that training programs wrap around the
    weights (``state_dict``, ``model``) and the prefix ``module.`` are removed.

    Args:
        path: a ``.safetensors`` file, the ``.index.json`` of shards, or a ``.pt``, ``.pth`` or ``.bin`` file.

    Raises:
        DgmrError: the file is missing, damaged, or contains more than tensors; names the file.
    """
    path = Path(path)
    try:
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
            tensors: dict[str, Tensor] = {}
            for shard in shards:
                tensors |= read_tensors(path.parent / shard)
            return tensors
        if path.suffix == ".safetensors":
            return load_file(path)
        content = _unpickle(path)
    except Exception as error:  # a damaged file fails in many ways
        if "weights_only" in str(error) or "Weights only load" in str(error):
            raise DgmrError(
                f"{path} holds Python objects, which are never executed. Save its state_dict alone."
            ) from error
        reason = first_line(error).removesuffix(".")
        raise DgmrError(f"cannot read {path}: {reason}. The file is missing, truncated or damaged.") from error
    while isinstance(content, Mapping) and (
        inner := next((content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None)
    ):
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise DgmrError(f"{path} is not a checkpoint: it does not hold tensors by name. Name a file with a state_dict.")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise DgmrError(f"{path} is not a checkpoint: it holds more than tensors by name. Save its state_dict alone.")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def weights_file(directory: Path) -> Path:
    """Return the weights file of a Hugging Face folder, or the index of its shards.

    Raises:
        DgmrError: the folder has neither.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise DgmrError(f"{directory} holds no weights. Add one of {', '.join(names)}.")


def build_device(weights: Weights) -> AbstractContextManager[Any]:
    """Return a context for building a model: the default device for weights in memory, else the meta device."""
    return contextlib.nullcontext() if weights == "memory" else torch.device("meta")


def load_by_shape(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Resize every Linear and norm to its tensors, and load ``tensors`` strictly.

    A module on the meta device takes the memory-mapped tensors themselves, so that weights stay on disk until they are
    read. Buffers that the checkpoint does not contain stay on the meta device. Such a module cannot be run.

    Args:
        module: the module to load into.
        tensors: by name in ``module``.
        source: name of the checkpoint in messages.

    Raises:
        DgmrError: a tensor is missing, unknown or of another shape; names the first one and ``source``.
    """
    for name, layer in module.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is not None and weight.ndim > 0:
            _resize_layer(layer, weight)
    expected = module.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise DgmrError(
                f"{source} has no tensor {key!r}, which the model needs. Check that it is a checkpoint of this model."
            )
        if key not in expected:
            raise DgmrError(
                f"{source} holds a tensor {key!r} that the model does not have. Check that it is a checkpoint of this "
                "model."
            )
        if tensors[key].shape != expected[key].shape:
            raise DgmrError(
                f"{source} holds {key!r} with shape {tuple(tensors[key].shape)}, and the model has "
                f"{tuple(expected[key].shape)}. Check that it is a checkpoint of this model."
            )
    module.load_state_dict(tensors, assign=any(parameter.is_meta for parameter in module.parameters()))


def _resize_layer(layer: nn.Module, weight: Tensor) -> None:
    is_norm = hasattr(layer, "normalized_shape")
    if (
        not (isinstance(layer, nn.Linear) or is_norm)
        or weight.ndim != layer.weight.ndim
        or weight.shape == layer.weight.shape
    ):
        return
    layer.weight = nn.Parameter(layer.weight.new_empty(weight.shape))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        layer.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(weight.shape[0]))
