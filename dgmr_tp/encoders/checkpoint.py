"""Weights as data: tensors out of files that are never executed, and a module that takes the widths they have."""

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
"""Where the weights of an opened model are: in memory; on the disk, memory-mapped; or nowhere, for its shapes alone."""
WRAPPERS = ("state_dict", "model_ema", "model", "module", "teacher")
"""Keys under which training programs keep the weights."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, an index of shards (``.index.json``), or a ``.pt``, ``.pth`` or ``.bin`` file.

    A pickle is read by torch's weights-only loader, which executes nothing. What training programs wrap around the weights
    (``state_dict``, ``model``, ``module.``) is taken off.

    Raises:
        DgmrError: the file is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    try:
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in read_tensors(path.parent / shard).items()}
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _unpickled(path)
    except Exception as error:  # a damaged file fails in many ways
        if "weights_only" in str(error) or "Weights only load" in str(error):
            raise DgmrError(
                f"{path} holds Python objects, which are never executed; save its state_dict alone"
            ) from error
        raise DgmrError(
            f"cannot read {path}: {first_line(error)}; the file is missing, cut short or damaged"
        ) from error
    while isinstance(found, Mapping) and (
        inner := next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
    ):
        found = inner
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise DgmrError(f"{path} is no checkpoint: it holds something else than tensors by name")
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6


def weights_file(directory: Path) -> Path:
    """The file of a Hugging Face folder that holds its weights, or the index of their shards.

    Raises:
        DgmrError: there is none.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise DgmrError(f"{directory} holds no weights; one of these is needed: {', '.join(names)}")


def empty(weights: Weights) -> AbstractContextManager[Any]:
    """Where a model is built: on the meta device unless its weights are to come into memory."""
    return contextlib.nullcontext() if weights == "memory" else torch.device("meta")


def load_by_shape(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load ``tensors`` strictly after giving every Linear and norm the width that its tensors have.

    A module on the meta device takes the tensors themselves, which are memory-mapped: its weights stay on the disk until
    they are looked at. Its buffers that no checkpoint holds stay on the meta device, so that it cannot be run.

    Raises:
        DgmrError: a tensor is missing, unknown or of another shape; names the first, and ``source``.
    """
    for name, layer in module.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is not None and weight.ndim > 0:
            _take_width(layer, weight)
    expected = module.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise DgmrError(f"{source} has no tensor {key!r}, which the model asks for")
        if key not in expected:
            raise DgmrError(f"{source} holds a tensor {key!r} that the model does not know")
        if tensors[key].shape != expected[key].shape:
            raise DgmrError(
                f"{source}: {key!r} is {tuple(tensors[key].shape)}, the model says {tuple(expected[key].shape)}"
            )
    module.load_state_dict(tensors, assign=any(parameter.is_meta for parameter in module.parameters()))


def _take_width(layer: nn.Module, weight: Tensor) -> None:
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
