"""The teacher's features of crops that come again, computed once: for the other sizes of a recipe, or for later epochs of fixed crops."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgmr_tp.distillation.data import UNNUMBERED
from dgmr_tp.distillation.losses import Features
from dgmr_tp.errors import DgmrError

BLOCK = 4096
"""Bytes that a row may waste on the disk, where its neighbours are not written."""
CHECKSUM = 4
"""Bytes before every row; where nothing was written, or not all of it, they do not fit."""


class KeptFeatures:
    """Rows of a file, one a crop: what the teacher gave for it, to the bit. Processes may share the file, on one machine or several.

    Args:
        file: made if it is not there; what lies there is used.
        example: the teacher's features of any batch, for their shapes and types.
        crops: how many will be written.

    Raises:
        DgmrError: there is no room for them.
    """

    def __init__(self, file: Path, example: Features, crops: int) -> None:
        self.file = file
        self.parts = {
            name: (value.shape[1:], value.dtype, math.prod(value.shape[1:]) * value.element_size())
            for name, value in example.items()
        }
        self.row = CHECKSUM + sum(size for *_, size in self.parts.values())
        self.bytes = crops * self.row
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.stat().st_blocks * 512 if file.exists() else 0  # the file has holes
        if self.bytes + crops * BLOCK - there > (free := shutil.disk_usage(file.parent).free):
            raise DgmrError(
                f"the original's features of {crops} crops take {self.bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free at "
                f"{file.parent}; make room, or set distill.keep_features: false"
            )
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self, rows: Sequence[int]) -> Features | None:
        """The features of these crops on the CPU; None unless all of them are there."""
        content = bytearray()
        if UNNUMBERED in rows:
            return None
        for row in rows:
            found = os.pread(self.descriptor, self.row, row * self.row)
            checksum, values = found[:CHECKSUM], found[CHECKSUM:]
            if len(found) < self.row or zlib.crc32(values).to_bytes(CHECKSUM, "little") != checksum:
                return None
            content += values
        raw = torch.frombuffer(content, dtype=torch.uint8).view(len(rows), -1)
        pieces = raw.split([size for *_, size in self.parts.values()], dim=1)
        return {
            name: piece.clone(memory_format=torch.contiguous_format).view(dtype).view(len(rows), *shape)
            for piece, (name, (shape, dtype, _)) in zip(pieces, self.parts.items(), strict=True)
        }

    def write(self, rows: Sequence[int], features: Features) -> None:
        """Keep the features of these crops, but for unnumbered ones.

        Raises:
            DgmrError: the disk does not take them.
        """
        parts: list[Tensor] = [
            features[name].detach().cpu().contiguous().flatten(1).view(torch.uint8) for name in self.parts
        ]
        try:
            for row, values in zip(rows, torch.cat(parts, dim=1), strict=True):
                if row == UNNUMBERED:
                    continue
                content = values.numpy().tobytes()
                whole = zlib.crc32(content).to_bytes(CHECKSUM, "little") + content
                if os.pwrite(self.descriptor, whole, row * self.row) < self.row:
                    raise OSError("the disk took a part only")
        except OSError as error:
            raise DgmrError(
                f"cannot keep the original's features in {self.file}: {error}; make room, or set distill.keep_features: false, and run "
                "again to go on"
            ) from error

    def close(self) -> None:
        os.close(self.descriptor)
