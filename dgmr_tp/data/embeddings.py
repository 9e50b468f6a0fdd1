"""Embeddings of many images, computed by all processes of a launch together. The model is given as a function."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgmr_tp.data.images import Images
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.utils.distributed import all_gather_dict, get_rank, get_world_size
from dgmr_tp.utils.progress import report_progress


@torch.no_grad()
def embed_share(
    embed: Callable[[Tensor], Tensor],
    preprocess: Callable[[Any], Tensor],
    images: Images,
    *,
    device: str | torch.device,
    batch_size: int = 64,
    workers: int = 0,
    title: str = "images",
) -> tuple[Tensor, Tensor]:
    """Embed this process's share of the images: every ``world_size``-th one.

    Args:
        embed: maps preprocessed images ``[batch, 3, height, width]`` on ``device`` to embeddings ``[batch, width]``.
        preprocess: maps a PIL image to a tensor.
        images: those that do not decode are left out, and are named in ``images.broken`` of every process.
        device: where the embeddings are computed and stay.
        batch_size: images in a batch.
        workers: data loading processes.
        title: of the progress meter.

    Returns:
        Embeddings, float32 ``[n, width]``, and the indices of their images, int64 ``[n]``.

    Raises:
        DgmrError: there are fewer images than processes, no image of the share can be read, or an embedding is not
            finite.
    """
    rank, world = get_rank(), get_world_size()
    if len(images) < world:
        raise DgmrError(
            f"{images.source} has {len(images)} images for {world} processes. Start at most one process an image."
        )
    share = _Share(images, preprocess, range(rank, len(images), world))
    embeddings, indices = [], []
    broken: dict[str, str] = {}
    loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=_collate, worker_init_fn=_ignore_sigterm)
    for step, (batch, batch_indices, batch_broken) in enumerate(loader, start=1):
        broken |= batch_broken
        if len(batch_indices):
            rows = check_embeddings(embed(batch.to(device)), str(images.source))
            embeddings.append(rows.float().to(device))
            indices.append(batch_indices)
        report_progress(title, min(len(share), step * batch_size), len(share))
    images.broken |= all_gather_dict(broken)
    if not embeddings:
        raise DgmrError(
            f"none of the {len(share)} images of {images.source} in the share of process {rank} can be read. "
            "Check the files."
        )
    result = torch.cat(embeddings)
    if not result.isfinite().all():
        raise DgmrError("the encoder's outputs are not finite. Check its weights, or run it in float32.")
    return result, torch.cat(indices)


_Item = tuple[Tensor | None, int, dict[str, str]]
"""A preprocessed image (None if it does not decode), its index, and its name and error if it does not decode."""


class _Share(Dataset):
    def __init__(self, images: Images, preprocess: Callable[[Any], Tensor], indices: range) -> None:
        self.images, self.preprocess, self.indices = images, preprocess, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Item:
        index = self.indices[position]
        if (image := self.images.read(index)) is not None:
            return self.preprocess(image), index, {}
        name = self.images.records[index].name
        return None, index, {name: self.images.broken[name]}


def _ignore_sigterm(worker: int) -> None:
    """Leave SIGTERM, which may be sent to all processes of a job, to the process that uses this data loading worker."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(items: list[_Item]) -> tuple[Tensor, Tensor, dict[str, str]]:
    readable = [(image, index) for image, index, _ in items if image is not None]
    batch = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    broken = {name: error for _, _, errors in items for name, error in errors.items()}
    return batch, torch.tensor([index for _, index in readable]), broken
