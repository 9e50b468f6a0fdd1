"""k-NN accuracy of an encoder's embeddings, measured as in DINOv2. The processes of a launch share the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dgmr_tp.data.embeddings import embed_share
from dgmr_tp.data.images import Images, check_classes
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.config import Config, DataPath
from dgmr_tp.utils.distributed import all_gather_rows, all_reduce_sum
from dgmr_tp.utils.knn import predict_classes

NEIGHBORS = (10, 20, 100, 200)


class KNNConfig(Config):
    """k-NN accuracy of the embeddings. It needs no text tower."""

    train: Annotated[str, DataPath()]
    """Labeled images: a directory with a subdirectory per class, or tar files with ``.cls``."""
    test: Annotated[str, DataPath()]
    """Labeled images to classify, in the same form."""
    workers: int = Field(0, ge=0)
    """Number of processes that read images."""


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
    """Return the top-1 accuracy of a k-NN classifier with k = 10, 20, 100, 200 and temperature 0.07.

    Under torch.distributed every process embeds and classifies its share of the images, and all return the same
    figures. Images that cannot be decoded are left out and listed in ``train.broken`` and ``test.broken``.

    Args:
        embed: maps preprocessed images ``[batch, 3, height, width]`` on ``device`` to embeddings ``[batch, width]``.
        preprocess: maps a PIL image to a tensor.
        train, test: labeled images: directories with a subdirectory per class, or tar files with ``.cls``.
        device: device on which embeddings are computed and compared.
        batch_size: images per batch.
        workers: number of processes that read images.

    Returns:
        ``{"knn@10": …, "knn@20": …, …}`` as fractions. A k above the number of training images is left out.

    Raises:
        DgmrError: an image has no class, a test class does not occur in training, the training images that decode have
            one class or are fewer than ten, or an embedding is not finite.
    """
    train_classes, test_classes = train.classes(), test.classes()
    _check_training_classes(train, train_classes, test, test_classes)
    names = sorted(set(train_classes))
    number = {name: i for i, name in enumerate(names)}
    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers}
    share = embed_share(embed, preprocess, train, title="training images", **options)
    bank, places = (all_gather_rows(part.to(device)) for part in share)
    _check_training_classes(train, [train_classes[place] for place in places.tolist()], test, test_classes)
    if len(bank) < min(NEIGHBORS):
        raise DgmrError(
            f"{train.source} has {len(bank)} images that decode, and {min(NEIGHBORS)} neighbors are the fewest that "
            "vote. Give more training images."
        )
    labels = torch.tensor([number[train_classes[place]] for place in places.tolist()], device=bank.device)
    queries, places = embed_share(embed, preprocess, test, title="test images", **options)
    answers = torch.tensor([number[test_classes[place]] for place in places.tolist()], device=bank.device)
    correct = (predict_classes(bank, labels, queries, NEIGHBORS) == answers).sum(1)
    counts = all_reduce_sum(torch.cat([correct, correct.new_tensor([len(queries)])]).double())
    return {f"knn@{k}": float(counts[i] / counts[-1]) for i, k in enumerate(NEIGHBORS) if k <= len(bank)}


def _check_training_classes(train: Images, train_classes: list[str], test: Images, test_classes: list[str]) -> None:
    """Raise DgmrError if a test class does not occur in training, or if there is a single class to choose from."""
    if missing := set(test_classes) - set(train_classes):
        raise DgmrError(
            f"{test.source} has the class {min(missing)!r}, which is missing in {train.source}. Give both the same "
            "classes."
        )
    check_classes(train.source, train.records, train_classes, at_least=2)
