"""What a recipe would do, found out without weights, data or a GPU: the tower on the meta device, plan, optimiser, paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dgmr_tp.compression.criteria import block_sites
from dgmr_tp.data.streams import is_url
from dgmr_tp.distillation.config import DistillConfig
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.recipe import PROMISES, Recipe
from dgmr_tp.pruning import MLPPruner, Site
from dgmr_tp.pruning.cost import flop_cost, parameter_cost
from dgmr_tp.pruning.pruner import resize


@dataclass(frozen=True)
class Size:
    """One size of a dry run."""

    keep: dict[str, int]
    """Neurons kept, by site. With a budget and a criterion that sees images, the run gives each MLP a width of its own instead."""
    parameters: int
    flops: int
    """Of one image."""
    groups: list[dict[str, Any]] | None
    """AdamW's parameter groups of the student, as ``{"tensors", "parameters", "weight_decay"}``; None without distillation."""


@dataclass(frozen=True)
class DryRun:
    """What :func:`dry_run` finds."""

    encoder: str
    sites: list[Site]
    parameters: int
    flops: int
    sizes: dict[str, Size]
    deepspeed: dict[str, Any] | None
    """DeepSpeed's configuration of each process; None without distillation."""
    paths: dict[str, bool]
    """Data paths of the recipe, and whether they are there; ``scenes:`` paths are made by the run."""

    def __str__(self) -> str:
        widths = sorted({(site.width, site.hidden) for site in self.sites})
        lines = [
            f"{self.encoder}: {len(self.sites)} MLPs of {', '.join(f'{width} × {hidden}' for width, hidden in widths)}, "
            f"{self.parameters / 1e6:.1f} M parameters, {self.flops / 1e9:.1f} GFLOPs an image"
        ]
        for name, size in self.sizes.items():
            kept = sorted(set(size.keep.values()))
            lines.append(
                f"{name}: hidden {', '.join(map(str, kept))}; {size.parameters / 1e6:.1f} M parameters "
                f"({size.parameters / self.parameters - 1:+.1%}), {size.flops / 1e9:.1f} GFLOPs ({size.flops / self.flops - 1:+.1%})"
            )
            for group in size.groups or []:
                lines.append(
                    f"  trained: {group['tensors']} tensors, {group['parameters'] / 1e6:.1f} M parameters, decay {group['weight_decay']}"
                )
        if self.deepspeed:
            lines.append(f"deepspeed: {self.deepspeed}")
        lines += [f"{'found' if there else 'MISSING'}: {path}" for path, there in self.paths.items()]
        return "\n".join(lines)


def dry_run(recipe: Recipe) -> DryRun:
    """Go through a recipe without doing it.

    Raises:
        DgmrError: the model is unknown, or a size is impossible.
    """
    opened = open_model(**recipe.model.options, pretrained=recipe.model.pretrained, weights="none")
    tower, sites = opened.tower, block_sites(opened)
    assert sites is not None
    before = (parameter_cost(tower, sites), flop_cost(tower, sites, opened.image_size))
    sizes = {}
    for name, amount in recipe.prune.sizes.items():
        if {"threshold", *PROMISES} & amount.keys() or "latency" in amount.get("budget", {}):
            continue  # only the run itself finds these widths
        pruner = MLPPruner(tower, sites=sites, image_size=opened.image_size, **amount)  # type: ignore[arg-type]
        assert pruner.keep is not None
        cut = {site.name: site.hidden - pruner.keep[site.name] for site in sites}
        after = [cost.without(cut) for cost in before]
        sizes[name] = Size(
            pruner.keep, *after, groups=_groups(recipe.distill, opened.copy(), pruner.keep) if recipe.distill else None
        )
    config = None
    if recipe.distill:
        from dgmr_tp.distillation.engine import deepspeed_config

        config = deepspeed_config(recipe.distill, recipe.distill.processes, Path("RUN_DIR"))
    roots = [
        recipe.images,
        *(path for reads in (recipe.evaluate, recipe.compare) if reads for path in reads.paths.values()),
    ]
    roots += [path for path in (recipe.tune_text.captions, recipe.tune_text.images) if path] if recipe.tune_text else []
    paths = {root: Path(root).exists() for root in roots if not root.startswith("scenes:") and not is_url(root)}
    return DryRun(opened.name, sites, before[0].total, before[1].total, sizes, config, paths)


def plan_memory(recipe: Recipe, devices: str, rate: str | None = None) -> tuple[str, str | None]:
    """What the recipe's distillation needs on ``devices``, such as ``8x48GB``, and how long it takes at ``rate``: images a second, or the
    directory of a run that has distilled these sizes, for a few steps at least.

    Returns:
        The text, and what to change where it does not fit (None where it does).

    Raises:
        DgmrError: the recipe distils nothing, its widths are not known before it runs, or no rate is known.
    """
    from dgmr_tp.distillation.memory import Devices, MemoryEstimator

    there = Devices.parse(devices)
    if recipe.distill is None:
        raise DgmrError(f"the recipe {recipe.name} has no section distill; only that needs planning")
    config = recipe.distill
    teacher = open_model(**recipe.model.options, pretrained=recipe.model.pretrained, weights="none")
    images = config.steps * config.batch_size
    texts, misfit = [], None
    for name, size in dry_run(recipe).sizes.items():
        student = teacher.copy()
        resize(student.tower, size.keep)
        estimator = MemoryEstimator(student.adapter, teacher.adapter, config, teacher.image_size)
        texts.append(f"{name}: {estimator.table(config, there)}\n{images:,} images{_hours(images, rate, name)}")
        if not estimator.fits(config, there) and misfit is None:
            remedy = estimator.smallest_change(config, there)
            change = "it would fit with distill." + ", ".join(
                f"{key}: {str(value).lower()}" for key, value in (remedy or {}).items()
            )
            misfit = f"{name} does not fit into {devices}; {change if remedy else 'no setting changes that: take larger devices'}"
    if not texts:
        raise DgmrError(
            "only the run itself finds these widths; plan with a ratio, or with a budget of params or flops"
        )
    return "\n".join(texts), misfit


def _hours(images: int, rate: str | None, size: str) -> str:
    if rate is None:
        return ""
    try:
        each, measured = float(rate), ""
    except ValueError:
        each, measured = _measured_rate(Path(rate), size), f" (measured in {rate})"
    if not each > 0:
        raise DgmrError(f"--rate {rate}: images per second are more than 0")
    return f" at {each:.4g} a second{measured}: {images / each / 3600:,.1f} hours"


def _measured_rate(run: Path, size: str) -> float:
    """The median over the later half of a distillation, finished or not."""
    from dgmr_tp.distillation.loop import read_curve

    folders = (run / "distill" / size, run / "distill" / f".{size}.partial")
    rates = [value for folder in folders for _, value in read_curve(folder, "samples_per_second")]
    if not rates:
        raise DgmrError(
            f"--rate {run}: give images per second, or the directory of a run that has begun to distil {size}"
        )
    return median(rates[len(rates) // 2 :])


def _groups(distill: DistillConfig, student: OpenedModel, keep: dict[str, int]) -> list[dict[str, Any]]:
    from dgmr_tp.distillation.engine import freeze_unused_parameters, parameter_groups
    from dgmr_tp.distillation.losses import FeatureTap

    resize(student.tower, keep)
    tap = FeatureTap(student.adapter, distill.loss)
    freeze_unused_parameters(tap, torch.zeros(1, 3, student.image_size, student.image_size, device="meta"))
    return [
        {
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "weight_decay": group["weight_decay"],
        }
        for group in parameter_groups(tap, distill.weight_decay)
    ]
