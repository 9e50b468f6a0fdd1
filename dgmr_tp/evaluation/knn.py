"""The k-NN accuracy of an encoder's embeddings, as DINOv2 measures it; the processes of a launcher share the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from dgmr_tp.data.images import Images
from dgmr_tp.errors import DgmrError
from dgmr_tp.neighbours import nearest, vote

NEIGHBOURS = (10, 20, 100, 200)
QUERIES = 1024
"""Test images whose similarities to a block of the bank are in memory at a time."""


def knn_accuracy(
    embed: Callable[[Tensor], Tensor],
    preprocess: Callable[[Any], Tensor],
    *,
    train: Images,
    test: Images,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> dict[str, float]:
    """Top-1 of the test images by their nearest training images, k = 10, 20, 100, 200, temperature 0.07.

    Under torch.distributed every process embeds and judges its share; all return the same. Images that do not decode are left out.

    Args:
        embed: preprocessed images ``[batch, 3, height, width]`` on ``device`` to embeddings ``[batch, width]``.
        preprocess: a PIL image to a tensor.
        train, test: images with classes: folders of folders, or tars with ``.cls``.
        device: where embeddings are compared.
        batch_size, workers: how images are read.
        progress: called with a title, images done and images in all.

    Returns:
        ``{"knn@10": …, "knn@20": …, …}`` as fractions; a k above the number of training images is left out.

    Raises:
        DgmrError: an image has no class, or a test class does not occur in training.
    """
    names = sorted({_class_of(images, i) for images in (train, test) for i in range(len(images))})
    number = {name: i for i, name in enumerate(names)}
    read = _Reader(embed, preprocess, number, torch.device(device), batch_size, workers, progress)
    bank, classes = (_from_all(part) for part in read(train, "training images"))
    if missing := {_class_of(test, i) for i in range(len(test))} - {names[i] for i in classes.unique().tolist()}:
        raise DgmrError(f"{test.source} has the class {min(missing)!r}, which {train.source} has not; both need the same classes")
    queries, answers = read(test, "test images")
    right = torch.zeros(len(NEIGHBOURS) + 1, dtype=torch.float64, device=bank.device)
    for part, wanted in zip(queries.split(QUERIES), answers.split(QUERIES), strict=True):
        similar, index = nearest(bank, part, max(NEIGHBOURS))
        for i, count in enumerate(NEIGHBOURS):
            right[i] += (vote(similar[:, :count], classes[index[:, :count]], len(names)) == wanted).sum()
        right[-1] += len(part)
    if distributed.is_initialized():
        distributed.all_reduce(right)
    return {f"knn@{count}": float(right[i] / right[-1]) for i, count in enumerate(NEIGHBOURS) if count <= len(bank)}


class _Reader:
    """Embeddings and class numbers of this process's share of some images."""

    def __init__(self, embed, preprocess, number, device, batch_size, workers, progress) -> None:  # type: ignore[no-untyped-def]
        self.embed, self.preprocess, self.number, self.device = embed, preprocess, number, device
        self.batch_size, self.workers, self.progress = batch_size, workers, progress

    @torch.no_grad()
    def __call__(self, images: Images, title: str) -> tuple[Tensor, Tensor]:
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        if len(images) < world:
            raise DgmrError(f"{images.source} has {len(images)} images for {world} processes; start fewer")
        mine = range(rank, len(images), world)
        pictures = _Pictures(images, self.preprocess, self.number, mine)
        embeddings, classes = [], []
        for batch in DataLoader(pictures, self.batch_size, num_workers=self.workers, collate_fn=_whole):
            if batch is not None:
                embeddings.append(self.embed(batch[0].to(self.device)).float().to(self.device))
                classes.append(batch[1].to(self.device))
            self.progress(title, min(len(mine), len(embeddings) * self.batch_size), len(mine))
        if not embeddings:
            raise DgmrError(f"{images.source} has no image that can be read")
        return torch.cat(embeddings), torch.cat(classes)


class _Pictures(Dataset):
    def __init__(self, images: Images, preprocess: Callable[[Any], Tensor], number: dict[str, int], chosen: range) -> None:
        self.images, self.preprocess, self.number, self.chosen = images, preprocess, number, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: int) -> tuple[Tensor, int] | None:
        index = self.chosen[at]
        image = self.images.read(index)
        return None if image is None else (self.preprocess(image), self.number[_class_of(self.images, index)])


def _whole(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor] | None:
    there = [sample for sample in samples if sample is not None]
    return (torch.stack([image for image, _ in there]), torch.tensor([number for _, number in there])) if there else None


def _class_of(images: Images, index: int) -> str:
    name = images.records[index].class_name()
    if name is None:
        raise DgmrError(
            f"{images.records[index].name} has no class: k-NN needs a folder for every class, or tars with .cls beside the images"
        )
    return name


def _from_all(part: Tensor) -> Tensor:
    """The rows of all processes, one after the other."""
    if not distributed.is_initialized():
        return part
    sizes = [torch.zeros((), dtype=torch.long, device=part.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor(len(part), device=part.device))
    longest = int(max(sizes))
    padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    return torch.cat([rows[: int(size)] for rows, size in zip(gathered, sizes, strict=True)])
