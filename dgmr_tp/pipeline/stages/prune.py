"""Prune: choose the neurons of every size and cut the dense model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from dgmr_tp.compression.amp_search import SearchConfig, search
from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.criteria import CRITERIA, GradientCriterion, criterion_named, names_needing
from dgmr_tp.compression.planning import check_amount, make_plan
from dgmr_tp.compression.prune import prune_by_plan
from dgmr_tp.compression.quality_target import (
    MIN_HELD_OUT_IMAGES,
    NUM_HELD_OUT_IMAGES,
    QUALITY_TARGETS,
    prune_to_target,
)
from dgmr_tp.data.images import Images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.run_directory import JOURNAL, Step
from dgmr_tp.pipeline.stages.base import IMAGE_PACKAGES, Stage
from dgmr_tp.pipeline.stages.rank import RANKINGS_STEP, read_rankings
from dgmr_tp.pruning import Plan
from dgmr_tp.pruning.allocation import AMOUNTS, BUDGETS, given_amount
from dgmr_tp.pruning.cost import flops, parameters
from dgmr_tp.utils.config import Config, NameIn
from dgmr_tp.utils.sources import Source, is_url

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext

WAYS = (*AMOUNTS, "threshold", *QUALITY_TARGETS)
"""The keys of the section that say how many neurons stay."""


class PruneSection(Config):
    """Which neurons stay. Give one of the amounts, alone or as a list; every size goes through the whole recipe."""

    criterion: Annotated[str, NameIn(CRITERIA)] = "dgmr"
    """Criterion of selection. ``output``, ``activation``, ``taylor`` and ``amp`` run ``recover.images`` of the images
    through the tower. With ``threshold``, ``search.images`` applies instead. ``output`` and ``activation`` also fit the
    widths to a budget."""
    mlp_ratio: float | list[float] | None = None
    """Hidden width as a multiple of the token width, in every block."""
    keep_ratio: float | list[float] | None = None
    """Hidden width as a fraction of what it is, in every block."""
    keep: int | list[int] | None = None
    """Hidden width in neurons, in every block."""
    budget: dict[str, float] | list[dict[str, float]] | None = None
    """Cost of the tower: ``{params: 0.5}``, ``{flops: 0.4}``, ``{latency: 0.6}`` or several; see
    dgmr_tp.pruning.allocation."""
    threshold: float | list[float] | None = None
    """For ``amp``: search the widths. The largest rise of the entropy by each MLP's cut, in nats."""
    search: SearchConfig = Field(default_factory=lambda: SearchConfig.model_validate({}))
    """Images and temperature of AMP's search."""
    min_cosine: float | list[float] | None = None
    """Find the smallest size whose recovered embeddings have this mean cosine to the dense model's; see
    dgmr_tp.compression.quality_target."""
    max_drop: float | list[float] | None = None
    """Find the smallest size whose k-NN accuracy drops by at most this fraction. The images need classes."""
    held_out: int = Field(NUM_HELD_OUT_IMAGES, ge=MIN_HELD_OUT_IMAGES)
    """Held-out images that decide whether a quality target is met. Neither ranking nor recovery sees them."""
    round_to: int = Field(1, ge=1)
    """Hidden widths are multiples of this."""

    @model_validator(mode="after")
    def _consistent(self) -> PruneSection:
        way = self._way
        if len(self.sizes) != (len(self._amounts) or None):
            raise ValueError("the list of sizes is empty or names a size twice")
        if self.threshold is not None and (not self._searches_widths or self.round_to > 1):
            raise ValueError("threshold is for criterion: amp, whose search finds the widths; leave out round_to")
        if self.threshold is None and self.search != SearchConfig.model_validate({}):
            raise ValueError("search belongs to a threshold; give one instead of another amount, or leave search out")
        fitting = names_needing("activations")
        if self.has_quality_target and self.criterion not in fitting:
            raise ValueError(f"{way} looks for fitted widths; set criterion: {' or '.join(fitting)}")
        if not self.has_quality_target and self.held_out != NUM_HELD_OUT_IMAGES:
            raise ValueError("held_out belongs to min_cosine or max_drop; give one of them, or leave held_out out")
        for amount in self._amounts:
            self._check_range(amount)
        return self

    def _check_range(self, amount: Any) -> None:
        if isinstance(amount, dict) and (not amount or not amount.keys() <= set(BUDGETS)):
            raise ValueError(f"a budget has one or more of {', '.join(BUDGETS)}, got {amount}")
        for key, number in amount.items() if isinstance(amount, dict) else [(self._way, amount)]:
            if number <= 0:
                raise ValueError(f"{key} must be above 0, got {number}")
            if key in QUALITY_TARGETS and number >= 1:
                raise ValueError(f"{key} must be below 1, got {number}")
            if key == "keep_ratio" and number > 1:
                raise ValueError(f"keep_ratio must be at most 1, got {number}")

    @property
    def sizes(self) -> dict[str, dict[str, Any]]:
        """Name and arguments of each size: ``{"mlp_ratio-1": {"mlp_ratio": 1}}``, ``{"params-0.5": {"budget": …}}``."""
        rounded = {"round_to": self.round_to} if self.round_to > 1 else {}
        sizes = {}
        for amount in self._amounts:
            limits = amount if isinstance(amount, dict) else {self._way: amount}
            name = "-".join(f"{key}-{number:g}" for key, number in limits.items())
            sizes[name] = {self._way: amount, **rounded}
        return sizes

    @property
    def has_quality_target(self) -> bool:
        """True if a quality target finds the sizes."""
        return self._way in QUALITY_TARGETS

    @property
    def _searches_widths(self) -> bool:
        criterion = criterion_named(self.criterion)
        return isinstance(criterion, GradientCriterion) and criterion.searches_widths

    @property
    def _way(self) -> str:
        try:
            way = given_amount({key: getattr(self, key) for key in WAYS}, WAYS)
        except DgmrError as error:
            raise ValueError(str(error)) from None
        if way is None:
            raise ValueError(f"give one of {', '.join(WAYS)}")
        return way

    @property
    def _amounts(self) -> list[Any]:
        value = getattr(self, self._way)
        return value if isinstance(value, list) else [value]


