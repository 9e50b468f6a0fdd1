"""Distill every model from the dense one on unlabeled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmr_tp.distillation.data import CROP_SCHEME
from dgmr_tp.distillation.distill import distill
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.run_directory import Step, digest, package_versions
from dgmr_tp.pipeline.stages.base import require_adapter
from dgmr_tp.pipeline.stages.training import TrainingStage
from dgmr_tp.utils.sources import is_url

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext

NEEDS_NUMBERED_IMAGES = {"held_out": "0", "fixed_crops": "false", "keep_features": "false"}
"""Keys that need images on disk, and the value that switches each off."""


class DistillStage(TrainingStage):
    """Train the student towards the teacher's features."""

    name = "distill"
    model_label = "distilled"
    training_title = "Distillation"
    command = "distill"

    def preflight(self, context: RunContext) -> None:
        super().preflight(context)
        require_adapter(context, self.name)
        if is_url(context.recipe.images):
            for key, off in NEEDS_NUMBERED_IMAGES.items():
                if getattr(context.recipe.distill, key):
                    raise DgmrError(
                        f"distill.{key}: shards behind a URL cannot be divided or numbered. Set it to {off}."
                    )
            if context.recipe.distill.loss.needs_bank:
                raise DgmrError(
                    "distill.loss: balanced and neighbors draw images for a bank, but shards behind a URL cannot be "
                    "numbered. Choose other losses."
                )

    def describe(self, context: RunContext) -> dict[str, Any]:
        return {**super().describe(context), **context.describe_images(), "crop_scheme": CROP_SCHEME}

    def launch(self, context: RunContext, size: str, folder: Path) -> dict[str, Any]:
        """Launch as every training. Manage the cache of teacher features that the sizes share."""
        assert context.recipe.distill
        cache = None
        if context.recipe.distill.keep_features:
            cache = self._feature_cache(context)
        for other in folder.parent.glob(".features-*"):  # of another recipe
            if other != cache:
                other.unlink()
        figures = super().launch(context, size, folder)
        others = [f"{self.name}/{other}" for other in context.recipe.prune.sizes if other != size]
        if cache and all(context.run_directory.figures(key) for key in others):
            cache.unlink(missing_ok=True)
        return figures

    def train(self, context: RunContext, model: OpenedModel, folder: Path, step: Step) -> dict[str, Any] | None:
        config = context.recipe.distill
        assert config
        cache = self._feature_cache(context) if config.keep_features else None
        seed = context.recipe.seed
        return distill(context.dense, model, context.find_images(), config, folder, seed=seed, features=cache)

    def _feature_cache(self, context: RunContext) -> Path:
        """Return the file in which the sizes share the teacher's features. Its name is a hash of what decides them."""
        versions = package_versions(self.packages(context))
        made_from = [self.describe(context), context.describe_model(), versions]
        return context.run_directory.path / self.name / f".features-{digest(made_from)[:16]}"
