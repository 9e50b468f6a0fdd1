"""What a recipe would do, found out without weights, data or a GPU: the tower on the meta device, plan, optimiser, paths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dgmr_tp.data.streams import is_url
from dgmr_tp.decide import block_sites
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import MLPPruner, Site
from dgmr_tp.pruning.cost import flop_cost, parameter_cost
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.recipe import Distill, Recipe


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
    tower, sites = opened.encoder.module, block_sites(opened)
    assert sites is not None
    before = (parameter_cost(tower, sites), flop_cost(tower, sites, opened.image_size))
    sizes = {}
    for name, amount in recipe.prune.sizes.items():
        if "threshold" in amount or "latency" in amount.get("budget", {}):
            continue  # only the run itself finds these widths
        pruner = MLPPruner(tower, sites=sites, image_size=opened.image_size, **amount)  # type: ignore[arg-type]
        assert pruner.keep is not None
        cut = {site.name: site.hidden - pruner.keep[site.name] for site in sites}
        after = [cost.without(cut) for cost in before]
        sizes[name] = Size(pruner.keep, *after, groups=_groups(recipe.distill, opened.copy(), pruner.keep) if recipe.distill else None)
    config = None
    if recipe.distill:
        from dgmr_tp.distillation.engine import deepspeed_config
        from dgmr_tp.distillation.settings import DistillSettings

        settings = DistillSettings.of(recipe.distill.model_dump(), recipe.seed)
        config = deepspeed_config(settings, recipe.distill.processes, Path("RUN_DIR"))
    roots = [recipe.images, *(recipe.evaluate.paths.values() if recipe.evaluate else ())]
    roots += [path for path in (recipe.tune_text.captions, recipe.tune_text.images) if path] if recipe.tune_text else []
    paths = {root: Path(root).exists() for root in roots if not root.startswith("scenes:") and not is_url(root)}
    return DryRun(opened.name, sites, before[0].total, before[1].total, sizes, config, paths)


def plan_memory(recipe: Recipe, devices: str, rate: float | None = None) -> str:
    """What the recipe's distillation needs on ``devices``, such as ``8x48GB``, and how long it takes at ``rate`` images a second.

    Raises:
        DgmrError: it does not fit, with what would make it fit; or the recipe distils nothing, or its widths are not known before it runs.
    """
    from dgmr_tp.distillation.memory import Devices, Planner
    from dgmr_tp.distillation.settings import DistillSettings

    there = Devices.parse(devices)
    if recipe.distill is None:
        raise DgmrError(f"the recipe {recipe.name} has no section distill; only that needs planning")
    settings = DistillSettings.of(recipe.distill.model_dump(), recipe.seed)
    micro = settings.micro_batch_of(there.count)
    teacher = open_model(**recipe.model.options, pretrained=recipe.model.pretrained, weights="none")
    lines, misfit = [], None
    for name, size in dry_run(recipe).sizes.items():
        student = teacher.copy()
        resize(student.encoder.module, size.keep)
        planner = Planner(student.encoder, teacher.encoder, settings, teacher.image_size)
        lines += [
            f"{name}: student {planner.student / 1e6:,.1f} M parameters, {planner.trained / 1e6:,.1f} M trained, original "
            f"{planner.teacher / 1e6:,.1f} M, {'bf16' if settings.bf16 else 'float32'}",
            "zero_stage                 states, GB   MB an image: images   recomputed: images",
        ]
        for stage, sharded in ((0, False), (1, False), (2, False), (3, False), (3, True)):
            if stage == 0 and settings.bf16:
                continue
            both = [
                planner.needs(replace(settings, zero_stage=stage, shard_teacher=sharded, recompute=again, offload="none"), there.count)
                for again in (False, True)
            ]
            shown = "".join(f"{needs.image / 1e6:13.0f}: {needs.most_images(there):6d}" for needs in both)
            lines.append(f"{f'{stage}, shard_teacher' if sharded else stage!s:<26} {both[0].states / 1e9:10.1f} {shown}")
        needs = planner.needs(settings, there.count)
        total = (needs.states + micro * needs.image) / 1e9
        lines.append(
            f"the recipe: {micro} images at a time on each of {there.count} devices, about {total:.1f} of {there.memory / 1e9:g} GB"
        )
        if micro > needs.most_images(there):
            remedy = planner.remedy(settings, there)
            what = (
                ", ".join(f"{key}: {str(value).lower()}" for key, value in remedy.items())
                if remedy
                else "nothing here; take larger devices"
            )
            misfit = misfit or f"{name} needs about {total:.1f} GB on each of {devices}; it would fit with distill {what}"
    if rate:
        hours = settings.steps * settings.batch_size / rate / 3600
        lines.append(f"{settings.steps * settings.batch_size:,} images at {rate:g} a second: {hours:,.1f} hours a size")
    if misfit:
        raise DgmrError("\n".join([*lines, misfit]))
    if not recipe.distill or not lines:
        raise DgmrError("only the run itself finds these widths; plan with a ratio or a budget of params or flops")
    return "\n".join(lines)


def _groups(distill: Distill, student: OpenedModel, keep: dict[str, int]) -> list[dict[str, Any]]:
    from dgmr_tp.distillation.engine import freeze_what_outputs_do_not_need, parameter_groups
    from dgmr_tp.distillation.losses import FeatureTap, Objective

    resize(student.encoder.module, keep)
    tap = FeatureTap(student.encoder, Objective(**distill.loss.model_dump()))
    freeze_what_outputs_do_not_need(tap, torch.zeros(1, 3, student.image_size, student.image_size, device="meta"))
    return [
        {"tensors": len(group["params"]), "parameters": sum(p.numel() for p in group["params"]), "weight_decay": group["weight_decay"]}
        for group in parameter_groups(tap, distill.weight_decay)
    ]
