"""Registry of the criteria by which neurons are chosen, each with the data that it needs.

A new criterion is one entry in :data:`CRITERIA`. Recipes, the command line and the documentation read the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch_pruning as tp
from torch import Tensor

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import DGMRImportance, PrecomputedScores
from dgmr_tp.pruning.amp import gate_scores, weight_gradients

Needs = Literal["weights", "activations", "gradients"]
Groups = Sequence[Sequence[Tensor]]
"""Groups of candidate images, each in batches ``[batch, 3, height, width]``."""


@dataclass(frozen=True)
class WeightCriterion:
    """A torch-pruning importance that reads weights only."""

    summary: str
    """One line for help texts and the documentation."""
    importance: Callable[[], tp.importance.Importance]
    needs: ClassVar[Needs] = "weights"


@dataclass(frozen=True)
class ActivationCriterion:
    """A greedy choice on the Gram matrix of the hidden activations; see :mod:`dgmr_tp.pruning.output_selection`.

    One ranking of all neurons serves every size, and its error curves fit the width of each MLP to a budget.
    """

    summary: str
    rule: str
    """Name of the greedy rule in ``dgmr_tp.pruning.output_selection``."""
    needs: ClassVar[Needs] = "activations"


@dataclass(frozen=True)
class GradientCriterion:
    """An importance that reads gradients of AMP's entropy on groups of images."""

    summary: str
    importance: Callable[[OpenedModel, Groups], AbstractContextManager[tp.importance.Importance]]
    """The importance is valid inside the context, where gradients exist."""
    searches_widths: bool = False
    """AMP's binary search for a width of each MLP is defined on its scores."""
    needs: ClassVar[Needs] = "gradients"


Criterion = WeightCriterion | ActivationCriterion | GradientCriterion


@contextmanager
def _amp_scores(model: OpenedModel, groups: Groups) -> Iterator[tp.importance.Importance]:
    yield PrecomputedScores(model.tower, gate_scores(model.adapter, groups), "amp")


@contextmanager
def _taylor(model: OpenedModel, groups: Groups) -> Iterator[tp.importance.Importance]:
    with weight_gradients(model.adapter, groups):
        yield tp.importance.TaylorImportance()


CRITERIA: dict[str, Criterion] = {
    "dgmr": WeightCriterion("greedy Gram-Schmidt over the rows of the first Linear (DGMR)", DGMRImportance),
    "l1": WeightCriterion("L1 norm of the weights", lambda: tp.importance.MagnitudeImportance(p=1)),
    "l2": WeightCriterion("L2 norm of the weights", lambda: tp.importance.MagnitudeImportance(p=2)),
    "random": WeightCriterion("random neurons", tp.importance.RandomImportance),
    "output": ActivationCriterion("greedy on the error of the MLP's output after recovery", "output"),
    "activation": ActivationCriterion("greedy Gram-Schmidt over the hidden activations", "activation"),
    "taylor": GradientCriterion("torch-pruning's Taylor criterion on the gradient of AMP's entropy", _taylor),
    "amp": GradientCriterion("AMP's first-order score of hidden neurons", _amp_scores, searches_widths=True),
}


def criterion_named(name: str) -> Criterion:
    """Return the criterion ``name`` of the registry.

    Raises:
        DgmrError: the name is unknown.
    """
    if name not in CRITERIA:
        raise DgmrError(f"unknown criterion {name!r}. Use one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def needs_images(criterion: str | tp.importance.Importance) -> bool:
    """Return whether a criterion, by name or as a torch-pruning importance, runs the tower on calibration images."""
    return isinstance(criterion, str) and criterion_named(criterion).needs != "weights"


def names_needing(*needs: Needs) -> list[str]:
    """Return the names of the criteria whose data is one of ``needs``."""
    return [name for name, criterion in CRITERIA.items() if criterion.needs in needs]


def default_criterion(with_images: bool) -> str:
    """Return the criterion used when the caller names none: ``output`` with calibration images, ``dgmr`` without."""
    return "output" if with_images else "dgmr"
