"""Load the tensors of a checkpoint into a module of other hidden widths.

Works on ``nn.Module``. Does not know any model library.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgmr_tp.encoders.checkpoint_file import HEADS, quantized_error
from dgmr_tp.errors import DgmrError

logger = logging.getLogger(__name__)
Weights = Literal["memory", "disk", "none"]
"""Location of an opened model's weights: in memory, memory-mapped on disk, or none (shapes on the meta device)."""
HARMLESS_BUFFERS = re.compile(
    r"(^|\.)(position_ids|attn_mask|relative_position_index|relative_coords_table|input_resolution|context_length|"
    r"vocab_size|n_averaged)$"
)
"""Names of buffers that some releases store and that every model computes itself."""
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def checkpoint_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the floating-point dtype that most values of a checkpoint have. float64 counts as float32."""
    counts = Counter({torch.float32: 0})
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype if tensor.dtype != torch.float64 else torch.float32] += tensor.numel()
    return counts.most_common(1)[0][0]


def load_by_shape(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> torch.dtype:
    """Resize every Linear and norm to its tensors, and load ``tensors`` strictly.

    Buffers that every model computes itself (:data:`HARMLESS_BUFFERS`) may be missing or unknown. Heads that the module
    does not have are left. A module on the meta device takes the memory-mapped tensors themselves, so that weights stay
    on disk until they are read. Buffers that the checkpoint does not contain stay on the meta device. Such a module
    cannot be run.

    Args:
        module: the module to load into.
        tensors: by name in ``module``.
        source: name of the checkpoint in messages.

    Returns:
        The dtype of the checkpoint; see :func:`checkpoint_dtype`.

    Raises:
        DgmrError: a tensor is missing, unknown, of another shape, or quantized; names the first one and ``source``.
    """
    tensors = _expected_by(module, tensors, source)
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
    return checkpoint_dtype(tensors)


def _expected_by(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Return ``tensors`` without heads that ``module`` does not have, and with its own harmless buffers."""
    expected = module.state_dict()
    unknown = [name for name in tensors if name not in expected]
    heads = {name for name in unknown if HEADS.match(name)}
    if heads:
        logger.info(
            "%s: left %d tensors of heads that the model does not have, such as %s", source, len(heads), min(heads)
        )
    ignored = heads | {name for name in unknown if HARMLESS_BUFFERS.search(name)}
    for name, tensor in tensors.items():
        if name in expected and expected[name].is_floating_point() and tensor.dtype not in WEIGHT_DTYPES:
            raise quantized_error(source, name, str(tensor.dtype).removeprefix("torch."))
    buffers = {name: tensor for name, tensor in expected.items() if HARMLESS_BUFFERS.search(name)}
    return {**buffers, **{name: tensor for name, tensor in tensors.items() if name not in ignored}}


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
