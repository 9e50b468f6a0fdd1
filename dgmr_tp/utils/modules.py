"""Modules in eval mode for a while, and copies on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def meta_copy(module: M, *, buffers: bool = True) -> M:
    """A copy of ``module`` whose parameters, and buffers if wanted, have shapes and types but no values. Nothing is allocated."""
    tensors: list[Tensor] = [*module.parameters(), *(module.buffers() if buffers else ())]
    memo: dict[int, object] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode while the context lasts; every submodule's own mode comes back."""
    before = [(child, child.training) for module in modules for child in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for child, mode in before:
            child.training = mode
