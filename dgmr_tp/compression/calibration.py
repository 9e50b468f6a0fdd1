"""Calibration images: unlabeled images that criteria, recovery and AMP's search run the tower on.

Images are read and preprocessed once. Everything below the public entry points works on :class:`CalibrationImages`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.data.streams import find_images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import stem_states
from dgmr_tp.utils.modules import check_weights

NUM_CALIBRATION_IMAGES = 1024
"""Images read from a folder or shards when the caller gives no number."""


@dataclass(frozen=True)
class CalibrationImages:
    """Preprocessed images in batches ``[batch, 3, height, width]``, and what reading them skipped."""

    batches: list[Tensor]
    broken: Mapping[str, str] = field(default_factory=dict)
    """Name and error of every image that did not decode."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Number of files in the source that are not images, by extension."""
    notice: str | None = None
    """One line on how the classes were read, if they were and folders are nested."""

    @classmethod
    def read(
        cls, images: str | Path | Iterable[Tensor], model: OpenedModel, count: int | None = None, seed: int = 0
    ) -> CalibrationImages:
        """Read images from a path or a URL with the model's preprocessing, or take batches as they are.

        Args:
            images: a folder, a tar, a folder of tars, a URL of shards (see
                :class:`~dgmr_tp.utils.sources.Source`), or preprocessed batches ``[batch, 3, height, width]``.
            model: gives the preprocessing.
            count: number of images. Default: :data:`NUM_CALIBRATION_IMAGES` from a path (all, if it holds fewer), and
                all batches.
            seed: draws the images from a path.

        Raises:
            DgmrError: the path holds no readable image, the tower does not take a batch, or the batches hold fewer than
                ``count`` images.
        """
        if isinstance(images, str | Path):
            source = find_images(images)
            sampled = list(source.sample(count or NUM_CALIBRATION_IMAGES, seed, model.preprocess))
            return cls(sampled, dict(source.broken), source.others)
        batches = [_check_batch(batch) for batch in images]
        if model.has_adapter:
            check_weights(model.tower)
            reference = next(model.tower.parameters())
            with torch.no_grad():  # one image of each batch: does the tower take them?
                stem_states(model.adapter, (batch[:1].to(reference.device, reference.dtype) for batch in batches))
        if count is None:
            return cls(batches)
        if (given := sum(map(len, batches))) < count:
            raise DgmrError(
                f"{count} calibration images were asked for, but the batches hold {given}. Pass more batches or a "
                "smaller number."
            )
        return cls(list(torch.cat(batches)[:count].split(len(batches[0]))))

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self.batches))

    def on(self, model: OpenedModel) -> Iterator[Tensor]:
        """Yield the batches on the device and in the dtype of the model's tower."""
        reference = next(model.tower.parameters())
        return (batch.to(reference.device, reference.dtype) for batch in self.batches)

    def groups(self, model: OpenedModel, candidates: int) -> list[list[Tensor]]:
        """Return whole groups of ``candidates`` images for AMP's entropy, each in batches on the model's device.

        Images left over after the last whole group are dropped. Fewer images than ``candidates`` give one group
        of all images.
        """
        batches = list(self.on(model))
        size = min(candidates, len(self))
        batch_size = min(size, len(batches[0]))
        images = torch.cat(batches)
        return [list(group.split(batch_size)) for group in images[: len(self) - len(self) % size].split(size)]


def _check_batch(batch: Any) -> Tensor:
    if isinstance(batch, Tensor) and batch.ndim == 4 and batch.is_floating_point():
        return batch
    if isinstance(batch, Tensor) and batch.ndim == 4:
        raise DgmrError(
            f"a batch of images holds {str(batch.dtype).removeprefix('torch.')} values, which are not preprocessed. "
            "Apply the encoder's preprocessing: batches are floating-point."
        )
    kind = f"a tensor of shape {list(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
    raise DgmrError(
        f"a batch of images is a tensor [batch, 3, height, width], this is {kind}. Leave out labels, and put a single "
        "batch into a list."
    )
