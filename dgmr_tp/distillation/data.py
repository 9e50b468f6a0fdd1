"""Training samples in an order that does not depend on the number of processes.

The global order is a function of (seed, epoch), and global batch ``k`` is a slice of it. A rank takes every
``world``-th sample of the slice, and the crop of a sample is seeded by (seed, epoch, index). A run therefore resumes
from one integer, the step, also at another number of processes or with other micro-batches. Samples of a stream have no
index: there, a run resumes at the beginning of a shard.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dgmr_tp.data.decoding import EXTENSIONS
from dgmr_tp.data.images import Images
from dgmr_tp.data.streams import Stream
from dgmr_tp.distillation.processes import ignore_sigterm_until
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.utils.distributed import all_gather_dict, get_rank, get_world_size

SampleKey = tuple[int, int]
"""Epoch and index of a sample."""
CROP_SCHEME = 1
"""Version of the order of samples and of their crops. Raise it if either changes, because cached features and
checkpoints of the old scheme do not fit the new one."""
NO_ROW = -1
"""Row number of a crop that must not be cached."""


def check_same_files(images: Images | Stream) -> None:
    """Raise DgmrError if the processes see different files, as on a slow network disk. Every process must call it."""
    if isinstance(images, Stream):
        names = images.shards
    else:
        names = [
            f"{record.name.removeprefix(str(images.source))} {record.offset} {record.length}"
            for record in images.records
        ]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    if len(set(all_gather_dict({get_rank(): digest}).values())) > 1:
        raise DgmrError(
            f"the processes do not see the same files in {images.source}. "
            "Make them the same on all machines and run again."
        )


class Sample(NamedTuple):
    """A crop, or a batch of crops."""

    images: Tensor
    """Pixels ``[batch, 3, height, width]``; for text tuning, image embeddings ``[batch, embedding]``."""
    names: list[str]
    broken: dict[str, str]
    """Images that did not decode while this sample was read, and the errors."""
    shard: tuple[int, int] = (0, 0)
    """For a stream: the number of the reader, and its position in the endless order of shards."""
    texts: Tensor | None = None
    """For text tuning: token ids."""
    rows: list[int] = []  # noqa: RUF012
    """Row numbers of the crops in the feature cache. Equal numbers mean equal crops, except :data:`NO_ROW`. Empty for a
    stream."""


class Crops(Dataset):
    """Random crops, addressed by (epoch, index). A broken image is replaced by the next one that decodes.

    Args:
        images: source of the crops.
        transform: maps a PIL image to a crop, with torch's random numbers.
        seed: of the crops.
        fixed: give the same crop in every epoch.
    """

    def __init__(self, images: Images, transform: Callable[[Any], Tensor], seed: int, fixed: bool = False) -> None:
        self.images, self.transform, self.seed, self.fixed = images, transform, seed, fixed

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = (0 if self.fixed else key[0]), key[1]
        broken: dict[str, str] = {}
        for step in range(len(self.images)):
            position = (index + step) % len(self.images)
            image, name = self.images.read(position), self.images.records[position].name
            if image is not None:
                crop = _seeded_crop(self.transform, image, (self.seed, epoch, index))
                # If a disk fails for a moment, the features of the replacement must not be cached for this index.
                row = NO_ROW if step else epoch * len(self.images) + index
                return Sample(crop, [name], broken, rows=[row])
            broken[name] = self.images.broken[name]
        raise DgmrError(
            f"none of the {len(self.images)} images in {self.images.source} can be read. Check the files and run again."
        )


class StreamCrops(IterableDataset):
    """Random crops of a stream. Reader ``r`` of ``n``, over all processes and workers, takes every ``n``-th shard.

    Args:
        stream: source of the crops.
        transform: maps a PIL image to a crop, with torch's random numbers.
        seed: of the order of shards, of the images in them, and of the crops.
        first: position in the endless order of shards at which to start.
        rank: of this process; world: number of processes.
    """

    def __init__(
        self, stream: Stream, transform: Callable[[Any], Tensor], seed: int, first: int, rank: int, world: int
    ) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed
        self.first, self.rank, self.world = first, rank, world

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        readers, reader = self.world * workers, self.rank * workers + worker
        reported: set[str] = set()
        position = self.first + (reader - self.first) % readers
        last_with_image = self.first
        while True:
            if position - last_with_image > len(self.stream.shards) * readers:
                raise DgmrError(
                    f"{self.stream.source} contains no image that can be read. Its files must end in one of "
                    f"{', '.join(EXTENSIONS)}."
                )
            shard = self.stream.shard(position, self.seed)
            for number, (name, image) in enumerate(self.stream.read(shard, position)):
                broken = {name: error for name, error in self.stream.broken.items() if name not in reported}
                reported |= broken.keys()
                last_with_image = position
                crop = _seeded_crop(self.transform, image, (self.seed, position, number))
                yield Sample(crop, [name], broken, (reader, position))
            position += readers


def _seeded_crop(transform: Callable[[Any], Tensor], image: Any, seed: tuple[int, int, int]) -> Tensor:
    """Apply ``transform`` with torch's random generator at ``seed``, and restore the generator."""
    state = torch.get_rng_state()
    # torch.manual_seed would store every call with its traceback while CUDA is not in use yet.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    try:
        return transform(image)
    finally:
        torch.set_rng_state(state)


