"""Unlabeled images from shards without random access: any URL that webdataset opens, read from front to back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dgmr_tp.data.decoding import EXTENSIONS, decode_image
from dgmr_tp.data.images import Images, stack_batches
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.sources import Source, is_url

SHUFFLE_BUFFER = 1000
"""Samples in the shuffle buffer, from which the next one is drawn. The order inside a shard is not random."""


def find_images(source: str | Path) -> Images | Stream:
    """Return the images of a folder, a tar, a folder of tars, or of webdataset URLs.

    Raises:
        DgmrError: a path does not exist or contains no image.
    """
    return Stream(str(source)) if is_url(source) else Images.find(source)


class Stream:
    """The images in the shards of a URL.

    Args:
        source: a webdataset URL. ``{000..099}`` means several shards, ``::`` joins URLs.
    """

    def __init__(self, source: str) -> None:
        parsed = Source.parse(source)
        self.source = source
        self.shards = list(parsed.parts)
        self.upright = parsed.upright
        self.broken: dict[str, str] = {}
        self.others: dict[str, int] = {}

    def shard(self, position: int, seed: int) -> str:
        """Return the shard at ``position`` of an endless order, in which each epoch is another permutation."""
        epoch, index = divmod(position, len(self.shards))
        return self.shards[int(np.random.default_rng((seed, epoch)).permutation(len(self.shards))[index])]

    def read(self, shard: str, seed: int) -> Iterator[tuple[str, Any]]:
        """Yield name and RGB image of everything in a shard that decodes, shuffled in a buffer by ``seed``.

        Images that do not decode are recorded in ``broken``.

        Raises:
            DgmrError: the shard cannot be opened, or is damaged.
        """
        wds = require("webdataset", "distill")
        try:
            dataset = wds.WebDataset([shard], shardshuffle=False, nodesplitter=None, workersplitter=None)
            samples = dataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(seed))
            for name, data in _encoded_images(shard, samples):
                try:
                    image = decode_image(data, self.upright)
                except Exception as error:  # pillow and its codecs raise many exception classes for damaged files
                    self.broken[name] = str(error) or type(error).__name__
                    continue
                yield name, image
        except Exception as error:  # webdataset's exception class depends on the kind of URL
            problem = error.args[0] if error.args else type(error).__name__
            raise DgmrError(
                f"cannot read the shard {shard}: {problem}. Check that it exists and is complete, then run again."
            ) from error

    def sample(
        self, count: int, seed: int, preprocess: Callable[[Any], Tensor], batch_size: int = 64
    ) -> Iterator[Tensor]:
        """Yield the first ``count`` images of a random order of shards, as batches ``[batch, 3, height, width]``.

        Raises:
            DgmrError: a shard cannot be read, or no image decodes.
        """
        return stack_batches(islice(self._preprocessed(seed, preprocess), count), batch_size)

    def _preprocessed(self, seed: int, preprocess: Callable[[Any], Tensor]) -> Iterator[Tensor]:
        count = 0
        for position in range(len(self.shards)):
            for _, image in self.read(self.shard(position, seed), seed):
                yield preprocess(image)
                count += 1
        if not count:
            raise DgmrError(
                f"{self.source} contains no image that can be read. Its files must end in one of "
                f"{', '.join(EXTENSIONS)}."
            )


def _encoded_images(shard: str, samples: Any) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        for extension, data in sample.items():
            if f".{extension}".lower().endswith(EXTENSIONS):
                yield f"{shard}:{sample['__key__']}.{extension}", data
