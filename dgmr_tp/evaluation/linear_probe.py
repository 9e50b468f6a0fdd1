"""A linear probe for machines without a GPU, where clip_benchmark has none: scikit-learn's logistic regression on the same features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.lazy_imports import require

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Inverse strengths of the ridge; one is chosen on a fifth of the training images."""
Batches = Iterable[tuple[Tensor, Tensor]]


def linear_probe(
    model: nn.Module, train: Batches, test: Batches, fewshot_k: int = -1, *_: Any, normalize: bool = True, **__: Any
) -> dict[str, float]:
    """Top-1 of a logistic regression on the image features; takes the arguments of clip_benchmark's function.

    Args:
        model: has ``encode_image``.
        train, test: batches of images and classes.
        fewshot_k: images of every class to learn from, the first of a random order; -1 for all.
        normalize: features get length 1.

    Returns:
        ``{"lp_acc1_sklearn": …}`` as a fraction: the name says that it is not clip_benchmark's own.

    Raises:
        DgmrError: a class has fewer training images than ``fewshot_k``.
    """
    (features, classes), (judged, answers) = (_features(model, batches, normalize) for batches in (train, test))
    chosen = np.random.default_rng(0).permutation(len(classes))
    if fewshot_k > 0:
        chosen = np.concatenate([chosen[classes[chosen] == one][:fewshot_k] for one in np.unique(classes)])
        if (np.bincount(classes[chosen], minlength=1)[np.unique(classes)] < fewshot_k).any():
            raise DgmrError(f"--fewshot_k {fewshot_k}: a class has fewer training images")
    return {"lp_acc1_sklearn": float(regression(features[chosen], classes[chosen]).score(judged, answers))}


def regression(features: np.ndarray, classes: Sequence[Any]) -> Any:
    """scikit-learn's logistic regression, its strength chosen on a fifth of the images and then fitted to all."""
    selection, linear = require("sklearn.model_selection", "eval"), require("sklearn.linear_model", "eval")
    held_out = selection.ShuffleSplit(1, test_size=0.2, random_state=0)
    return selection.GridSearchCV(linear.LogisticRegression(max_iter=1000), {"C": STRENGTHS}, cv=held_out).fit(
        features, classes
    )


@torch.no_grad()
def _features(model: nn.Module, batches: Batches, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    features, classes = [], []
    for images, labels in batches:
        found = model.encode_image(images)  # type: ignore[operator]
        features.append((F.normalize(found, dim=-1) if normalize else found).float())
        classes.append(labels)
    return torch.cat(features).numpy(), torch.cat(classes).numpy()
