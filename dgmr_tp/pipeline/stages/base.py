"""Base class of the stages of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from dgmr_tp.errors import DgmrError

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext
    from dgmr_tp.pipeline.recipe import Recipe
    from dgmr_tp.pipeline.run_directory import Step


BASE_PACKAGES = ("dgmr-tp", "torch", "numpy")
IMAGE_PACKAGES = ("torchvision", "pillow")
"""Packages that read, preprocess and crop images."""


class Stage(ABC):
    """One stage of a run: which steps it has, what it checks before the run, and the work of each step."""

    name: ClassVar[str]
    """Key of its section in the recipe, folder in the run directory, and argument of ``--until`` and ``--redo``."""
    model_label: ClassVar[str | None] = None
    """What the report calls the models that it makes; None if it makes none."""
    training_title: ClassVar[str | None] = None
    """Heading of its training curves in the report; None if it does not train."""

    own_packages: ClassVar[tuple[str, ...]] = ()
    """Packages that this stage uses, besides those that open the model."""

    def packages(self, context: RunContext) -> tuple[str, ...]:
        """Return the packages whose versions decide the results of this stage."""
        return (*BASE_PACKAGES, *context.model_packages, *self.own_packages)

    def is_planned(self, recipe: Recipe) -> bool:
        """Return whether the recipe has this stage."""
        return getattr(recipe, self.name) is not None

    def preflight(self, context: RunContext) -> None:  # noqa: B027
        """Raise DgmrError if a package, a file or a part of the model is missing. Called before the first stage."""

    @abstractmethod
    def steps(self, context: RunContext) -> list[Step]:
        """Return the stage's steps, in the order in which they run. Does not look at files."""


def require_adapter(context: RunContext, stage: str) -> None:
    """Raise DgmrError if no adapter is known for the tower, which ``stage`` runs block by block."""
    if not context.shapes.has_adapter:
        raise DgmrError(
            f"{stage}: no adapter is known for the tower of {context.recipe.model.source}. Leave this stage out, or "
            "add an adapter (docs/extending.md)."
        )
