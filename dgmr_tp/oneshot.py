"""Prune and recover in one call: the Python face of ``dgmr-tp prune``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel, as_encoder, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import (
    Amount,
    DGMRImportance,
    FunctionalImportance,
    MLPPruner,
    Plan,
    Site,
    SitePlan,
    find_sites,
    rank_encoder,
    recover,
)
from dgmr_tp.pruning.plan import weight_sha256

Progress = Callable[[str, int, int], None]
"""Receives what is going on (``select``, ``recover``), steps done, and steps in all."""

CRITERIA: dict[str, Callable[[], tp.importance.Importance]] = {
    "dgmr": DGMRImportance,
    "l2": lambda: tp.importance.MagnitudeImportance(p=2),
    "l1": lambda: tp.importance.MagnitudeImportance(p=1),
    "random": tp.importance.RandomImportance,
}
SEEING = ("output", "activation")
"""Criteria that look at calibration images; see dgmr_tp.pruning.functional."""


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
    criterion: str | tp.importance.Importance = "dgmr",
    plan: Plan | None = None,
    calibration: int = 1024,
    damping: float = 1e-3,
    seed: int = 0,
    progress: Progress = lambda title, done, total: None,
    **amount: Unpack[Amount],
) -> Pruned:
    """Prune a copy of an encoder's MLPs and, where images are given, recover it in closed form. The original stays as it is.

    Args:
        model: anything :func:`open_model` opens, an OpenedModel, or a vision tower as a module.
        images: unlabelled images for recovery and for criteria that see the data: a folder, a tar or a folder of tars, or
            preprocessed batches ``[batch, 3, height, width]``. None: no recovery.
        pretrained: weights, for a model given by its library's name.
        criterion: ``dgmr``, ``l1``, ``l2``, ``random``; with images ``output`` or ``activation`` (see
            :mod:`dgmr_tp.pruning.functional`); or any torch-pruning importance.
        plan: apply this plan and decide nothing.
        calibration: how many images are read from a folder.
        damping: see :func:`recover`.
        seed: of ``random`` and of the choice of images.
        progress: see :data:`Progress`.
        amount: how many neurons stay: ``mlp_ratio``, ``keep_ratio``, ``keep`` or ``budget``, and ``round_to`` (see
            :func:`keep_counts`). Default: ``mlp_ratio=1``.

    Returns:
        The pruned model, its plan, and a row per site with the held-out errors.

    Raises:
        DgmrError: bad input; says what and what to do.
    """
    opened = open_model(model, pretrained) if isinstance(model, str) else model
    result = opened.copy() if isinstance(opened, OpenedModel) else copy.deepcopy(opened)
    images = images if images is None or isinstance(images, str | Path) else list(images)  # read twice by criteria that see them
    if plan is None:
        plan = make_plan(opened, criterion, images, calibration=calibration, seed=seed, progress=progress, **amount)
    elif _asked(amount):
        raise DgmrError(f"a plan says how many neurons stay; leave out {', '.join(_asked(amount))}")
    MLPPruner(_tower(result)).apply(plan)

    errors = {}
    if images is not None:
        dense, pruned = (m.encoder if isinstance(m, OpenedModel) else as_encoder(m) for m in (opened, result))
        batches = _batches(images, opened, calibration, seed)
        report = recover(dense, pruned, batches, damping=damping, progress=partial(progress, "recover"))
        errors = {entry.site: entry for entry in report}
    table = []
    for site, decided in plan.sites.items():
        entry = errors.get(site)
        cut, recovered, kept_cut = (entry.cut_error, entry.recovered_error, entry.kept_cut) if entry else (None, None, False)
        table.append(SiteRow(site, decided.width, decided.hidden, len(decided.kept), cut, recovered, kept_cut))
    return Pruned(result, plan, table)


def make_plan(
    model: OpenedModel | nn.Module,
    criterion: str | tp.importance.Importance = "dgmr",
    images: str | Path | Iterable[Tensor] | None = None,
    *,
    calibration: int = 1024,
    seed: int = 0,
    progress: Progress = lambda title, done, total: None,
    done: Plan | None = None,
    remember: Callable[[Plan], None] = lambda plan: None,
    **amount: Unpack[Amount],
) -> Plan:
    """Decide what :func:`prune` would cut, and change nothing; same arguments, same errors.

    Args:
        done: decisions of an earlier call with the same arguments; they are taken over where the weights are the same.
        remember: called with all decisions so far after each.
    """
    if not _asked(amount):
        amount["mlp_ratio"] = 1
    name, size = (model.name, model.image_size) if isinstance(model, OpenedModel) else (None, None)
    seeing = isinstance(criterion, str) and criterion in SEEING
    rule = None if seeing else importance(criterion)
    pruner = MLPPruner(_tower(model), rule, sites=block_sites(model), name=name, image_size=size, **amount)
    if seeing:
        if images is None:
            raise DgmrError(f"criterion {criterion} looks at calibration images: give some (on the command line --recover IMAGES)")
        encoder = model.encoder if isinstance(model, OpenedModel) else as_encoder(model)
        batches = _batches(images, model, calibration, seed)
        rankings = rank_encoder(encoder, batches, by=criterion, picks=pruner.keep, progress=partial(progress, "rank"))
        pruner.importance = FunctionalImportance(encoder.module, rankings, criterion)
    decided: dict[str, SitePlan] = {}
    for index, site in enumerate(pruner.sites):
        old = done.sites.get(site.name) if done else None
        if old and old.sha256 == weight_sha256(pruner.model, site):
            decided[site.name] = old
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))
                decided[site.name] = pruner.decide(site)
        remember(pruner.plan_of(decided))
        progress("select", len(decided), len(pruner.sites))
    return pruner.plan_of(decided)


def _asked(amount: Amount) -> list[str]:
    return [key for key, value in amount.items() if key != "round_to" and value is not None]


def importance(criterion: str | tp.importance.Importance) -> tp.importance.Importance:
    """A criterion by name, or as it is.

    Raises:
        DgmrError: the name is unknown.
    """
    if not isinstance(criterion, str):
        return criterion
    if criterion not in CRITERIA:
        raise DgmrError(f"unknown criterion {criterion!r}; known: {', '.join((*CRITERIA, *SEEING))}")
    return CRITERIA[criterion]()


def _tower(model: OpenedModel | nn.Module) -> nn.Module:
    return model.encoder.module if isinstance(model, OpenedModel) else model


def block_sites(model: OpenedModel | nn.Module) -> list[Site] | None:
    """The sites inside residual blocks, where a walk is known: heads with an MLP of their own are not the papers' matter."""
    try:
        encoder = model.encoder if isinstance(model, OpenedModel) else as_encoder(model)
    except DgmrError:
        return None
    inside = tuple(f"{block.name}." for block in encoder.blocks())
    sites = [site for site in find_sites(encoder.module) if site.name.startswith(inside)]
    if not sites:
        raise DgmrError(f"no block of {encoder.name} holds an MLP that can be cut by itself; is its projection shared with attention?")
    return sites


def _batches(images: str | Path | Iterable[Tensor], model: OpenedModel | nn.Module, count: int, seed: int) -> Iterator[Tensor]:
    """Preprocessed batches on the model's device and in its dtype."""
    like = next(_tower(model).parameters())
    found = images
    if isinstance(images, str | Path):
        from dgmr_tp.data.images import Images

        if not isinstance(model, OpenedModel):
            raise DgmrError("a folder of images needs the encoder's preprocessing: open it with open_model, or pass preprocessed batches")
        found = Images.find(images).sample(count, seed, model.preprocess)
    return (batch.to(like.device, like.dtype) for batch in found)  # type: ignore[union-attr]
