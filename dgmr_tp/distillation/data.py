"""The images of a distillation run in an order that does not depend on who asks.

The global order is a function of (seed, epoch); global batch ``k`` is a slice of it, a rank takes every ``world``-th sample
of the slice; the crop of a sample is seeded by (seed, epoch, sample). So a run is resumed from one integer, the step, also at
another number of processes or with other micro-batches. Shards of a URL cannot be addressed: there a run goes on at a shard.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache, partial
from multiprocessing.synchronize import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dgmr_tp.data.images import EXTENSIONS, Images
from dgmr_tp.data.streams import Stream
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import all_gather_dict, get_rank

Place = tuple[int, int]  # epoch, index


UNNUMBERED = -1


def check_seen_alike(images: Images | Stream) -> None:
    """Raises DgmrError if the processes list different files: on a network disk, one machine may be behind. Every process calls it."""
    if isinstance(images, Stream):
        names = images.shards
    else:
        names = [
            f"{record.name.removeprefix(str(images.source))} {record.offset} {record.length}"
            for record in images.records
        ]
    listed = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    if len(set(all_gather_dict({get_rank(): listed}).values())) > 1:
        raise DgmrError(
            f"the processes do not see the same files in {images.source}; have them alike on all machines, and run again"
        )


class Sample(NamedTuple):
    """One crop, or several collated."""

    images: Tensor
    names: list[str]
    broken: dict[str, str]
    """Name and error of images that did not decode on the way to it."""
    shard: tuple[int, int] = (0, 0)
    """Of a stream: which reader, and the position of its shard in the endless order."""
    texts: Tensor | None = None
    """Of images with captions, whose embeddings then stand in place of them: token ids."""
    rows: list[int] = []  # noqa: RUF012
    """Numbers of the crops; equal numbers are equal crops, but for ``UNNUMBERED``. Of a stream: none."""


class Crops(Dataset):
    """Random crops of ``images``, addressed by (epoch, index); a broken image is replaced by the next one that is not.

    ``fixed`` crops are the same in every epoch.
    """

    def __init__(self, images: Images, transform: Callable[[Any], Tensor], seed: int, fixed: bool = False) -> None:
        self.images, self.transform, self.seed, self.fixed = images, transform, seed, fixed

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = (0 if self.fixed else place[0]), place[1]
        broken: dict[str, str] = {}
        for step in range(len(self.images)):
            at = (index + step) % len(self.images)
            image, name = self.images.read(at), self.images.records[at].name
            if image is not None:
                crop = _crop(self.transform, image, (self.seed, epoch, index))
                # A disk that fails for a moment must not leave another image's features under this number.
                return Sample(crop, [name], broken, rows=[UNNUMBERED if step else epoch * len(self.images) + index])
            broken[name] = self.images.broken[name]
        raise DgmrError(f"none of the {len(self.images)} images in {self.images.source} can be read")


class StreamCrops(IterableDataset):
    """Random crops of a stream: reader ``r`` of ``n`` (over all processes and their workers) takes every ``n``-th shard.

    ``first`` is the position in the endless order of shards at which a resumed run goes on.
    """

    def __init__(
        self, stream: Stream, transform: Callable[[Any], Tensor], seed: int, first: int, rank: int, world: int
    ) -> None:
        self.stream, self.transform, self.seed, self.first, self.rank, self.world = (
            stream,
            transform,
            seed,
            first,
            rank,
            world,
        )

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        readers, reader = self.world * workers, self.rank * workers + mine
        known: set[str] = set()
        position = self.first + (reader - self.first) % readers
        found = self.first  # the last position with an image
        while True:
            if position - found > len(self.stream.shards) * readers:
                raise DgmrError(
                    f"{self.stream.source} holds no image that can be read; endings: {', '.join(EXTENSIONS)}"
                )
            for number, (name, image) in enumerate(self.stream.read(self.stream.shard(position, self.seed), position)):
                broken = {name: error for name, error in self.stream.broken.items() if name not in known}
                known |= broken.keys()
                found = position
                yield Sample(
                    _crop(self.transform, image, (self.seed, position, number)), [name], broken, (reader, position)
                )
            position += readers


def _crop(transform: Callable[[Any], Tensor], image: Any, seed: tuple[int, int, int]) -> Tensor:
    before = torch.get_rng_state()
    # Not torch.manual_seed: where CUDA is not in use yet, it stores every call with its traceback.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    try:
        return transform(image)
    finally:
        torch.set_rng_state(before)


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


def distinct_places(count: int, batch: int, seed: int, step: int) -> list[Place]:
    """As :func:`places`, but no sample is twice in a batch: what an epoch leaves of one is not used."""
    epoch, position = divmod(step, count // batch)
    return [(epoch, int(index)) for index in _order(count, seed, epoch)[position * batch : (position + 1) * batch]]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batches(
    crops: Crops, *, batch: int, micro: int, seed: int, first_step: int, steps: int, rank: int, world: int, workers: int
) -> Generator[Sample]:
    """This rank's part of the global batches ``first_step … steps − 1``, in pieces of ``micro`` crops."""
    mine = (
        part[first : first + micro]
        for step in range(first_step, steps)
        for part in [places(len(crops.images), batch, seed, step)[rank::world]]
        for first in range(0, len(part), micro)
    )
    return _loaded(crops, workers, batch_sampler=mine)


def stream_batches(crops: StreamCrops, *, micro: int, workers: int) -> Generator[Sample]:
    """Endless pieces of ``micro`` crops."""
    return _loaded(crops, workers, batch_size=micro)


def _loaded(crops: Dataset, workers: int, **how: Any) -> Generator[Sample]:
    over = multiprocessing.Event()
    stay = partial(_stay_until, over)
    loader = DataLoader(
        crops,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=stay,
        **how,
    )
    try:
        yield from loader
    except DgmrError as error:  # a worker's comes with its traceback before it
        raise DgmrError(str(error).strip().splitlines()[-1].removeprefix("dgmr_tp.errors.DgmrError: ")) from None
    finally:
        over.set()


def _stay_until(over: Event, worker: int) -> None:
    """A SIGTERM to all processes of a job must not take the readers away before the last step is over."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over.is_set() else None)


def _collated(samples: list[Sample]) -> Sample:
    return Sample(
        torch.stack([sample.images for sample in samples]),
        [name for sample in samples for name in sample.names],
        {name: error for sample in samples for name, error in sample.broken.items()},
        samples[-1].shard,
        rows=[row for sample in samples for row in sample.rows],
    )


def training_transform(
    preprocess: dict[str, Any], size: int, min_crop: float, flip: bool, augment: str = "clip"
) -> Callable[[Any], Tensor]:
    """Random resized crop (area ``min_crop`` to 1, bicubic), mirrored half of the time, normalised as the encoder wants it.

    ``augment="dinov2"`` adds DINOv2's changes of colour, blur and solarisation (arXiv 2506.08591, its DINOv2 path).
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
            v2.RandomApply(
                [v2.GaussianBlur(9, (0.1, 2.0))], 0.9
            ),  # as its code runs: its p = 0.1 is the chance of no blur
            v2.RandomSolarize(128, 0.2),
        ]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess["mean"], preprocess["std"])]
    return v2.Compose(steps)
