"""The teacher's outputs for a fixed set of training images, which some losses need before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgmr_tp.data.images import Images
from dgmr_tp.distillation.data import evaluation_batches
from dgmr_tp.distillation.losses import Features, TeacherBank
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.utils.distributed import all_gather_rows, all_reduce_sum, get_world_size

NUM_BANK_IMAGES = 2048
"""Maximum number of images in a bank."""
MIN_DEVIATION = 0.1
"""Minimum standard deviation of a channel, relative to the mean over channels. It limits the weight of channels that
hardly vary."""


def bank_size(images: Images) -> int:
    """Return the number of images that a bank draws from ``images``."""
    return min(NUM_BANK_IMAGES, len(images))


@torch.no_grad()
def compute_bank(
    images: Images,
    preprocess: Callable[[Any], Tensor],
    teacher: Callable[[Tensor], Features],
    image_shape: Sequence[int],
    batch_size: int,
    seed: int,
) -> TeacherBank:
    """Compute the bank of 2,048 images, or of all if there are fewer. Every process must call it, and all get the same.

    It depends on the images and the seed alone, so that a training that resumes has the bank with which it began.

    Args:
        images: training images. Those that do not decode are left out.
        preprocess: as for evaluation, without random crops.
        teacher: maps a batch to features, with ``embedding`` among them.
        image_shape: ``[channels, height, width]`` of a preprocessed image.
        batch_size: images in a batch.
        seed: of the choice of images.

    Raises:
        DgmrError: no image decodes, or an embedding is not finite.
    """
    chosen, _ = images.split(bank_size(images), seed)
    embeddings, decoded = [], []
    moments: dict[str, Tensor] = {}
    for pixels, is_decoded in evaluation_batches(chosen, preprocess, image_shape, batch_size):
        features = teacher(pixels)
        is_decoded = is_decoded.to(features["embedding"].device)
        for name, feature in features.items():
            moments[name] = moments.get(name, 0) + _moments(feature[is_decoded])
        embeddings.append(features["embedding"].float())
        decoded.append(is_decoded)
    rows, are_decoded = (_in_order(torch.cat(parts)) for parts in (embeddings, decoded))
    if not are_decoded.any():
        raise DgmrError(
            f"none of {len(chosen)} images of {images.source} can be read, which distill.loss compares with. "
            "Repair them, or choose a loss without balanced and neighbors."
        )
    return TeacherBank(
        F.normalize(check_embeddings(rows[are_decoded], str(images.source)), dim=-1),
        {name: _deviation(all_reduce_sum(value)) for name, value in moments.items()},
    )


def _in_order(own_rows: Tensor) -> Tensor:
    """Gather the rows of all processes, of which each has every ``world_size``-th one, in the order of the images."""
    return all_gather_rows(own_rows).unflatten(0, (get_world_size(), -1)).transpose(0, 1).flatten(0, 1)


def _moments(feature: Tensor) -> Tensor:
    """Return the number of vectors in ``feature``, ``[..., width]``, and their sum and sum of squares, in float64.

    Shape ``[3, width]``.
    """
    vectors = feature.double().flatten(0, -2)
    return torch.stack([vectors.new_full(vectors.shape[1:], len(vectors)), vectors.sum(0), vectors.square().sum(0)])


def _deviation(moments: Tensor) -> Tensor:
    """Return the standard deviation of every channel, at least :data:`MIN_DEVIATION` of their mean."""
    count, total, squares = moments
    deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
    return deviation.clamp(min=float(MIN_DEVIATION * deviation.mean())).float()
