"""Copies of modules on the meta device, and a context for eval mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

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
