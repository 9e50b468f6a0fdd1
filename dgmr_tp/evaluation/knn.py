"""The k-NN accuracy of an encoder's embeddings, as DINOv2 measures it; the processes of a launcher share the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgmr_tp.data.embeddings import embed_share
from dgmr_tp.data.images import Images
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import all_gather_rows, all_reduce_sum
from dgmr_tp.utils.knn import predict_classes

NEIGHBOURS = (10, 20, 100, 200)


def knn_accuracy(
    embed: Callable[[Tensor], Tensor],
    preprocess: Callable[[Any], Tensor],
    *,
    train: Images,
    test: Images,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, float]:
    """Top-1 of the test images by their nearest training images, k = 10, 20, 100, 200, temperature 0.07.

    Under torch.distributed every process embeds and judges its share; all return the same. Images that do not decode are left out.

    Args:
        embed: preprocessed images ``[batch, 3, height, width]`` on ``device`` to embeddings ``[batch, width]``.
        preprocess: a PIL image to a tensor.
        train, test: images with classes: folders of folders, or tars with ``.cls``.
        device: where embeddings are compared.
        batch_size, workers: how images are read.

    Returns:
        ``{"knn@10": …, "knn@20": …, …}`` as fractions; a k above the number of training images is left out.

    Raises:
        DgmrError: an image has no class, or a test class does not occur in training.
    """
    known, asked = train.classes(), test.classes()
    names = sorted({*known, *asked})
    number = {name: i for i, name in enumerate(names)}
    how: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers}
    bank, places = (
        all_gather_rows(part.to(device))
        for part in embed_share(embed, preprocess, train, title="training images", **how)
    )
    classes = torch.tensor([number[known[place]] for place in places.tolist()], device=bank.device)
    if missing := set(asked) - {names[i] for i in classes.unique().tolist()}:
        raise DgmrError(
            f"{test.source} has the class {min(missing)!r}, which {train.source} has not; both need the same classes"
        )
    queries, places = embed_share(embed, preprocess, test, title="test images", **how)
    answers = torch.tensor([number[asked[place]] for place in places.tolist()], device=bank.device)
    correct = (predict_classes(bank, classes, queries, NEIGHBOURS) == answers).sum(1)
    right = torch.cat([correct, correct.new_tensor([len(queries)])]).double()
    right = all_reduce_sum(right)
    return {f"knn@{count}": float(right[i] / right[-1]) for i, count in enumerate(NEIGHBOURS) if count <= len(bank)}
