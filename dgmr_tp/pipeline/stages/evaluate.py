"""Evaluate the dense model and every model of the run on the same data sets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator
from torch import nn

from dgmr_tp.data.images import Images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.evaluation.knn import KNNConfig, knn_accuracy
from dgmr_tp.evaluation.linear_head import HeadConfig, check_classifier, head_accuracy, read_head
from dgmr_tp.evaluation.zero_shot import DatasetConfig, as_clip, evaluate
from dgmr_tp.pipeline.run_directory import Step
from dgmr_tp.pipeline.stages.base import IMAGE_PACKAGES, Stage
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.config import Config
from dgmr_tp.utils.files import sha256, write_json
from dgmr_tp.utils.lazy_imports import require_installed

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext

DENSE = "dense"
"""In place of a size: the dense model. It is also the label of its figures."""
KNN_TITLE, HEAD_TITLE = "k-NN", "linear head"
"""Headings of figures that clip_benchmark does not compute."""


class EvaluateSection(Config):
    """Evaluation of the dense model and of every model of the run."""

    datasets: list[DatasetConfig] = Field(default_factory=list)
    """clip_benchmark data sets."""
    knn: KNNConfig | None = None
    """k-NN accuracy of the embeddings."""
    head: HeadConfig | None = None
    """Accuracy of a linear classifier."""
    batch_size: int = Field(64, ge=1)
    """Images per batch."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSection:
        names = [entry.dataset for entry in self.datasets]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"datasets names {', '.join(repeated)} twice")
        if not self.datasets and not self.knn and not self.head:
            raise ValueError("nothing is evaluated; give datasets, knn or head")
        return self


class EvaluateStage(Stage):
    """Evaluate with clip_benchmark's metrics, k-NN and a linear head."""

    name = "evaluate"
    own_packages = ("clip_benchmark", "scikit-learn", *IMAGE_PACKAGES)

    def preflight(self, context: RunContext) -> None:
        section = context.recipe.evaluate
        assert section
        if section.datasets:
            require_installed("clip_benchmark", "eval")
        if section.head and not section.head.weights:
            check_classifier(context.shapes)

    def steps(self, context: RunContext) -> list[Step]:
        section = context.recipe.evaluate
        if section is None:
            return []

        def describe() -> dict[str, Any]:
            return {**describe_evaluation(section), "dtype": context.recipe.compute.dtype}

        def describe_dense() -> dict[str, Any]:
            return {**describe(), **context.describe_model()}

        def evaluate_dense(folder: Path) -> dict[str, Any]:
            with context.dense.running():
                return {DENSE: _measure_model(context, context.dense, folder, DENSE)}

        # First: a model or data set that cannot be evaluated shows before anything is computed.
        steps = [
            Step(
                self.name,
                DENSE,
                describe_dense,
                context.scenes_steps,
                evaluate_dense,
                runs_first=True,
                packages=self.packages(context),
            )
        ]
        for size in context.recipe.prune.sizes:
            inputs = (*context.model_steps(size).values(), *context.scenes_steps)
            steps.append(
                Step(
                    self.name,
                    size,
                    describe,
                    inputs,
                    partial(_evaluate_size, context, size),
                    packages=self.packages(context),
                )
            )
        return steps


def check_text_tower(context: RunContext, key: str) -> None:
    """Raise DgmrError, naming the recipe's ``key``, if the model has no text tower or no tokenizer."""
    shapes = context.shapes
    if shapes.text is None or (shapes.library == "transformers" and shapes.tokenizer is None):
        raise DgmrError(
            f"{key}: {context.recipe.model.source} has no text tower, or no tokenizer files. Leave that key out."
        )


def describe_evaluation(section: EvaluateSection) -> dict[str, Any]:
    """Return what decides the figures, for a manifest."""
    machine: Any = {"batch_size": True, "knn": {"workers"}, "head": {"workers"}}
    described = section.model_dump(exclude=machine)
    if section.head and (head := Path(section.head.weights or "")).is_file():
        described["head_sha256"] = sha256(head)  # another head may have the same name and size
    return described


def _evaluate_size(context: RunContext, size: str, folder: Path) -> dict[str, Any]:
    figures = {}
    for label, step in context.model_steps(size).items():
        model = context.open_model_of(step)
        with model.running():
            figures[label] = _measure_model(context, model, folder, label)
    return figures


def _measure_model(context: RunContext, model: OpenedModel, folder: Path, label: str) -> dict[str, dict[str, float]]:
    """Return the metrics of a running model on everything that the recipe evaluates, by data set."""
    section = context.recipe.evaluate
    assert section
    encoder = ImageEncoder(model.adapter).eval()
    options = {"device": context.device, "batch_size": section.batch_size}
    metrics = measure_datasets(context, model, as_clip(model).eval(), folder, label)
    own: dict[str, dict[str, float]] = {}
    if section.knn:
        bank, test = (Images.find(context.resolve(path)) for path in (section.knn.train, section.knn.test))
        figures = knn_accuracy(encoder, model.preprocess, train=bank, test=test, workers=section.knn.workers, **options)
        own["knn"] = _with_skipped(figures, bank, test)
    if section.head:
        test = Images.find(context.resolve(section.head.test))
        head = read_head(Path(section.head.weights)) if section.head.weights else None
        figures = head_accuracy(
            encoder, model.preprocess, head=head, test=test, workers=section.head.workers, **options
        )
        own["head"] = _with_skipped(figures, test)
    for name, figures in own.items():
        write_json(folder / f"{label}-{name}.json", figures)
    titles = {"knn": KNN_TITLE, "head": HEAD_TITLE}
    return {**{titles[name]: figures for name, figures in own.items()}, **metrics}


def measure_datasets(
    context: RunContext, model: OpenedModel, clip: nn.Module, folder: Path, label: str
) -> dict[str, dict[str, float]]:
    """Return clip_benchmark's metrics of ``clip`` on every data set of the recipe, and keep its files in ``folder``.

    Args:
        context: of the run.
        model: gives preprocessing and tokenizer.
        clip: encodes images and texts: the model itself, or an exported file with the model's text tower.
        folder: for clip_benchmark's JSON files.
        label: what the files and the report call it.
    """
    section = context.recipe.evaluate
    assert section
    metrics = {}
    for entry in section.datasets:
        metrics[entry.dataset] = evaluate(
            clip,
            model.preprocess,
            model.tokenizer,
            dataset=entry.dataset,
            root=context.resolve(entry.root),
            output=folder / f"{label}-{entry.dataset.replace('/', '_')}.json",
            name=f"{context.recipe.name}-{label}",
            task=entry.task,
            batch_size=section.batch_size,
        )
    return metrics


def _with_skipped(figures: dict[str, float], *images: Images) -> dict[str, float]:
    """Add the number of images that did not decode to the figures, if there are any."""
    skipped = sum(len(source.broken) for source in images)
    return {**figures, "images_left_out": skipped} if skipped else figures
