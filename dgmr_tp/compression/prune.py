"""Prune and recover in one call: the Python form of ``dgmr-tp prune``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch_pruning as tp
from pydantic import Field
from torch import Tensor, nn

from dgmr_tp.compression.calibration import NUM_CALIBRATION_IMAGES, CalibrationImages
from dgmr_tp.compression.criteria import default_criterion
from dgmr_tp.compression.planning import make_plan
from dgmr_tp.encoders import OpenedModel, open_model, wrap_tower
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Amount, MLPPruner, Plan, SiteRecovery, recover
from dgmr_tp.pruning.allocation import given_amount
from dgmr_tp.utils.compute import ComputeConfig
from dgmr_tp.utils.config import Config
from dgmr_tp.utils.modules import check_weights


class RecoverConfig(Config):
    """Recovery: refit the last Linear of every pruned MLP by ridge regression, and tune the blocks if asked."""

    images: int = Field(NUM_CALIBRATION_IMAGES, ge=10)
    """Number of calibration images. A tenth of them is held out."""
    damping: float = Field(1e-3, ge=0)
    """Ridge, relative to the mean variance of the MLP's hidden activations."""
    tune_steps: int = Field(0, ge=0)
    """Steps of 32 images in which each block is then trained towards the dense block. 0: none."""


class SiteRow(NamedTuple):
    """One site in the table that :func:`prune` returns. The errors are None without recovery."""

    site: str
    width: int
    hidden: int
    num_kept: int
    cut_error: float | None
    """Relative squared error of the pruned MLP on held-out images, before recovery."""
    recovered_error: float | None
    fit_rejected: bool
    """The refit did not lower the held-out error, so the cut weights stayed."""
    block_error: float | None
    """Relative squared error of the block's output after the refit, before tuning. None without tuning."""
    tuned_error: float | None
    """The same after tuning."""
    images_needed: int | None = None
    """Number of calibration images that would suffice to fit the site on the tokens that the head reads alone.

    None if there were enough. Otherwise the site was fitted on all tokens.
    """


def describe_shortage(images_needed: Sequence[int | None]) -> str | None:
    """Return a line on the sites that lacked calibration images, or None if there is none.

    Args:
        images_needed: :attr:`SiteRow.images_needed` of every site.
    """
    needed = [count for count in images_needed if count is not None]
    if not needed:
        return None
    return f"too few calibration images for {len(needed)} of {len(images_needed)} MLPs; {max(needed):,} are enough"


