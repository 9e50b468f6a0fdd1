"""Recover every pruned model in closed form, and tune its blocks if asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.prune import recover_pruned
from dgmr_tp.pipeline.run_directory import Step
from dgmr_tp.pipeline.stages.base import IMAGE_PACKAGES, Stage, require_adapter

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext


class RecoverStage(Stage):
    """Refit the last Linear of every pruned MLP, and tune the blocks if asked."""

    name = "recover"
    model_label = "recovered"
    own_packages = ("scipy", *IMAGE_PACKAGES)

    def preflight(self, context: RunContext) -> None:
        require_adapter(context, self.name)

    def steps(self, context: RunContext) -> list[Step]:
        section = context.recipe.recover
        if section is None:
            return []

        def describe() -> dict[str, Any]:
            return {"recover": section.model_dump(), **context.describe_images()}

        steps = []
        for size in context.recipe.prune.sizes:
            inputs = (context.last_model_step(size, before=self.name), *context.scenes_steps)
            steps.append(
                Step(
                    self.name, size, describe, inputs, partial(_recover, context, size), packages=self.packages(context)
                )
            )
        return steps


def _recover(context: RunContext, size: str, folder: Path) -> dict[str, Any]:
    section = context.recipe.recover
    assert section
    plan = context.plan(size)
    pruned = context.open_model_of(context.last_model_step(size, before="recover"))
    images = CalibrationImages.read(context.images_source, context.dense, section.images, context.recipe.seed)
    table = recover_pruned(context.dense, pruned, plan, images, damping=section.damping, tune_steps=section.tune_steps)
    context.save_model(pruned, plan, folder, f"recover/{size}")
    sites = [row._asdict() for row in table]
    return {"sites": sites, "broken_images": dict(images.broken), "other_files": sum(images.others.values())}
