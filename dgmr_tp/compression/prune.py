"""Prune and recover in one call: the Python face of ``dgmr-tp prune``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.compression.criteria import asked, batches, encoder_of, make_plan, tower_of
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Amount, MLPPruner, Plan, recover


class SiteRow(NamedTuple):
    """One site in the table that :func:`prune` returns; the errors are None where nothing was recovered."""

    site: str
    width: int
    hidden: int
    kept: int
    cut_error: float | None
    recovered_error: float | None
    kept_cut: bool


class Pruned(NamedTuple):
    """What :func:`prune` returns."""

    model: Any
    """Of the kind that was given: an OpenedModel for a name or an OpenedModel, a module for a module."""
    plan: Plan
    table: list[SiteRow]


def prune(
    model: str | OpenedModel | nn.Module,
    images: str | Path | Iterable[Tensor] | None = None,
    *,
    pretrained: str | None = None,
    criterion: str | tp.importance.Importance | None = None,
    plan: Plan | None = None,
    calibration: int = 1024,
    damping: float = 1e-3,
    seed: int = 0,
    **amount: Unpack[Amount],
) -> Pruned:
    """Prune a copy of an encoder's MLPs and, where images are given, recover it in closed form. The original stays as it is.

    Args:
        model: anything :func:`open_model` opens, an OpenedModel, or a vision tower as a module.
        images: unlabelled images for recovery and for criteria that see the data: a folder, a tar, a folder of tars or a URL
            of shards, or preprocessed batches ``[batch, 3, height, width]``. They are computed where the model is. None: no recovery.
        pretrained: weights, for a model given by its library's name.
        criterion: ``dgmr``, ``l1``, ``l2``, ``random``; with images ``output``, ``activation`` (see
            :mod:`dgmr_tp.pruning.output_selection`), ``taylor`` or ``amp`` (see :mod:`dgmr_tp.pruning.amp`); or any torch-pruning importance.
            Default: ``output`` with images, ``dgmr`` without.
        plan: apply this plan and decide nothing.
        calibration: how many images are read from a folder.
        damping: see :func:`recover`.
        seed: of ``random`` and of the choice of images.
        amount: how many neurons stay: ``mlp_ratio``, ``keep_ratio``, ``keep`` or ``budget``, and ``round_to`` (see
            :func:`keep_counts`). Default: ``mlp_ratio=1``.

    Returns:
        The pruned model, its plan, and a row per site with the held-out errors.

    Raises:
        DgmrError: bad input; says what and what to do.
    """
    opened = open_model(model, pretrained) if isinstance(model, str) else model
    images = (
        images if images is None or isinstance(images, str | Path) else list(images)
    )  # read twice by criteria that see them
    if plan is None:
        criterion = criterion or ("dgmr" if images is None else "output")
        plan = make_plan(opened, criterion, images, calibration=calibration, seed=seed, **amount)
    elif asked(amount):
        raise DgmrError(f"a plan says how many neurons stay; leave out {', '.join(asked(amount))}")
    result = (
        opened.copy() if isinstance(opened, OpenedModel) else copy.deepcopy(opened)
    )  # late: deciding may need the memory
    MLPPruner(tower_of(result)).apply(plan)

    errors = {}
    if images is not None:
        seen = batches(images, opened, calibration, seed)
        report = recover(encoder_of(opened), encoder_of(result), seen, damping=damping)
        errors = {entry.site: entry for entry in report}
    table = []
    for site, decided in plan.sites.items():
        entry = errors.get(site)
        cut, recovered, kept_cut = (
            (entry.cut_error, entry.recovered_error, entry.kept_cut) if entry else (None, None, False)
        )
        table.append(SiteRow(site, decided.width, decided.hidden, len(decided.kept), cut, recovered, kept_cut))
    return Pruned(result, plan, table)