@dataclass(frozen=True)
class Pruned:
    """Result of :func:`prune`. It unpacks as ``model, plan, table``."""

    model: Any
    """An OpenedModel for a name or an OpenedModel, a module for a module."""
    plan: Plan
    table: list[SiteRow]
    images: CalibrationImages | None = None
    """The calibration images, with those that were skipped."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.plan, self.table))


def prune(
    model: str | OpenedModel | nn.Module,
    images: str | Path | Iterable[Tensor] | None = None,
    *,
    pretrained: str | None = None,
    criterion: str | tp.importance.Importance | None = None,
    plan: Plan | None = None,
    num_calibration_images: int | None = None,
    damping: float = 1e-3,
    tune_steps: int = 0,
    seed: int = 0,
    **amount: Unpack[Amount],
) -> Pruned:
    """Prune a copy of a model's MLPs and, if images are given, recover it in closed form. The input model is unchanged.

    Args:
        model: a name or directory that :func:`open_model` opens, an OpenedModel, or a vision tower as a module.
        images: unlabeled images for recovery and for criteria that need them: a folder, a tar, a folder of tars, a URL
            of shards, or preprocessed batches ``[batch, 3, height, width]``. They run on the GPU if ``model`` is a
            name and there is one, on :attr:`OpenedModel.device`, or where the module is. None: no recovery.
        pretrained: weights, for a model given by its library's name.
        criterion: a name in :data:`dgmr_tp.compression.criteria.CRITERIA`, or any torch-pruning importance.
            Default: ``output`` with images, ``dgmr`` without.
        plan: apply this plan and decide nothing.
        num_calibration_images: number of images. Default: 1,024 images from a path, or all given batches.
        damping: ridge of the recovery; see :func:`recover`.
        tune_steps: number of steps in which each block is trained after its refit, without labels; see
            :func:`recover`. 500 are enough in most cases. Default: none.
        seed: seeds the choice of images and the criterion ``random``.
        amount: how many neurons stay: ``mlp_ratio``, ``keep_ratio``, ``keep`` or ``budget``, and ``round_to``; see
            :func:`keep_counts`. Default: ``mlp_ratio=1``.

    Returns:
        The pruned model, its plan, and a row per site with the held-out errors.

    Raises:
        DgmrError: bad input; the message says what to do.
    """
    dense = _opened(model, pretrained)
    check_weights(dense.tower)
    calibration = None
    if images is not None:
        calibration = CalibrationImages.read(images, dense, num_calibration_images, seed)
    if plan is None:
        plan = make_plan(dense, criterion or default_criterion(images is not None), calibration, seed=seed, **amount)
    elif surplus := given_amount(amount) or ("criterion" if criterion else None):
        raise DgmrError(f"a plan decides which neurons stay. Leave out {surplus}.")
    pruned, table = prune_by_plan(dense, plan, calibration, damping=damping, tune_steps=tune_steps)
    return Pruned(pruned.module if isinstance(model, nn.Module) else pruned, plan, table, calibration)


def prune_by_plan(
    dense: OpenedModel,
    plan: Plan,
    images: CalibrationImages | None = None,
    *,
    damping: float = 1e-3,
    tune_steps: int = 0,
) -> tuple[OpenedModel, list[SiteRow]]:
    """Cut a copy of ``dense`` by ``plan`` and, if images are given, recover it.

    Raises:
        DgmrError: the plan does not fit the model, or recovery is not possible on these images.
    """
    pruned = dense.copy()
    MLPPruner(pruned.tower, sites=dense.sites, weight_hashes=dense.weight_hashes).apply(plan)
    return pruned, recover_pruned(dense, pruned, plan, images, damping=damping, tune_steps=tune_steps)


def recover_pruned(
    dense: OpenedModel,
    pruned: OpenedModel,
    plan: Plan,
    images: CalibrationImages | None,
    *,
    damping: float = 1e-3,
    tune_steps: int = 0,
) -> list[SiteRow]:
    """Recover ``pruned`` in place, if images are given, and return a row per site of ``plan``."""
    errors: dict[str, SiteRecovery] = {}
    if images is not None:
        with dense.running(), pruned.running():
            report = recover(dense.adapter, pruned.adapter, images.on(dense), damping=damping, tune_steps=tune_steps)
        errors = {entry.site: entry for entry in report}
    table = []
    for name, site in plan.sites.items():
        size = (name, site.width, site.hidden, len(site.kept))
        entry = errors.get(name)
        if entry is None:
            table.append(SiteRow(*size, None, None, False, None, None))
            continue
        tuned = (None, None) if entry.tuning is None else (entry.tuning.before, entry.tuning.after)
        errors_of_site = (entry.cut_error, entry.recovered_error, entry.fit_rejected)
        table.append(SiteRow(*size, *errors_of_site, *tuned, images_needed=entry.images_needed))
    return table


def _opened(model: str | OpenedModel | nn.Module, pretrained: str | None) -> OpenedModel:
    if isinstance(model, str):
        return open_model(model, pretrained).with_compute(ComputeConfig.model_validate({}))
    if pretrained is not None:
        raise DgmrError(f"pretrained = {pretrained} belongs to a model given by name. Leave it out.")
    return wrap_tower(model) if isinstance(model, nn.Module) else model
