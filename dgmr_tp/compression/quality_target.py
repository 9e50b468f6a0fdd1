"""The smallest model that meets a quality target on the user's own images: ``min_cosine`` or ``max_drop``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from dgmr_tp.compression.calibration import NUM_CALIBRATION_IMAGES, CalibrationImages
from dgmr_tp.compression.prune import Pruned, prune_by_plan
from dgmr_tp.compression.rankings import Rankings, rank
from dgmr_tp.data.images import Images, check_classes
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.pruning.allocation import given_amount, minimum_widths
from dgmr_tp.pruning.cost import parameter_cost, parameters
from dgmr_tp.utils.knn import nearest_classes
from dgmr_tp.utils.modules import evaluating

QUALITY_TARGETS = ("min_cosine", "max_drop")
"""Names of the quality targets."""
NUM_HELD_OUT_IMAGES = 512
MIN_HELD_OUT_IMAGES = 50
"""Minimum number of held-out images."""
MIN_RECOVERY_IMAGES = 10
MAX_TRIALS = 8
"""Maximum number of trials: the smallest size and seven bisection steps. The search ends within 1/128 of the prunable
parameters of the optimum."""
NUM_RESAMPLES = 2000
"""Resamples of the bootstrap interval."""


class Trial(NamedTuple):
    """One size that was tried."""

    parameters: int
    value: float
    """Mean cosine, or the drop of the k-NN accuracy as a fraction, on the held-out images."""
    bound: float
    """Unfavorable end of the 95 % bootstrap interval. It decides whether the target is met."""
    met: bool


class TargetResult(NamedTuple):
    """Result of :func:`prune_to_target`."""

    pruned: Pruned
    trials: list[Trial]
    """In the order in which they were made."""

    @property
    def best(self) -> Trial:
        """The trial of ``pruned``: the smallest size that meets the target."""
        return min((trial for trial in self.trials if trial.met), key=lambda trial: trial.parameters)


def prune_to_target(
    model: OpenedModel,
    images: str | Path,
    *,
    min_cosine: float | None = None,
    max_drop: float | None = None,
    criterion: str = "output",
    num_calibration_images: int = NUM_CALIBRATION_IMAGES,
    held_out: int = NUM_HELD_OUT_IMAGES,
    round_to: int = 1,
    damping: float = 1e-3,
    tune_steps: int = 0,
    seed: int = 0,
    rankings: Rankings | None = None,
) -> TargetResult:
    """Prune and recover to the fewest parameters that meet a quality target.

    The sizes are those of one ranking with fitted widths (:meth:`Rankings.plan`), searched by bisection. Each trial is
    pruned, recovered on the calibration images, and evaluated on held-out images that recovery did not see. Selection
    did not see them either if the ranking is made here.

    Args:
        model: the dense model; unchanged.
        images: a folder, a tar or shards of images like those that are served.
        min_cosine: minimum mean cosine between the embeddings of the pruned and the dense model.
        max_drop: maximum drop of the accuracy of a k-NN classifier, as a fraction of all images. k is 20, and the
            calibration images are the neighbors. It needs two or more classes: subfolders, or ``.cls`` in tars. Give
            one of the two.
        criterion, num_calibration_images, round_to, damping, tune_steps, seed: as for :func:`dgmr_tp.prune`.
        held_out: number of held-out images.
        rankings: rankings made before; ``criterion`` is then theirs. If they were made on other images, or on
            ``num_calibration_images`` of these with the same ``seed``, they did not see the held-out images.

    Raises:
        DgmrError: not exactly one target is given, there are too few images (with ``rankings``: fewer than
            ``num_calibration_images + held_out``), classes are missing, or no size that was tried meets
            the target.
    """
    name, limit = _target(min_cosine, max_drop)
    if held_out < MIN_HELD_OUT_IMAGES:
        raise DgmrError(f"held_out = {held_out} is too small. Hold out at least {MIN_HELD_OUT_IMAGES} images.")
    source = Images.find(images)
    pixels, labels = source.sample_labeled(num_calibration_images + held_out, seed, model.preprocess)
    _check_images(images, len(pixels), num_calibration_images, held_out, rankings)
    if max_drop is not None and None in labels:
        raise DgmrError(
            f"max_drop compares accuracies, but not every image in {images} has a class. Give subfolders, or use "
            "min_cosine."
        )
    if max_drop is not None:
        check_classes(images, source.records, labels, at_least=2)
    calibration = CalibrationImages(list(pixels[:-held_out].split(64)), source.broken, source.others, source.notice)
    held_out_batches = CalibrationImages(list(pixels[-held_out:].split(64)))
    rankings = rankings or rank(model, criterion, calibration)
    classes = torch.tensor(np.unique([str(label) for label in labels], return_inverse=True)[1])

    def correct(encoder: OpenedModel, queries: Tensor) -> Tensor:
        bank = _embeddings(encoder, calibration)
        return nearest_classes(bank, classes[:-held_out], queries) == classes[-held_out:]

    dense_embeddings = _embeddings(model, held_out_batches)
    dense_correct = correct(model, dense_embeddings) if max_drop is not None else None

    def try_size(count: int) -> tuple[Pruned, Trial]:
        plan = rankings.plan(model, budget={"params": count}, round_to=round_to)
        pruned, table = prune_by_plan(model, plan, calibration, damping=damping, tune_steps=tune_steps)
        embeddings = _embeddings(pruned, held_out_batches)
        if dense_correct is None:
            values = F.cosine_similarity(embeddings, dense_embeddings).numpy()
            bound = _interval(values, seed)[0]
            met = bound >= limit
        else:
            values = dense_correct.float().numpy() - correct(pruned, embeddings).float().numpy()
            bound = _interval(values, seed)[1]
            met = bound <= limit
        trial = Trial(parameters(pruned.tower), float(values.mean()), float(bound), bool(met))
        return Pruned(pruned, plan, table, calibration), trial

    cost = parameter_cost(model.tower, model.sites)
    smallest_widths = minimum_widths(model.sites, round_to)
    smallest = cost.without({site.name: site.hidden - smallest_widths[site.name] for site in model.sites})
    low, high, count = smallest, cost.total, smallest  # the smallest size may meet the target
    best, trials = None, []
    for _ in range(MAX_TRIALS):
        pruned, trial = try_size(count)
        trials.append(trial)
        if trial.met:
            best, high = pruned, count
        else:
            low = count
        del pruned
        if high == smallest:
            break
        count = (low + high) // 2
    if best is None:
        last = trials[-1]
        raise DgmrError(
            f"{name} = {limit} is not met even at {last.parameters:,} of {cost.total:,} parameters: {last.value:.4f}, "
            f"95 % bound {last.bound:.4f}. Hold out more images, or set a lower target."
        )
    return TargetResult(best, trials)


def _target(min_cosine: float | None, max_drop: float | None) -> tuple[str, float]:
    targets = {"min_cosine": min_cosine, "max_drop": max_drop}
    name = given_amount(targets, QUALITY_TARGETS)
    limit = targets[name] if name else None
    if name is None or limit is None:
        raise DgmrError(f"there is no quality target. Give either {' or '.join(QUALITY_TARGETS)}.")
    if not 0 < limit < 1:
        raise DgmrError(f"{name} = {limit} is out of range. It must be between 0 and 1.")
    return name, limit


def _check_images(
    source: str | Path, count: int, num_calibration_images: int, held_out: int, rankings: Rankings | None
) -> None:
    if count < held_out + MIN_RECOVERY_IMAGES:
        raise DgmrError(
            f"{source} holds {count} images, fewer than {held_out} held-out images and {MIN_RECOVERY_IMAGES} for "
            "calibration. Add images, or hold out fewer."
        )
    if rankings and count < num_calibration_images + held_out:
        raise DgmrError(
            f"{source} holds {count} readable images, fewer than {num_calibration_images} for calibration and "
            f"{held_out} held out, so the ranking may have seen the held-out images. Add images, or take fewer of "
            "the two."
        )


@torch.no_grad()
def _embeddings(model: OpenedModel, images: CalibrationImages) -> Tensor:
    encoder = ImageEncoder(model.adapter)
    with model.running(), evaluating(model.tower):
        rows = [check_embeddings(encoder(batch), "the held-out images").float().cpu() for batch in images.on(model)]
    return torch.cat(rows)


def _interval(values: np.ndarray, seed: int) -> Sequence[float]:
    """Return the lower and the upper end of the 95 % bootstrap interval of the mean."""
    bootstrap = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return bootstrap.confidence_interval
