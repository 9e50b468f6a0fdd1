"""The images of a distillation run in an order that does not depend on who asks.

The global order is a function of (seed, epoch); global batch ``k`` is a slice of it, a rank takes every ``world``-th sample
of the slice; the crop of a sample is seeded by (seed, epoch, sample). So a run is resumed from one integer, the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgmr_tp.data.images import Images
from dgmr_tp.errors import DgmrError

Place = tuple[int, int]  # epoch, index


class Crops(Dataset):
    """Random crops of ``images``, addressed by (epoch, index)."""

    def __init__(self, images: Images, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, place: Place) -> Tensor:
        epoch, index = place
        for step in range(len(self.images)):  # a broken image is replaced by the one after it
            image = self.images.read((index + step) % len(self.images))
            if image is not None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
                    return self.transform(image)
        raise DgmrError(f"none of the {len(self.images)} images in {self.images.source} can be read")


def places(count: int, batch: int, seed: int, step: int) -> list[Place]:
    """The samples of global batch ``step`` of a set of ``count`` images: ``batch`` of them, epoch after epoch."""
    result: list[Place] = []
    position = step * batch
    while len(result) < batch:
        epoch, offset = divmod(position, count)
        taken = _order(count, seed, epoch)[offset : offset + batch - len(result)]
        result += [(epoch, int(index)) for index in taken]
        position += len(taken)
    return result


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batches(crops: Crops, *, batch: int, seed: int, first_step: int, steps: int, rank: int, world: int, workers: int) -> Iterator[Tensor]:
    """This rank's part of the global batches ``first_step … steps − 1``, each ``[batch / world, 3, height, width]``."""
    mine = (places(len(crops.images), batch, seed, step)[rank::world] for step in range(first_step, steps))
    return iter(DataLoader(crops, batch_sampler=mine, num_workers=workers))


def training_transform(preprocess: dict[str, Any], size: int, min_crop: float, flip: bool) -> Callable[[Any], Tensor]:
    """Random resized crop (area ``min_crop`` to 1, bicubic), mirrored half of the time, normalised as the encoder wants it."""
    from torchvision.transforms import v2

    steps: list[Any] = [v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess["mean"], preprocess["std"])]
    return v2.Compose(steps)
