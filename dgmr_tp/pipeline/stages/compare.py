"""Compare the embeddings of the dense and the last model of every size: can an existing index be kept?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.evaluation.class_embeddings import class_embeddings
from dgmr_tp.evaluation.index_compatibility import ComparedEncoder, compare_encoders
from dgmr_tp.pipeline.run_directory import Step
from dgmr_tp.pipeline.stages.base import IMAGE_PACKAGES, Stage
from dgmr_tp.pipeline.stages.evaluate import check_text_tower
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.config import data_paths
from dgmr_tp.utils.lazy_imports import require_installed

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext


class CompareStage(Stage):
    """Search an index of dense embeddings with new ones, and the other way round."""

    name = "compare"
    own_packages = ("faiss-cpu", *IMAGE_PACKAGES)

    def preflight(self, context: RunContext) -> None:
        section = context.recipe.compare
        assert section
        require_installed("faiss", "eval")
        if section.classes and not section.classes.endswith(".pt"):
            check_text_tower(context, "compare.classes")

    def steps(self, context: RunContext) -> list[Step]:
        section = context.recipe.compare
        if section is None:
            return []

        def describe() -> dict[str, Any]:
            files = {
                f"{key}_files": context.fingerprint(entry.path)
                for key, entry in data_paths(section, "compare.").items()
            }
            return {
                **section.model_dump(exclude={"workers"}),
                "seed": context.recipe.seed,
                **context.describe_model(),
                **files,
            }

        steps = []
        for size in context.recipe.prune.sizes:
            inputs = (context.last_model_step(size), *context.scenes_steps)
            steps.append(
                Step(
                    self.name, size, describe, inputs, partial(_compare, context, size), packages=self.packages(context)
                )
            )
        return steps


def _compare(context: RunContext, size: str, folder: Path) -> dict[str, Any]:
    section = context.recipe.compare
    assert section
    # In float32, because rounding would count as a difference between old and new.
    full = context.recipe.compute.model_copy(update={"dtype": "float32"})
    old = context.dense.with_compute(full)
    new = context.open_model_of(context.last_model_step(size)).with_compute(full)
    with old.running(), new.running():
        return compare_encoders(
            _encoder(old),
            _encoder(new),
            context.resolve(section.images),
            classifier=class_embeddings(old, context.resolve(section.classes)) if section.classes else None,
            count=section.count,
            queries=section.queries,
            thresholds=section,
            seed=context.recipe.seed,
            device=context.device,
            workers=section.workers,
        )


def _encoder(model: OpenedModel) -> ComparedEncoder:
    return ComparedEncoder(ImageEncoder(model.adapter).eval(), model.preprocess)
