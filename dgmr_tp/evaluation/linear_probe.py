"""Linear probe on a CPU: scikit-learn's logistic regression on image features.

clip_benchmark's own linear probe needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.lazy_imports import require

INVERSE_REGULARIZATION = (1.0, 10.0, 100.0, 1000.0)
"""Candidates for scikit-learn's ``C``. One is chosen on a fifth of the training images."""
Batches = Iterable[tuple[Tensor, Tensor]]


def linear_probe(
    model: nn.Module, train: Batches, test: Batches, fewshot_k: int = -1, *_: Any, normalize: bool = True, **__: Any
) -> dict[str, float]:
    """Return the top-1 accuracy of a logistic regression on the image features.

    The function takes the arguments of clip_benchmark's linear probe and ignores those that it does not need.

    Args:
        model: module with ``encode_image`` on the CPU.
        train, test: batches of images and labels.
        fewshot_k: training images per class, the first in a random order; -1 for all.
        normalize: normalize the features to length 1.

    Returns:
        ``{"lp_acc1_sklearn": …}`` as a fraction. The name differs from clip_benchmark's because the method does.

    Raises:
        DgmrError: there is one class, or a class has fewer training images than ``fewshot_k``.
    """
    train_features, train_labels = (part.numpy() for part in image_features(model, train, normalize=normalize))
    test_features, test_labels = (part.numpy() for part in image_features(model, test, normalize=normalize))
    if len(np.unique(train_labels)) < 2:
        raise DgmrError("the training images have one class. Give images of two or more classes.")
    rows = np.random.default_rng(0).permutation(len(train_labels))
    if fewshot_k > 0:
        rows = np.concatenate([rows[train_labels[rows] == label][:fewshot_k] for label in np.unique(train_labels)])
        if (np.bincount(train_labels[rows], minlength=1)[np.unique(train_labels)] < fewshot_k).any():
            raise DgmrError(
                f"a class has fewer training images than --fewshot_k {fewshot_k}. Lower --fewshot_k, or give more "
                "images."
            )
    probe = fit_logistic_regression(train_features[rows], train_labels[rows])
    return {"lp_acc1_sklearn": float(probe.score(test_features, test_labels))}


def fit_logistic_regression(features: np.ndarray, labels: Sequence[Any] | np.ndarray) -> Any:
    """Return scikit-learn's logistic regression, with its regularization chosen on a held-out fifth of the images."""
    selection, linear = require("sklearn.model_selection", "eval"), require("sklearn.linear_model", "eval")
    held_out = selection.ShuffleSplit(1, test_size=0.2, random_state=0)
    candidates = {"C": INVERSE_REGULARIZATION}
    return selection.GridSearchCV(linear.LogisticRegression(max_iter=1000), candidates, cv=held_out).fit(
        features, labels
    )


@torch.no_grad()
def image_features(
    model: nn.Module, batches: Batches, *, device: str = "cpu", normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the features ``[n, width]`` in float32 and the labels ``[n]`` of all batches, on the CPU."""
    features, labels = [], []
    for images, batch_labels in batches:
        embeddings = model.encode_image(images.to(device))  # type: ignore[operator]
        features.append((F.normalize(embeddings, dim=-1) if normalize else embeddings).float().cpu())
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)