class PruneStage(Stage):
    """Cut the dense model to every size."""

    name = "prune"
    model_label = "pruned"
    own_packages = ("torch-pruning", "scipy", *IMAGE_PACKAGES)

    def preflight(self, context: RunContext) -> None:
        section = context.recipe.prune
        if section.has_quality_target:
            _check_target_images(context)
        elif section.threshold is None:
            for size, amount in section.sizes.items():
                if amount.get("budget") and criterion_named(section.criterion).needs != "activations":
                    continue  # the stage checks such a budget before it reads images
                try:
                    check_amount(context.shapes, **amount)
                except DgmrError as error:
                    raise DgmrError(f"prune, {size}: {error}") from error

    def steps(self, context: RunContext) -> list[Step]:
        recipe = context.recipe
        needs = criterion_named(recipe.prune.criterion).needs
        inputs = {"weights": (), "activations": (RANKINGS_STEP,), "gradients": context.scenes_steps}[needs]
        steps = []
        for size, amount in recipe.prune.sizes.items():
            describe, work = partial(_describe, context, amount), partial(_prune, context, size, amount)
            steps.append(Step(self.name, size, describe, inputs, work, packages=self.packages(context)))
        return steps


def _check_target_images(context: RunContext) -> None:
    recipe = context.recipe
    if is_url(recipe.images):
        raise DgmrError(
            "prune.min_cosine and prune.max_drop need images on disk, not at a URL. Name a folder or a local shard."
        )
    source = context.images_source
    if Source.parse(source).missing:  # generated by the run itself
        return
    images, needed = Images.find(source), recipe.num_calibration_images + recipe.prune.held_out
    if len(images) < needed:
        raise DgmrError(
            f"images: {recipe.images} holds {len(images)}, but recover.images and prune.held_out together are "
            f"{needed}. Add images, or lower one of the two."
        )
    if recipe.prune.max_drop is not None:
        if any(record.class_name() is None for record in images.records):
            raise DgmrError(
                f"prune.max_drop: not every image in {recipe.images} has a class. Give subfolders, or use min_cosine."
            )
        images.classes(at_least=2)


