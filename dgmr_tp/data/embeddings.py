"""Embeddings of many images; the processes of a launcher share the work. Models come in as functions."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgmr_tp.data.images import Images
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import all_gather_dict, get_rank, get_world_size
from dgmr_tp.utils.progress import report_progress


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
) -> tuple[Tensor, Tensor]:
    """Embeddings, float32 ``[n, width]`` on ``device``, and places in ``images``, ``[n]``, of this process's share.

    A share is every ``world``-th image; those that do not decode are left out, and named in ``images.broken`` of every process.

    Raises:
        DgmrError: there are fewer images than processes, or none of the share can be read.
    """
    rank, world = get_rank(), get_world_size()
    if len(images) < world:
        raise DgmrError(f"{images.source} has {len(images)} images for {world} processes; start fewer")
    share = _Share(images, preprocess, range(rank, len(images), world))
    found, places = [], []
    broken: dict[str, str] = {}
    loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=_readable, worker_init_fn=_stay)
    for step, (batch, where, why) in enumerate(loader, start=1):
        broken |= why
        if len(where):
            found.append(embed(batch.to(device)).float().to(device))
            places.append(where)
        report_progress(title, min(len(share), step * batch_size), len(share))
    images.broken |= all_gather_dict(broken)
    if not found:
        raise DgmrError(f"none of the {len(share)} images of {images.source} that this process looked at can be read")
    return torch.cat(found), torch.cat(places)


class _Share(Dataset):
    def __init__(self, images: Images, preprocess: Callable[[Any], Tensor], chosen: range) -> None:
        self.images, self.preprocess, self.chosen = images, preprocess, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: int) -> tuple[Tensor | None, int, dict[str, str]]:
        place = self.chosen[at]
        if (image := self.images.read(place)) is not None:
            return self.preprocess(image), place, {}
        name = self.images.records[place].name
        return None, place, {name: self.images.broken[name]}


def _stay(worker: int) -> None:
    """A SIGTERM to all processes of a job is for the one that reads from this one to answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _readable(samples: list[tuple[Tensor | None, int, dict[str, str]]]) -> tuple[Tensor, Tensor, dict[str, str]]:
    there = [(image, place) for image, place, _ in samples if image is not None]
    batch = torch.stack([image for image, _ in there]) if there else torch.empty(0)
    broken = {name: error for _, _, why in samples for name, error in why.items()}
    return batch, torch.tensor([place for _, place in there]), broken
