"""Weights as data: tensors out of files that are never executed, and a module that takes the widths they have."""

from __future__ import annotations

from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError


def load_by_shape(module: nn.Module, path: Path) -> None:
    """Load ``path`` strictly after giving every Linear and norm the width that its tensors have there.

    Raises:
        DgmrError: the file cannot be read, or a tensor is missing, unknown or of another shape; names the first.
    """
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DgmrError(f"cannot read {path}: {first_line(error)}; the file is missing, cut short or damaged") from error
    for name, layer in module.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is not None and weight.ndim > 0:
            _take_width(layer, weight)
    expected = module.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise DgmrError(f"{path} has no tensor {key!r}, which its config asks for")
        if key not in expected:
            raise DgmrError(f"{path} holds a tensor {key!r} that its config does not know")
        if tensors[key].shape != expected[key].shape:
            raise DgmrError(f"{path}: {key!r} is {tuple(tensors[key].shape)}, its config says {tuple(expected[key].shape)}")
    module.load_state_dict(tensors)


def _take_width(layer: nn.Module, weight: Tensor) -> None:
    is_norm = hasattr(layer, "normalized_shape")
    if not (isinstance(layer, nn.Linear) or is_norm) or weight.ndim != layer.weight.ndim or weight.shape == layer.weight.shape:
        return
    layer.weight = nn.Parameter(layer.weight.new_empty(weight.shape))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        layer.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(weight.shape[0]))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a sentence of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
