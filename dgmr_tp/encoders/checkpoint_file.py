"""Read the tensors of a checkpoint file, whatever a training program wrapped around them.

Executes nothing from a file, and knows no model library. What is taken from a file with more than one set of weights,
and what is left, is logged at level INFO.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import re
import types
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dgmr_tp.errors import DgmrError, first_line

logger = logging.getLogger(__name__)
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher")
"""Keys under which training programs store a moving average of the weights. It is preferred."""
WRAPPER_KEYS = (
    *EMA_KEYS,
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "params", "weights", "student"),
)
"""Keys under which training programs store weights, the preferred ones first."""
EMA_PREFIXES = tuple(f"{key}." for key in EMA_KEYS)
WRAPPER_PREFIXES = tuple(
    f"{name}."
    for name in ("module", "model", "net", "network", "backbone", "encoder", "base_encoder", "image_encoder", "student")
)
"""Prefixes before every name of a model, also in chains such as ``module.backbone.``."""
QUANTIZED_DTYPES = re.compile(r"[IU]8|F8_\w+|F4\w*|F6\w*")
"""Dtypes in safetensors files that mean nothing without scales."""
HEADS = re.compile(
    r"^(visual\.)?(trunk\.)?(heads?|head_dist|aux_head|fc|classifier|linear|projector|predictor|criterion|mask_token|"
    r"decoder\w*|dino_head|ibot_head|dino_loss|ibot_patch_loss|koleo_loss|queue\w*)(\.|$)"
)
"""Names of heads, decoders and losses, which a file may hold next to an encoder."""
PICKLED_DATA = (
    *(argparse.Namespace, types.SimpleNamespace, pathlib.PurePosixPath, pathlib.PosixPath),
    *(np.dtype, np.ndarray, multiarray.scalar, multiarray._reconstruct),  # type: ignore[attr-defined]
    (multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    *(type(np.dtype(name)) for name in ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64")),
)
"""Classes of plain data that training programs store next to the weights. Creating them executes nothing. A second name
is that of numpy 1."""
FOREIGN_FILES = (
    (rb"version https://git-lfs", "a Git LFS pointer and not the file itself. Run git lfs pull in its repository"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page and not a checkpoint. Download the file itself"),
    (rb"\x89HDF", "an HDF5 file of another framework. Give the PyTorch or safetensors checkpoint"),
    (rb"(\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!)", "a compressed archive. Unpack it first"),
    (rb"(?s).{257}ustar", "a tar archive. Unpack it and give the checkpoint in it"),
    (rb"\s*[{\[]", "a text file in JSON and not a checkpoint. Give the file with the weights"),
)
"""First bytes of files that are often given instead of a checkpoint, and what to say of them."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name.

    The format is recognized by content. Pickles are read by torch's weights-only loader, which executes nothing. Keys
    and prefixes that training programs put around the weights (:data:`WRAPPER_KEYS`, :data:`WRAPPER_PREFIXES`, and
    ``_orig_mod.`` of ``torch.compile``) are removed. Of several sets of weights a moving average is preferred.

    Args:
        path: a safetensors file, the ``.index.json`` of shards, or a file of ``torch.save``.

    Raises:
        DgmrError: the file is missing, damaged, or not a checkpoint; names the file and says what it is.
    """
    path = Path(path)
    return _without_prefixes(_tensors(path), path)


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".index.json"):
        tensors: dict[str, Tensor] = {}
        for shard in _shards(path):
            tensors |= _tensors(shard)
        return tensors
    start = _first_bytes(path)
    _refuse_foreign_file(path, start)
    try:
        if start[8:9] == b"{":
            return load_file(path)
        content = _unpickle(path)
    except Exception as error:  # a damaged file fails with exceptions of many types
        text = str(error)
        if forbidden := re.search(r"GLOBAL (\S+) (?:was|whose)", text):
            raise DgmrError(
                f"{path} holds Python objects ({forbidden[1]}), which are never executed. Save the state_dict alone: "
                "torch.save(model.state_dict(), FILE)."
            ) from error
        reason = first_line(error).removesuffix(".")
        raise DgmrError(f"cannot read {path}: {reason}. The file is truncated or damaged; fetch it again.") from error
    return _unwrap(content, path)


def check_weights_file(path: Path) -> None:
    """Check a file of weights that a library reads by itself, without reading the weights.

    Args:
        path: a file, or the ``.index.json`` of shards.

    Raises:
        DgmrError: a file is missing, is not a checkpoint, or holds quantized tensors.
    """
    for file in _shards(path) if path.name.endswith(".index.json") else [path]:
        start = _first_bytes(file)
        _refuse_foreign_file(file, start)
        if start[8:9] != b"{":
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                dtype = tensors.get_slice(name).get_dtype()
                if QUANTIZED_DTYPES.fullmatch(dtype):
                    raise quantized_error(file, name, dtype)


def quantized_error(source: str | Path, name: str, dtype: str) -> DgmrError:
    """Return the error for a tensor ``name`` of ``source`` whose dtype means nothing without scales."""
    return DgmrError(
        f"{source} holds {name!r} as {dtype}, which means nothing without its scales. Give the checkpoint before "
        "quantization."
    )


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise DgmrError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DgmrError(
            f"cannot read {index}: {first_line(error)}. It must be the index of a sharded checkpoint, with a "
            "weight_map."
        ) from error
    return [index.parent / name for name in names]


def _refuse_foreign_file(path: Path, start: bytes) -> None:
    """Raise DgmrError if the file's first bytes show that it is not a checkpoint."""
    if not start:
        raise DgmrError(f"{path} is empty. Fetch it again.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(re.match(r"[^/]+/constants\.pkl$", name) for name in names):
            raise DgmrError(
                f"{path} is a TorchScript archive, which contains code. Save its weights with "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW) if you trust it; OpenAI's own files open with "
                "--pretrained openai."
            )
        if not any(re.match(r"[^/]+/data\.pkl$", name) for name in names):
            raise DgmrError(f"{path} is a zip archive without a checkpoint of torch. Unpack it first.")
        return
    if start[8:9] == b"{":  # safetensors: the length of a JSON header, and the header
        return
    for pattern, description in FOREIGN_FILES:
        if re.match(pattern, start, re.IGNORECASE):
            raise DgmrError(f"{path} is {description}.")


