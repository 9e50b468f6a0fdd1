"""Copies of modules on the meta device, a hash of their weights, and contexts for eval mode and full precision."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError

M = TypeVar("M", bound=nn.Module)


def meta_copy(module: M, *, buffers: bool = True) -> M:
    """Return a copy of ``module`` on the meta device: shapes and dtypes without values, and without memory.

    Args:
        module: the module to copy. It is unchanged.
        buffers: put the buffers on the meta device too. If False, they are copied with their values.
    """
    tensors: list[Tensor] = [*module.parameters(), *(module.buffers() if buffers else ())]
    memo: dict[int, object] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def state_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_weights(module: nn.Module) -> None:
    """Raise DgmrError if a parameter is on the meta device, which stores no values."""
    name = next((name for name, parameter in module.named_parameters() if parameter.is_meta), None)
    if name is not None:
        raise DgmrError(
            f"{name} of {type(module).__name__} is on the meta device and has no values. Open the model with weights."
        )


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into eval mode inside the context. The mode of every submodule is restored at the end."""
    before = [(child, child.training) for module in modules for child in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for child, mode in before:
            child.training = mode


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products without TF32 inside the context.

    By default, torch convolves in TF32 on a GPU. The patch embedding then differs from the CPU's by 1e-3.
    """
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
