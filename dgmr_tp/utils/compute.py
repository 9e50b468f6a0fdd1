"""Device and precision in which towers run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.utils.config import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of weights by name."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


class ComputeConfig(Config):
    """Device and precision in which towers run. A training has its own precision, and GPUs by ``processes``."""

    device: str | None = None
    """``cuda`` or ``cpu``. Default: the GPU if there is one. Selection by weights runs on the CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the forward passes of evaluation, comparison, sensitivity and AMP. Default: bfloat16 on a GPU,
    float32 on a CPU. Calibration activations and recovery are always float32."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights in model directories. Default: that of the checkpoint. A run that trains keeps float32 until
    its last stage."""

    def choose_device(self) -> torch.device:
        """Return :attr:`device`, or its default.

        Raises:
            DgmrError: there is no such device.
        """
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch was built without the backend
            raise DgmrError(f"device {self.device} cannot be used: {first_line(error)}. Use cpu or cuda.") from error
        return device

    def choose_dtype(self) -> torch.dtype:
        """Return the precision of forward passes."""
        if self.dtype is None:
            return torch.bfloat16 if self.choose_device().type == "cuda" else torch.float32
        return DTYPES[self.dtype]


@contextmanager
def on_device(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Move a module to ``device`` inside the context, and back at its end. None: leave it where it is."""
    before = next(module.parameters()).device
    try:
        module.to(device or before)
        yield
    finally:
        module.to(before)
