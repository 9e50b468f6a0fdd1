"""Estimate the memory and the time of a recipe's distillation before anything is loaded."""

from __future__ import annotations

from math import inf
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dgmr_tp.distillation.loop import read_curve
from dgmr_tp.distillation.memory import Devices, MemoryEstimator
from dgmr_tp.encoders import open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.dry_run import dry_run
from dgmr_tp.pipeline.recipe import Recipe
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.utils.files import staging_path


class Estimate(NamedTuple):
    """Result of :func:`estimate_distillation`."""

    text: str
    """A table per size."""
    remedy: str | None
    """What to change if a size does not fit; None if all fit."""


def estimate_distillation(recipe: Recipe, devices: str, rate: str | None = None) -> Estimate:
    """Estimate what the recipe's distillation needs on each device.

    Args:
        recipe: the recipe.
        devices: number and memory, such as ``8x48GB``.
        rate: images per second, or the directory of a run that has distilled these sizes for at least a few steps.
            None: hours are not estimated.

    Raises:
        DgmrError: the recipe has no distillation, its widths are not known before it runs, or the rate is not known.
    """
    available = Devices.parse(devices)
    given_rate = _given_rate(rate)
    config = recipe.distill
    if config is None:
        raise DgmrError(f"the recipe {recipe.name} has no section distill. Only distillation is estimated.")
    teacher = open_model(**recipe.model.options, pretrained=recipe.model.pretrained, weights="none")
    num_images = config.steps * config.batch_size
    texts, remedy = [], None
    for name, size in dry_run(recipe).sizes.items():
        student = teacher.copy()
        resize(student.tower, size.keep)
        assert teacher.image_size is not None
        estimator = MemoryEstimator(student.adapter, teacher.adapter, config, teacher.image_size)
        texts.append(
            f"{name}: {estimator.table(config, available)}\n{num_images:,} images{_hours(num_images, given_rate, name)}"
        )
        if remedy is None and not estimator.fits(config, available):
            change = estimator.smallest_change(config, available)
            settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in (change or {}).items())
            advice = f"It would fit with distill.{settings}." if change else "Take larger devices."
            remedy = f"{name} does not fit into {devices}. {advice}"
    if not texts:
        raise DgmrError(
            "only the run itself finds these widths. Estimate with a ratio, or with a budget of params or flops."
        )
    return Estimate("\n".join(texts), remedy)


def _given_rate(rate: str | None) -> float | Path | None:
    """Return the images per second, or the run directory that measured them."""
    if rate is None:
        return None
    try:
        images_per_second = float(rate)
    except ValueError:
        return Path(rate)
    if not 0 < images_per_second < inf:
        raise DgmrError(f"--rate {rate}: images per second must be above 0. Give a positive number.")
    return images_per_second


def _hours(num_images: int, rate: float | Path | None, size: str) -> str:
    if rate is None:
        return ""
    images_per_second = _measured_rate(rate, size) if isinstance(rate, Path) else rate
    origin = f" (measured in {rate})" if isinstance(rate, Path) else ""
    hours = num_images / images_per_second / 3600
    return f" at {images_per_second:.4g} per second{origin}: {hours:,.1f} hours"


def _measured_rate(run: Path, size: str) -> float:
    """Return the median rate over the later half of a distillation, finished or not."""
    final = run / "distill" / size
    rates = [value for folder in (final, staging_path(final)) for _, value in read_curve(folder, "samples_per_second")]
    if not rates:
        raise DgmrError(
            f"--rate {run}: give images per second, or the directory of a run that has started to distill {size}."
        )
    return median(rates[len(rates) // 2 :])
