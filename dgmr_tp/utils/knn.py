"""k-nearest-neighbour classification as DINO and DINOv2 do it: cosine similarity, votes weighed by ``exp(similarity / temperature)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
QUERIES = 1024
"""Queries whose similarities to a block of the bank are in memory at a time."""


def nearest(bank: Tensor, queries: Tensor, count: int, block: int = 65536) -> tuple[Tensor, Tensor]:
    """The ``count`` most similar rows of ``bank`` (all, if it has fewer) for every query.

    Args:
        bank: ``[n, d]``; queries: ``[m, d]``; any length, on one device.
        count: how many neighbours.
        block: rows of the bank that are compared at a time, so that memory stays ``m · block``.

    Returns:
        Cosine similarities, falling, and row numbers, each ``[m, count]``.
    """
    queries = F.normalize(queries, dim=-1)
    similar = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for first in range(0, len(bank), block):
        found = queries @ F.normalize(bank[first : first + block], dim=-1).T
        rows = torch.arange(first, first + found.shape[1], device=queries.device).expand_as(found)
        similar, order = torch.cat([similar, found], 1).topk(min(count, first + found.shape[1]))
        index = torch.cat([index, rows], 1).gather(1, order)
    return similar, index


def nearest_classes(bank: Tensor, classes: Tensor, queries: Tensor, count: int = 20) -> Tensor:
    """The class ``[m]`` of every query by its ``count`` nearest rows of ``bank``, whose classes are ``classes`` ``[n]``."""
    similar, index = nearest(bank, queries, count)
    return vote(similar, classes[index], int(classes.max()) + 1)


def vote(similar: Tensor, classes: Tensor, number: int, temperature: float = TEMPERATURE) -> Tensor:
    """The class ``[m]`` that the neighbours, of ``classes`` ``[m, k]`` out of ``number``, vote for."""
    weights = (similar / temperature).softmax(1)
    return (
        torch.zeros(len(classes), number, device=similar.device, dtype=weights.dtype)
        .scatter_add_(1, classes, weights)
        .argmax(1)
    )
