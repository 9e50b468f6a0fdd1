"""Make plans: choose the neurons that stay, by any criterion and for any amount. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Unpack

import numpy as np
import torch
import torch_pruning as tp

from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.criteria import ActivationCriterion, GradientCriterion, criterion_named
from dgmr_tp.compression.rankings import rank, require_images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.pruning import Amount, MLPPruner, Plan, SitePlan
from dgmr_tp.pruning.allocation import check_budget, keep_counts, with_default_amount
from dgmr_tp.pruning.cost import costs
from dgmr_tp.utils.progress import report_progress

ENTROPY_GROUP_SIZE = 512
"""Group size for the entropy objective. The AMP paper uses 512 for EVA-CLIP and 1,024 otherwise."""


def make_plan(
    model: OpenedModel,
    criterion: str | tp.importance.Importance = "dgmr",
    images: CalibrationImages | None = None,
    *,
    seed: int = 0,
    previous: Plan | None = None,
    on_decision: Callable[[Plan], None] = lambda plan: None,
    **amount: Unpack[Amount],
) -> Plan:
    """Decide what :func:`dgmr_tp.prune` would cut, and change nothing.

    Args:
        model: the dense model.
        criterion: a name in :data:`dgmr_tp.compression.criteria.CRITERIA`, or a torch-pruning importance.
        images: for criteria that need activations or gradients.
        seed: seeds criteria that draw random numbers, one stream per site.
        previous: decisions of an earlier call with the same arguments. They are reused where the weights are the same.
        on_decision: called with all decisions so far after each site.
        amount: see :func:`keep_counts`. Default: ``mlp_ratio=1``.

    Raises:
        DgmrError: bad input; the message says what to do.
    """
    amount = with_default_amount(amount)
    rule = criterion_named(criterion) if isinstance(criterion, str) else None
    if isinstance(rule, ActivationCriterion):
        assert isinstance(criterion, str)
        check_amount(model, **amount)
        # Only a budget needs the whole error curves.
        picks = None if amount.get("budget") else keep_counts(model.sites, **amount)
        return rank(model, criterion, images, picks=picks).plan(model, **amount)
    if rule is not None and rule.needs == "gradients" and not amount.get("budget"):
        check_amount(model, **amount)
    with _importance(model, criterion, images) as importance:
        pruner = MLPPruner(
            model.tower,
            importance,
            sites=model.sites,
            weight_hashes=model.weight_hashes,
            name=model.name,
            image_size=model.image_size,
            **amount,
        )
        decisions: dict[str, SitePlan] = {}
        for index, site in enumerate(model.sites):
            reusable = previous.sites.get(site.name) if previous else None
            if reusable and reusable.sha256 == model.weight_hashes[site.name]:
                decisions[site.name] = reusable
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))
                    decisions[site.name] = pruner.decide(site)
            on_decision(pruner.plan_of(decisions))
            report_progress("select", len(decisions), len(model.sites))
    return pruner.plan_of(decisions)


def check_amount(model: OpenedModel, **amount: Unpack[Amount]) -> None:
    """Raise DgmrError if a model, opened with or without weights, cannot be cut to this amount.

    Limits of latency are not checked.
    """
    amount = with_default_amount(amount)
    budget = amount.get("budget")
    if not budget:
        keep_counts(model.sites, **amount)
        return
    counted = {key: limit for key, limit in budget.items() if key != "latency"}
    tower_costs = costs(model.tower, model.sites, model.image_size)
    check_budget(model.sites, counted, tower_costs, amount.get("round_to", 1))


@contextmanager
def _importance(
    model: OpenedModel, criterion: str | tp.importance.Importance, images: CalibrationImages | None
) -> Iterator[tp.importance.Importance]:
    """Yield the torch-pruning importance of a criterion, which is valid inside the context."""
    if not isinstance(criterion, str):
        yield criterion
        return
    rule = criterion_named(criterion)
    if isinstance(rule, GradientCriterion):
        require_images(criterion, images)
        assert images is not None
        with model.running(), rule.importance(model, images.groups(model, ENTROPY_GROUP_SIZE)) as importance:
            yield importance
    else:
        assert not isinstance(rule, ActivationCriterion)
        yield rule.importance()
