"""Export the last model of every size, verify the files, and evaluate them on the recipe's data sets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.evaluation.zero_shot import as_clip
from dgmr_tp.export.bundle import failures
from dgmr_tp.export.formats import FORMATS, open_exported
from dgmr_tp.export.layouts import export_model, recorded_source
from dgmr_tp.export.verify import NUM_EXAMPLES
from dgmr_tp.pipeline.run_directory import Step
from dgmr_tp.pipeline.stages.base import IMAGE_PACKAGES, Stage
from dgmr_tp.pipeline.stages.evaluate import DENSE, check_text_tower, describe_evaluation, measure_datasets
from dgmr_tp.utils.lazy_imports import require_installed

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext


class ExportStage(Stage):
    """Write files of the dense model, which are timed next to the pruned ones, and of every size."""

    name = "export"
    own_packages = ("onnx", "onnxscript", "onnxruntime", "clip_benchmark", *IMAGE_PACKAGES)

    def preflight(self, context: RunContext) -> None:
        section = context.recipe.export
        assert section
        packages = {FORMATS[name].runtime for name in section.formats}
        packages |= {"onnxscript"} if "onnxruntime" in packages else set()
        for package in sorted(packages):
            require_installed(package, "export")
        if section.text:
            check_text_tower(context, "export.text")

    def steps(self, context: RunContext) -> list[Step]:
        section, evaluate = context.recipe.export, context.recipe.evaluate
        if section is None:
            return []

        def describe() -> dict[str, Any]:
            return {**section.model_dump(exclude={"measure"}), **context.describe_images()}

        def describe_dense() -> dict[str, Any]:
            return {**describe(), **context.describe_model()}

        def describe_size() -> dict[str, Any]:
            measured = describe_evaluation(evaluate) if evaluate and section.measure else None
            return {**describe(), "evaluate": measured}

        steps = [
            Step(
                self.name,
                DENSE,
                describe_dense,
                context.scenes_steps,
                partial(_export_dense, context),
                packages=self.packages(context),
            )
        ]
        for size in context.recipe.prune.sizes:
            inputs = (context.last_model_step(size), f"{self.name}/{DENSE}", *context.scenes_steps)
            steps.append(
                Step(
                    self.name,
                    size,
                    describe_size,
                    inputs,
                    partial(_export, context, size),
                    packages=self.packages(context),
                )
            )
        return steps


def _export_dense(context: RunContext, folder: Path) -> dict[str, Any]:
    dense = context.dense
    source = recorded_source(context.recipe.model.source, dense, context.run_directory.folder(f"export/{DENSE}"))
    return _write(context, dense, folder, source, latency_batches=())


def _export(context: RunContext, size: str, folder: Path) -> dict[str, Any]:
    assert context.recipe.export
    step = context.last_model_step(size)
    model = context.open_model_of(step)
    dense_files = context.run_directory.folder(f"export/{DENSE}")
    figures = _write(context, model, folder, f"../../{step}/model", dense=dense_files)
    figures["metrics"] = {}
    if context.recipe.evaluate and context.recipe.export.measure:
        failed = failures(figures)
        for name, entry in figures["towers"]["image"]["files"].items():
            if not FORMATS[name].measured or entry["file"] in failed:
                continue
            exported = open_exported(folder / entry["file"])
            clip = as_clip(model, exported).eval()
            figures["metrics"][name] = measure_datasets(context, model, clip, folder, name)
    return figures


def _write(context: RunContext, model: OpenedModel, folder: Path, source: str, **options: Any) -> dict[str, Any]:
    section = context.recipe.export
    assert section
    images = torch.cat(list(context.find_images().sample(NUM_EXAMPLES, context.recipe.seed, model.preprocess)))
    keys = section.model_dump(exclude={"measure"})
    return export_model(model, images, folder, source=source, **keys, **options)