def _unpickle(path: Path) -> Any:
    with torch.serialization.safe_globals(list(PICKLED_DATA)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors inside the keys of training programs."""
    while isinstance(content, Mapping):
        sets = [key for key in WRAPPER_KEYS if _holds_tensors(content.get(key))]
        if not sets:
            break
        key, *others = sets
        if others or key in EMA_KEYS:
            average = ", a moving average of the weights" if key in EMA_KEYS else ""
            left = [name for name in map(str, content) if name != key]
            logger.info("%s: took %r%s; left %s", path, key, average, _listed(left) or "nothing")
        content = content[key]
    tensors = {str(n): t for n, t in content.items() if isinstance(t, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        keys = f"; its keys are {_listed(map(str, content))}" if isinstance(content, Mapping) and content else ""
        raise DgmrError(
            f"{path} is not a checkpoint: it holds no tensors by name{keys}. Give a file with a state_dict."
        )
    if left := [str(name) for name in content if name not in tensors]:
        logger.info("%s: left %s, which are not tensors", path, _listed(left))
    return tensors


def _holds_tensors(content: Any) -> bool:
    """Return whether ``content`` is a mapping with tensors by name, or wraps one."""
    return isinstance(content, Mapping) and (
        any(isinstance(value, Tensor) for value in content.values())
        or any(_holds_tensors(content.get(key)) for key in WRAPPER_KEYS)
    )


def _without_prefixes(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while True:
        ema = next((prefix for prefix in EMA_PREFIXES if _is_average(prefix, tensors)), None)
        prefix = ema or next((prefix for prefix in WRAPPER_PREFIXES if _wraps(prefix, tensors)), None)
        if prefix is None:
            return tensors
        if left := [name for name in tensors if not name.startswith(prefix)]:
            logger.info("%s: took the tensors of %r; left %s", path, prefix, _listed(_roots(left)))
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _is_average(prefix: str, names: Collection[str]) -> bool:
    """Return whether the names with ``prefix`` are those of a whole model: all names, or mostly names of others too."""
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    others = {name for name in names if not name.startswith(prefix)}
    others |= {name.partition(".")[2] for name in others}
    return bool(inside) and (not others or 2 * len(inside & others) > len(inside))


def _wraps(prefix: str, names: Collection[str]) -> bool:
    """Return whether a name begins with ``prefix``, and all others belong to heads or to a moving average."""
    others = [name for name in names if not name.startswith(prefix)]
    return len(others) < len(names) and all(HEADS.match(n) or n.startswith(EMA_PREFIXES) for n in others)


def _roots(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _listed(names: Iterable[str], limit: int = 6) -> str:
    """Return names joined by commas, at most ``limit`` of them."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
