"""Rank the neurons of every MLP on calibration images, once for all sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.criteria import criterion_named
from dgmr_tp.compression.rankings import Rankings, rank
from dgmr_tp.pipeline.run_directory import Step
from dgmr_tp.pipeline.stages.base import IMAGE_PACKAGES, Stage, require_adapter

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext
    from dgmr_tp.pipeline.recipe import Recipe

RANKINGS_STEP = "rank/all"


class RankStage(Stage):
    """Rank for criteria that need activations. The section ``prune`` says by which."""

    name = "rank"
    own_packages = IMAGE_PACKAGES

    def is_planned(self, recipe: Recipe) -> bool:
        return criterion_named(recipe.prune.criterion).needs == "activations"

    def preflight(self, context: RunContext) -> None:
        require_adapter(context, self.name)

    def steps(self, context: RunContext) -> list[Step]:
        recipe = context.recipe
        if not self.is_planned(recipe):
            return []

        def describe() -> dict[str, Any]:
            section = {
                "criterion": recipe.prune.criterion,
                "calibration": recipe.num_calibration_images,
                "dtype": recipe.compute.dtype,
            }
            return {**context.describe_model(), **section, **context.describe_images()}

        def work(folder: Path) -> dict[str, Any]:
            count = recipe.num_calibration_images
            images = CalibrationImages.read(context.images_source, context.dense, count, recipe.seed)
            rankings = rank(context.dense, recipe.prune.criterion, images)
            rankings.save(folder / "rankings.safetensors")
            sensitivity = {name: ranking.sensitivity for name, ranking in rankings.sites.items()}
            return {"sensitivity": sensitivity, "broken_images": images.broken}

        return [Step(self.name, "all", describe, context.scenes_steps, work, packages=self.packages(context))]


def read_rankings(context: RunContext) -> Rankings:
    """Read the rankings of a run."""
    return Rankings.read(context.run_directory.folder(RANKINGS_STEP) / "rankings.safetensors")