def _describe(context: RunContext, amount: dict[str, Any]) -> dict[str, Any]:
    recipe = context.recipe
    section = {
        **context.describe_model(),
        "criterion": recipe.prune.criterion,
        **amount,
        "seed": recipe.seed,
    }
    if criterion_named(recipe.prune.criterion).needs == "gradients" or recipe.prune.has_quality_target:
        section["dtype"] = recipe.compute.dtype
    if "threshold" in amount:
        section |= {"search": recipe.prune.search.model_dump(), **context.describe_images()}
    elif criterion_named(recipe.prune.criterion).needs == "gradients":
        section |= {"calibration": recipe.num_calibration_images, **context.describe_images()}
    elif recipe.prune.has_quality_target:
        assert recipe.recover
        section |= {
            "held_out": recipe.prune.held_out,
            "damping": recipe.recover.damping,
            "tune_steps": recipe.recover.tune_steps,
            **context.describe_images(),
        }
    return section


def _prune(context: RunContext, size: str, amount: dict[str, Any], folder: Path) -> dict[str, Any]:
    dense = context.dense
    plan, search_figures = _plan_of_size(context, amount, folder)
    pruned, table = prune_by_plan(dense, plan)
    context.save_model(pruned, plan, folder, f"prune/{size}")
    sites = [{"site": row.site, "width": row.width, "hidden": row.hidden, "num_kept": row.num_kept} for row in table]
    return {"dense": _cost(dense), "pruned": _cost(pruned), "sites": sites, **search_figures}


def _plan_of_size(context: RunContext, amount: dict[str, Any], folder: Path) -> tuple[Plan, dict[str, Any]]:
    """Make the plan of a size, and return it with the figures of its search."""
    recipe = context.recipe
    needs = criterion_named(recipe.prune.criterion).needs
    if needs == "weights":
        return make_plan(context.dense, recipe.prune.criterion, seed=recipe.seed, **amount), {}
    dense = context.dense
    if recipe.prune.has_quality_target:
        return _plan_for_target(context, dense, amount)
    if needs == "activations":
        return read_rankings(context).plan(dense, **amount), {}
    search_config = recipe.prune.search
    count = search_config.images if "threshold" in amount else recipe.num_calibration_images
    images = CalibrationImages.read(context.images_source, dense, count, recipe.seed)
    if "threshold" not in amount:
        plan = make_plan(dense, recipe.prune.criterion, images, seed=recipe.seed, **amount)
        return plan, {"broken_images": images.broken}
    journal = folder / JOURNAL
    result = search(
        dense, images, threshold=amount["threshold"], config=search_config, journal=journal, seed=recipe.seed
    )
    forward_passes = result.image_blocks / len(dense.adapter.blocks())
    figures = {"entropy": result.entropy, "image_forwards": forward_passes, "broken_images": images.broken}
    return result.plan, figures


def _plan_for_target(context: RunContext, dense: OpenedModel, amount: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """Make the plan that meets the target. The recovery stage then makes exactly the model that was evaluated."""
    recipe = context.recipe
    assert recipe.recover
    result = prune_to_target(
        dense,
        context.images_source,
        num_calibration_images=recipe.recover.images,
        held_out=recipe.prune.held_out,
        damping=recipe.recover.damping,
        tune_steps=recipe.recover.tune_steps,
        seed=recipe.seed,
        rankings=read_rankings(context),
        **amount,
    )
    figures = {**result.best._asdict(), "trials": [trial._asdict() for trial in result.trials]}
    return result.pruned.plan, {"quality_target": figures}


def _cost(model: OpenedModel) -> dict[str, int]:
    assert model.image_size is not None
    return {"parameters": parameters(model.tower), "flops": flops(model.tower, model.image_size)}