def global_batch(count: int, batch: int, seed: int, step: int) -> list[SampleKey]:
    """Return the ``batch`` samples of global batch ``step``: a slice of the epochs, each a permutation of ``count``."""
    keys: list[SampleKey] = []
    position = step * batch
    while len(keys) < batch:
        epoch, offset = divmod(position, count)
        indices = _order(count, seed, epoch)[offset : offset + batch - len(keys)]
        keys += [(epoch, int(index)) for index in indices]
        position += len(indices)
    return keys


def distinct_global_batch(count: int, batch: int, seed: int, step: int) -> list[SampleKey]:
    """Return global batch ``step`` without repeated samples.

    Unlike in :func:`global_batch`, the samples at the end of an epoch that do not fill a batch are not used.
    """
    epoch, position = divmod(step, count // batch)
    return [(epoch, int(index)) for index in _order(count, seed, epoch)[position * batch : (position + 1) * batch]]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batches(
    crops: Crops, *, batch: int, micro: int, seed: int, first_step: int, steps: int, rank: int, world: int, workers: int
) -> Generator[Sample]:
    """Yield this rank's share of the global batches ``first_step … steps − 1``, in pieces of ``micro`` crops."""

    def pieces() -> Iterator[list[SampleKey]]:
        for step in range(first_step, steps):
            share = global_batch(len(crops.images), batch, seed, step)[rank::world]
            for first in range(0, len(share), micro):
                yield share[first : first + micro]

    return _load(crops, workers, batch_sampler=pieces())


def stream_batches(crops: StreamCrops, *, micro: int, workers: int) -> Generator[Sample]:
    """Yield pieces of ``micro`` crops without end."""
    return _load(crops, workers, batch_size=micro)


def _load(crops: Dataset, workers: int, **batching: Any) -> Generator[Sample]:
    finished = multiprocessing.Event()
    loader = DataLoader(
        crops,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(ignore_sigterm_until, finished),
        **batching,
    )
    try:
        yield from loader
    except DgmrError as error:  # a worker's error has its traceback before the message
        raise DgmrError(first_line(error)) from None
    finally:
        finished.set()


def _collate(samples: list[Sample]) -> Sample:
    return Sample(
        torch.stack([sample.images for sample in samples]),
        [name for sample in samples for name in sample.names],
        {name: error for sample in samples for name, error in sample.broken.items()},
        samples[-1].shard,
        rows=[row for sample in samples for row in sample.rows],
    )


def evaluation_batches(
    images: Images, preprocess: Callable[[Any], Tensor], image_shape: Sequence[int], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of ``images``, every ``world_size``-th one, as an evaluation preprocesses them.

    All processes get the same number of images, because sharded parameters are gathered for each batch.

    Yields:
        Pixels ``[batch, channels, height, width]``, zeros in place of a missing image, and a boolean for each image
        that is there and decodes.
    """
    rank, world = get_rank(), get_world_size()
    for indices in torch.arange(rank, rank + world * -(-len(images) // world), world).split(batch_size):
        pixels, decoded = torch.zeros(len(indices), *image_shape), torch.zeros(len(indices), dtype=torch.bool)
        for row, index in enumerate(indices.tolist()):
            if index < len(images) and (image := images.read(index)) is not None:
                pixels[row], decoded[row] = preprocess(image), True
        yield pixels, decoded


def training_transform(
    preprocess: dict[str, Any], size: int | tuple[int, int], min_crop: float, flip: bool, augment: str = "clip"
) -> Callable[[Any], Tensor]:
    """Return a random resized crop (bicubic), normalized as the encoder expects it.

    Args:
        preprocess: the encoder's configuration, with ``mean`` and ``std``.
        size: height and width of the crop, pixels.
        min_crop: minimum area of the crop, as a share of the image.
        flip: mirror half of the crops.
        augment: ``clip``: nothing more. ``dinov2``: also DINOv2's color jitter, grayscale, blur and solarization
            (arXiv 2506.08591, DINOv2 path).
    """
    from torchvision.transforms import v2

    steps: list[Any] = [
        v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment == "dinov2":
        steps += [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            # 0.9 is what DINOv2's code does: its p = 0.1 is the probability of no blur.
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.9),
            v2.RandomSolarize(128, 0.2),
        ]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess["mean"], preprocess["std"])]
    return v2.Compose(steps)
