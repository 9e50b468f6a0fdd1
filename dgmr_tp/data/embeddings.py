"""Embeddings of many images; the processes of a launcher share the work. Models come in as functions."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from dgmr_tp.data.images import Images
from dgmr_tp.errors import DgmrError

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def embedded_share(
    embed: Callable[[Tensor], Tensor],
    preprocess: Callable[[Any], Tensor],
    images: Images,
    *,
    device: str | torch.device,
    batch_size: int = 64,
    workers: int = 0,
    title: str = "images",
    progress: Progress = lambda title, done, total: None,
) -> tuple[Tensor, Tensor]:
    """Embeddings, float32 ``[n, width]`` on ``device``, and places in ``images``, ``[n]``, of this process's share.

    A share is every ``world``-th image; those that do not decode are left out.

    Raises:
        DgmrError: there are fewer images than processes, or none of the share can be read.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if len(images) < world:
        raise DgmrError(f"{images.source} has {len(images)} images for {world} processes; start fewer")
    share = _Share(images, preprocess, range(rank, len(images), world))
    found, places = [], []
    loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=_readable, worker_init_fn=_stay)
    for step, (batch, where) in enumerate(loader, start=1):
        if len(where):
            found.append(embed(batch.to(device)).float().to(device))
            places.append(where)
        progress(title, min(len(share), step * batch_size), len(share))
    if not found:
        raise DgmrError(f"none of the {len(share)} images of {images.source} that this process looked at can be read")
    return torch.cat(found), torch.cat(places)


def from_all(part: Tensor) -> Tensor:
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


class _Share(Dataset):
    def __init__(self, images: Images, preprocess: Callable[[Any], Tensor], chosen: range) -> None:
        self.images, self.preprocess, self.chosen = images, preprocess, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: int) -> tuple[Tensor | None, int]:
        image = self.images.read(self.chosen[at])
        return (None if image is None else self.preprocess(image)), self.chosen[at]


def _stay(worker: int) -> None:
    """A SIGTERM to all processes of a job is for the one that reads from this one to answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _readable(samples: list[tuple[Tensor | None, int]]) -> tuple[Tensor, Tensor]:
    there = [(image, place) for image, place in samples if image is not None]
    return torch.stack([image for image, _ in there]) if there else torch.empty(0), torch.tensor([place for _, place in there])
