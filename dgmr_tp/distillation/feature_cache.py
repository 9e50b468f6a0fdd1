"""Disk cache of the teacher's features, for crops that come again: for other sizes of a recipe, or in later epochs."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgmr_tp.distillation.data import NO_ROW
from dgmr_tp.distillation.losses import Features
from dgmr_tp.errors import DgmrError

DISK_BLOCK_BYTES = 4096
"""Upper bound of the disk space that a row wastes when its neighbors are not written."""
CHECKSUM_BYTES = 4
"""Size of the CRC-32 before every row. A row that was never written, or only in part, does not match it."""


class FeatureCache:
    """A file of fixed-size rows, one for each crop, with the teacher's features bit for bit.

    Several processes may read and write the same file, on one machine or on several: rows are written with one
    ``pwrite`` and verified by their checksum, so that no lock and no index is needed. Rows that are not written take no
    disk space.

    Args:
        file: created if it does not exist; the rows that it contains are used.
        example: the teacher's features of any batch, for their shapes and dtypes.
        crops: number of rows that will be written at most.

    Raises:
        DgmrError: the disk has too little free space.
    """

    def __init__(self, file: Path, example: Features, crops: int) -> None:
        self.file = file
        self.layout = {
            name: (value.shape[1:], value.dtype, math.prod(value.shape[1:]) * value.element_size())
            for name, value in example.items()
        }
        self.row_bytes = CHECKSUM_BYTES + sum(size for *_, size in self.layout.values())
        self.bytes = crops * self.row_bytes
        file.parent.mkdir(parents=True, exist_ok=True)
        used = file.stat().st_blocks * 512 if file.exists() else 0  # the file is sparse
        free = shutil.disk_usage(file.parent).free
        if self.bytes + crops * DISK_BLOCK_BYTES - used > free:
            raise DgmrError(
                f"the teacher's features of {crops} crops take {self.bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
                f"are free at {file.parent}. Free disk space, or set distill.keep_features: false."
            )
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self, rows: Sequence[int]) -> Features | None:
        """Return the features of these crops on the CPU, or None unless the file contains all of them."""
        content = bytearray()
        if NO_ROW in rows:
            return None
        for row in rows:
            stored = os.pread(self.descriptor, self.row_bytes, row * self.row_bytes)
            checksum, values = stored[:CHECKSUM_BYTES], stored[CHECKSUM_BYTES:]
            if len(stored) < self.row_bytes or zlib.crc32(values).to_bytes(CHECKSUM_BYTES, "little") != checksum:
                return None
            content += values
        raw = torch.frombuffer(content, dtype=torch.uint8).view(len(rows), -1)
        columns = raw.split([size for *_, size in self.layout.values()], dim=1)
        return {
            name: column.clone(memory_format=torch.contiguous_format).view(dtype).view(len(rows), *shape)
            for column, (name, (shape, dtype, _)) in zip(columns, self.layout.items(), strict=True)
        }

    def write(self, rows: Sequence[int], features: Features) -> None:
        """Store the features of these crops. Crops with :data:`NO_ROW` are skipped.

        Raises:
            DgmrError: the disk is full or fails.
        """
        columns: list[Tensor] = [
            features[name].detach().cpu().contiguous().flatten(1).view(torch.uint8) for name in self.layout
        ]
        try:
            for row, values in zip(rows, torch.cat(columns, dim=1), strict=True):
                if row == NO_ROW:
                    continue
                content = values.numpy().tobytes()
                stored = zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little") + content
                if os.pwrite(self.descriptor, stored, row * self.row_bytes) < self.row_bytes:
                    raise OSError("only a part of the row was written")
        except OSError as error:
            raise DgmrError(
                f"cannot store the teacher's features in {self.file}: {error}. Free disk space, or set "
                "distill.keep_features: false, and run again to resume."
            ) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)
