"""Generate data sets of scenes, for a run without downloads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dgmr_tp.data import scenes
from dgmr_tp.pipeline.run_directory import Step
from dgmr_tp.pipeline.stages.base import BASE_PACKAGES, Stage
from dgmr_tp.utils.config import Config

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext

SCENE_SEEDS = {"images": 101, "classes": 102, "captions": 103, "pairs": 104}
"""The demo CLIP was trained on seed 1 and tested on seed 2."""


class ScenesSection(Config):
    """Generated data sets: ``scenes:images``, ``scenes:classes``, ``scenes:captions``, ``scenes:pairs``."""

    images: int = Field(gt=0)
    """Unlabeled scenes for calibration and distillation."""
    classes: int = Field(gt=0)
    """Labeled scenes for zero-shot classification."""
    captions: int = Field(gt=9, le=10_000)
    """Captioned scenes for zero-shot retrieval. All captions differ."""
    pairs: int | None = Field(None, gt=9, le=10_000)
    """Captioned scenes for tuning the text tower."""


class ScenesStage(Stage):
    """Write every generated data set once into the run directory."""

    name = "scenes"

    def packages(self, context: RunContext) -> tuple[str, ...]:
        return (*BASE_PACKAGES, "pillow")

    def steps(self, context: RunContext) -> list[Step]:
        section = context.recipe.scenes
        if section is None:
            return []

        def work(folder: Path) -> dict[str, Any]:
            scenes.write_classification(folder / "images", section.images, SCENE_SEEDS["images"])
            scenes.write_classification(folder / "classes", section.classes, SCENE_SEEDS["classes"])
            scenes.write_retrieval(folder / "captions", section.captions, SCENE_SEEDS["captions"])
            if section.pairs:
                scenes.write_retrieval(folder / "pairs", section.pairs, SCENE_SEEDS["pairs"])
            return {}

        return [Step(self.name, "all", section.model_dump, (), work, runs_first=True, packages=self.packages(context))]
