"""k-nearest-neighbor classification as in DINOv2: cosine similarity, with votes ``exp(similarity / temperature)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
QUERY_CHUNK = 1024
"""Queries whose similarities to a block of the bank are in memory at a time."""


def nearest(bank: Tensor, queries: Tensor, count: int, block: int = 65536) -> tuple[Tensor, Tensor]:
    """Find the ``count`` most similar rows of ``bank`` (all of them, if it has fewer) for every query.

    Args:
        bank: ``[n, d]``, vectors of any length.
        queries: ``[m, d]``, likewise, on the same device.
        count: number of neighbors.
        block: rows of the bank that are compared at a time, so that the memory needed is ``m · block``.

    Returns:
        Cosine similarities, in falling order, and row numbers, each ``[m, count]``.
    """
    queries = F.normalize(queries, dim=-1)
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for first in range(0, len(bank), block):
        block_similarity = queries @ F.normalize(bank[first : first + block], dim=-1).T
        width = block_similarity.shape[1]
        rows = torch.arange(first, first + width, device=queries.device).expand_as(block_similarity)
        similarity, order = torch.cat([similarity, block_similarity], 1).topk(min(count, first + width))
        index = torch.cat([index, rows], 1).gather(1, order)
    return similarity, index


def predict_classes(
    bank: Tensor, classes: Tensor, queries: Tensor, counts: Sequence[int], own_rows: Tensor | None = None
) -> Tensor:
    """Predict the class of every query from its nearest neighbors, for several numbers of neighbors at once.

    Args:
        bank: ``[n, d]``; classes: their classes, int64 ``[n]``.
        queries: ``[m, d]``.
        counts: numbers of neighbors that vote.
        own_rows: row of the bank that is the query itself and has no vote, int64 ``[m]`` (leave-one-out).

    Returns:
        Predicted classes, int64 ``[len(counts), m]``.
    """
    num_classes = int(classes.max()) + 1
    extra = 0 if own_rows is None else 1
    predictions = []
    for chunk in torch.arange(len(queries), device=queries.device).split(QUERY_CHUNK):
        similarity, index = nearest(bank, queries[chunk], max(counts) + extra)
        if own_rows is not None:
            similarity = similarity.masked_fill(index == own_rows[chunk, None], -torch.inf)
        votes = [(similarity[:, : count + extra], classes[index[:, : count + extra]]) for count in counts]
        predictions.append(torch.stack([vote(*neighbors, num_classes) for neighbors in votes]))
    return torch.cat(predictions, dim=1)


def nearest_classes(bank: Tensor, classes: Tensor, queries: Tensor, count: int = 20) -> Tensor:
    """Predict the class of every query from its ``count`` nearest rows of ``bank``; see :func:`predict_classes`."""
    return predict_classes(bank, classes, queries, (count,))[0]


def vote(similarity: Tensor, classes: Tensor, num_classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """Return the class ``[m]`` with the largest sum of votes.

    Args:
        similarity: of the neighbors, ``[m, k]``.
        classes: of the neighbors, int64 ``[m, k]``.
        num_classes: number of classes.
        temperature: a neighbor's vote is ``exp(similarity / temperature)``.
    """
    weights = (similarity / temperature).softmax(1)
    votes = torch.zeros(len(classes), num_classes, device=similarity.device, dtype=weights.dtype)
    return votes.scatter_add_(1, classes, weights).argmax(1)
