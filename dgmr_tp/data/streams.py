"""Unlabelled images from shards that cannot be indexed: any URL that webdataset opens, each read from front to back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dgmr_tp.data.images import EXTENSIONS, Images, decoded, stacked
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.lazy_imports import require

SHUFFLED = 1000
"""Encoded images among which the next one is drawn: a shard's own order is not random."""


def is_url(source: str | Path) -> bool:
    """Whether ``source`` is for webdataset to open, such as ``https://host/{000..099}.tar`` or ``pipe:aws s3 cp s3://… -``."""
    return str(source).startswith("pipe:") or "://" in str(source)


def find_images(source: str | Path) -> Images | Stream:
    """The images of a folder, a tar, a folder of tars, or of webdataset's URLs.

    Raises:
        DgmrError: a path does not exist or holds no image.
    """
    return Stream(str(source)) if is_url(source) else Images.find(source)


class Stream:
    """The shards of a URL. ``{000..099}`` stands for several, ``::`` joins URLs."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.shards = require("webdataset", "distill").shardlists.expand_urls(source)
        self.broken: dict[str, str] = {}
        self.other_files = 0

    def shard(self, position: int, seed: int) -> str:
        """The shard at ``position`` of an endless order, in which every epoch is a permutation of its own."""
        epoch, place = divmod(position, len(self.shards))
        return self.shards[int(np.random.default_rng((seed, epoch)).permutation(len(self.shards))[place])]

    def read(self, shard: str, seed: int) -> Iterator[tuple[str, Any]]:
        """Name and RGB image of everything in a shard that decodes, slightly shuffled; what does not is remembered in ``broken``.

        Raises:
            DgmrError: the shard cannot be opened, or is damaged.
        """
        wds = require("webdataset", "distill")
        try:
            samples = wds.WebDataset([shard], shardshuffle=False, nodesplitter=None, workersplitter=None)
            for name, data in _shuffled(_encoded(shard, samples), random.Random(seed)):
                try:
                    image = decoded(data)
                except Exception as error:  # pillow and its codecs raise many kinds for damaged files
                    self.broken[name] = str(error) or type(error).__name__
                    continue
                yield name, image
        except Exception as error:  # what webdataset raises depends on the kind of URL
            what = error.args[0] if error.args else type(error).__name__
            raise DgmrError(
                f"cannot read the shard {shard}: {what}; look whether it is there and whole, then run again"
            ) from error

    def sample(
        self, count: int, seed: int, preprocess: Callable[[Any], Tensor], batch_size: int = 64
    ) -> Iterator[Tensor]:
        """The first ``count`` images of a random order of shards, as batches ``[batch, 3, height, width]``.

        Raises:
            DgmrError: a shard cannot be read, or not one image decodes.
        """
        return stacked(islice(self._chosen(seed, preprocess), count), batch_size)

    def _chosen(self, seed: int, preprocess: Callable[[Any], Tensor]) -> Iterator[Tensor]:
        taken = 0
        for position in range(len(self.shards)):
            for _, image in self.read(self.shard(position, seed), seed):
                yield preprocess(image)
                taken += 1
        if not taken:
            raise DgmrError(f"{self.source} holds no image that can be read")


def _encoded(shard: str, samples: Any) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        for ending, data in sample.items():
            if f".{ending}".lower().endswith(EXTENSIONS):
                yield f"{shard}:{sample['__key__']}.{ending}", data


def _shuffled(items: Iterator[tuple[str, bytes]], chance: random.Random) -> Iterator[tuple[str, bytes]]:
    waiting: list[tuple[str, bytes]] = []
    for item in items:
        waiting.append(item)
        if len(waiting) >= SHUFFLED:
            yield waiting.pop(chance.randrange(len(waiting)))
    while waiting:
        yield waiting.pop(chance.randrange(len(waiting)))
