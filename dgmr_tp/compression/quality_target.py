"""The smallest encoder that keeps a promise, measured on the user's own images: ``min_cosine`` or ``max_drop``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from dgmr_tp.compression.criteria import Rankings, block_sites, rank
from dgmr_tp.compression.prune import Pruned, prune
from dgmr_tp.data.images import Images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.pruning.allocation import minimum_widths
from dgmr_tp.pruning.cost import parameter_cost, parameters
from dgmr_tp.utils.knn import nearest_classes
from dgmr_tp.utils.modules import evaluating

FEWEST = 50
"""Images that have to judge."""
HALVINGS = 8
"""Trials: the result has at most a 128th of what can be cut more than the fewest parameters that keep the promise."""


class Trial(NamedTuple):
    """One size that was tried."""

    parameters: int
    value: float
    """Mean cosine, or drop of the k-NN accuracy as a fraction, on the images held out."""
    bound: float
    """The end of the 95 % bootstrap interval on the unfavourable side; this is what has to keep the promise."""
    kept: bool


class Promise(NamedTuple):
    """What :func:`prune_to_promise` returns."""

    pruned: Pruned
    trials: list[Trial]
    """In the order in which they were made."""

    @property
    def judged(self) -> Trial:
        """The trial of ``pruned``: the smallest that kept the promise."""
        return min((trial for trial in self.trials if trial.kept), key=lambda trial: trial.parameters)


def prune_to_promise(
    model: OpenedModel,
    images: str | Path,
    *,
    min_cosine: float | None = None,
    max_drop: float | None = None,
    criterion: str = "output",
    calibration: int = 1024,
    held_out: int = 512,
    round_to: int = 1,
    damping: float = 1e-3,
    seed: int = 0,
    rankings: Rankings | None = None,
) -> Promise:
    """Prune and recover to the fewest parameters at which the embedding still is what it was.

    The sizes are those of one ranking with fitted widths (:meth:`Rankings.plan`), searched by halving. Each trial is pruned,
    recovered on the calibration images, and judged on others, which recovery did not see, nor selection if it is done here.

    Args:
        model: the original; unchanged.
        images: a folder, a tar or shards of images like those that are served.
        min_cosine: the mean cosine between old and new embedding has to be this high.
        max_drop: the accuracy of a k-NN classifier (k = 20, calibration images as neighbours) may fall by this fraction of all
            images; needs classes: sub-folders, or ``.cls`` in tars. Give one of the two.
        criterion, calibration, round_to, damping, seed: as for :func:`dgmr_tp.prune`.
        held_out: how many images judge.
        rankings: made before; then ``criterion`` is theirs. Made on other images, or on as many of these with the same ``seed``, they do
            not know the judges.

    Raises:
        DgmrError: not one of the two is given, too few images (with ``rankings``: fewer than ``calibration + held_out``), no classes, or
            not even the whole tower keeps the promise.
    """
    if (min_cosine is None) == (max_drop is None):
        raise DgmrError("give either min_cosine or max_drop")
    name, limit = ("min_cosine", min_cosine) if max_drop is None else ("max_drop", max_drop)
    if limit is None or not 0 < limit < 1:
        raise DgmrError(f"{name} = {limit}; it must be between 0 and 1")
    if held_out < FEWEST:
        raise DgmrError(f"held_out = {held_out}; {FEWEST} images are the fewest that can bear a promise")
    pictures, labels = Images.find(images).labelled(calibration + held_out, seed, model.preprocess)
    if len(pictures) < held_out + 10:
        raise DgmrError(
            f"{images} holds {len(pictures)} images; {held_out} to judge by and at least 10 to calibrate on are needed"
        )
    if rankings and len(pictures) < calibration + held_out:
        raise DgmrError(
            f"{images} holds {len(pictures)} images that can be read, fewer than the {calibration} to calibrate on and the {held_out} to "
            "judge by: the ranking might know the judges; add images, or take fewer of the two"
        )
    if max_drop is not None and None in labels:
        raise DgmrError(
            f"max_drop compares accuracies, but not every image in {images} has a class; give sub-folders, or min_cosine"
        )
    pictures = pictures.to(next(model.tower.parameters()))
    seen, judged = list(pictures[:-held_out].split(64)), list(pictures[-held_out:].split(64))
    rankings = rankings or rank(model, criterion, seen)
    classes = torch.tensor(np.unique([str(label) for label in labels], return_inverse=True)[1])

    def right(encoder: OpenedModel, found: Tensor) -> Tensor:
        return nearest_classes(_embeddings(encoder, seen), classes[:-held_out], found) == classes[-held_out:]

    dense = _embeddings(model, judged)
    before = right(model, dense) if max_drop is not None else None

    def trial(count: int) -> tuple[Pruned, Trial]:
        plan = rankings.plan(model, budget={"params": count}, round_to=round_to)
        pruned = prune(model, seen, plan=plan, damping=damping)
        found = _embeddings(pruned.model, judged)
        if before is None:
            values = F.cosine_similarity(found, dense).numpy()
            bound = _interval(values, seed).low
            kept = bound >= limit
        else:
            values = before.float().numpy() - right(pruned.model, found).float().numpy()
            bound = _interval(values, seed).high
            kept = bound <= limit
        return pruned, Trial(parameters(pruned.model.tower), float(values.mean()), float(bound), bool(kept))

    tower, sites = model.tower, block_sites(model) or []
    cost = parameter_cost(tower, sites)
    fewest = cost.without(
        {
            site.name: site.hidden - count
            for site, count in zip(sites, minimum_widths(sites, round_to).values(), strict=True)
        }
    )
    low, high, count = fewest, cost.total, fewest  # the fewest may do
    best, trials = None, []
    for _ in range(HALVINGS):
        pruned, made = trial(count)
        trials.append(made)
        if made.kept:
            pruned.model.module.cpu()  # the device is for the original and one trial
            best, high = pruned, count
        else:
            low = count
        del pruned
        if high == fewest:
            break
        count = (low + high) // 2
    if best is None:
        closest = trials[-1]
        raise DgmrError(
            f"{name} = {limit} is not kept even at {closest.parameters:,} of {cost.total:,} parameters: {closest.value:.4f}, "
            f"interval to {closest.bound:.4f}; hold out more images, or promise less"
        )
    best.model.module.to(pictures.device)
    return Promise(best, trials)


@torch.no_grad()
def _embeddings(model: OpenedModel, batches: Sequence[Tensor]) -> Tensor:
    with evaluating(model.tower):
        return torch.cat([ImageEncoder(model.adapter)(batch).float().cpu() for batch in batches])


def _interval(values: np.ndarray, seed: int) -> Any:
    """The 95 % bootstrap interval of the mean."""
    bootstrap = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    )
    return bootstrap.confidence_interval
