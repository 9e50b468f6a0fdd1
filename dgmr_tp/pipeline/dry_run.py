"""Go through a recipe without weights, data or a GPU: the tower on the meta device, sizes, optimizer groups, paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dgmr_tp.compression.quality_target import QUALITY_TARGETS
from dgmr_tp.distillation.config import DistillConfig
from dgmr_tp.distillation.engine import deepspeed_config, freeze_unused_parameters, parameter_groups
from dgmr_tp.distillation.losses import FeatureTap
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.pipeline.preflight import path_status, shell_commands
from dgmr_tp.pipeline.recipe import Recipe
from dgmr_tp.pruning import MLPPruner, Site
from dgmr_tp.pruning.cost import costs, image_shape
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.utils.yaml_reader import Dumper


@dataclass(frozen=True)
class Size:
    """One size of a dry run."""

    keep: dict[str, int]
    """Neurons kept, by site. With a budget and a criterion that ranks on images, the run gives each MLP a width of its
    own instead."""
    parameters: int
    flops: int
    """Operations per image."""
    groups: list[dict[str, Any]] | None
    """AdamW's parameter groups of the student, as ``{"tensors", "parameters", "weight_decay"}``; None without
    distillation."""


@dataclass(frozen=True)
class DryRun:
    """Result of :func:`dry_run`. ``print`` shows it."""

    recipe: Recipe
    sites: list[Site]
    parameters: int
    flops: int
    sizes: dict[str, Size]
    deepspeed: dict[str, Any] | None
    """DeepSpeed's configuration in each process; None without distillation."""
    paths: dict[str, bool]
    """Paths of the recipe, and whether they exist. Data sets that the run generates are left out."""

    def __str__(self) -> str:
        widths = sorted({(site.width, site.hidden) for site in self.sites})
        mlps = ", ".join(f"{width} × {hidden}" for width, hidden in widths)
        lines = [
            f"{self.recipe.model.source}: {len(self.sites)} MLPs of {mlps}, {self.parameters / 1e6:.1f} M parameters, "
            f"{self.flops / 1e9:.1f} GFLOPs per image"
        ]
        for name, size in self.sizes.items():
            hidden = ", ".join(map(str, sorted(set(size.keep.values()))))
            lines.append(
                f"{name}: hidden {hidden}; {size.parameters / 1e6:.1f} M parameters "
                f"({size.parameters / self.parameters - 1:+.1%}), {size.flops / 1e9:.1f} GFLOPs "
                f"({size.flops / self.flops - 1:+.1%})"
            )
            for group in size.groups or []:
                lines.append(
                    f"  trained: {group['tensors']} tensors, {group['parameters'] / 1e6:.1f} M parameters, "
                    f"weight decay {group['weight_decay']}"
                )
        if self.deepspeed:
            lines.append(f"deepspeed: {self.deepspeed}")
        lines += [f"{'found' if exists else 'MISSING'}: {path}" for path, exists in self.paths.items()]
        lines += [f"shell command, needs --trust-recipe: {key}" for key in shell_commands(self.recipe)]
        resolved = self.recipe.model_dump(exclude_unset=True, mode="json")
        return "\n".join(
            [
                *lines,
                "resolved recipe:",
                yaml.dump(resolved, Dumper=Dumper, sort_keys=False, allow_unicode=True).rstrip(),
            ]
        )


def dry_run(recipe: Recipe) -> DryRun:
    """Go through a recipe without running it.

    Raises:
        DgmrError: the model is unknown, or a size is impossible.
    """
    dense = open_model(**recipe.model.options, pretrained=recipe.model.pretrained, weights="none")
    tower_costs = costs(dense.tower, dense.sites, dense.image_size)
    sizes = {}
    for name, amount in recipe.prune.sizes.items():
        if {"threshold", *QUALITY_TARGETS} & amount.keys() or "latency" in amount.get("budget", {}):
            continue  # only the run itself finds these widths
        pruner = MLPPruner(dense.tower, sites=dense.sites, image_size=dense.image_size, **amount)  # type: ignore[arg-type]
        assert pruner.keep is not None
        cut = {site.name: site.hidden - pruner.keep[site.name] for site in dense.sites}
        groups = _parameter_groups(recipe.distill, dense.copy(), pruner.keep) if recipe.distill else None
        sizes[name] = Size(pruner.keep, tower_costs["params"].without(cut), tower_costs["flops"].without(cut), groups)
    config = None
    if recipe.distill:
        config = deepspeed_config(recipe.distill, recipe.distill.processes, Path("RUN_DIR"))
    paths = {recipe.paths[key]: exists for key, exists in path_status(recipe).items()}
    total, operations = tower_costs["params"].total, tower_costs["flops"].total
    return DryRun(recipe, dense.sites, total, operations, sizes, config, paths)


def _parameter_groups(config: DistillConfig, student: OpenedModel, keep: dict[str, int]) -> list[dict[str, Any]]:
    resize(student.tower, keep)
    tap = FeatureTap(student.adapter, config.loss)
    assert student.image_size is not None
    shape = image_shape(student.tower, student.image_size)
    freeze_unused_parameters(tap, torch.zeros(1, *shape, device="meta"))
    groups = []
    for group in parameter_groups(tap, config.weight_decay):
        count = sum(parameter.numel() for parameter in group["params"])
        groups.append({"tensors": len(group["params"]), "parameters": count, "weight_decay": group["weight_decay"]})
    return groups
