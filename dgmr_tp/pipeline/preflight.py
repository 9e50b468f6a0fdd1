"""Preflight checks: fail before the first stage if a package, a file or a part of the model is missing."""

from __future__ import annotations

from pathlib import Path

from dgmr_tp.data.streams import is_url
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.context import RunContext
from dgmr_tp.pipeline.recipe import Recipe, is_generated
from dgmr_tp.utils.config import data_paths


def run_preflight(context: RunContext) -> None:
    """Check all paths of the recipe, then let every planned stage check what it needs.

    Raises:
        DgmrError: names the key and what is missing.
    """
    if missing := [key for key, exists in path_status(context.recipe).items() if not exists]:
        raise DgmrError(f"{missing[0]}: {context.recipe.paths[missing[0]]} does not exist. Correct the path.")
    for key, (path, kind) in data_paths(context.recipe).items():
        if (
            kind != "any"
            and not is_generated(path)
            and not is_url(path)
            and Path(path).is_dir() != (kind == "directory")
        ):
            raise DgmrError(f"{key}: {path} is not a {kind}. Correct the path.")
    for stage in context.stages:
        if stage.is_planned(context.recipe):
            stage.preflight(context)


def path_status(recipe: Recipe) -> dict[str, bool]:
    """Return whether each path that the recipe reads exists, by key. URLs and generated data sets are left out."""
    local = {key: path for key, path in recipe.paths.items() if not is_generated(path) and not is_url(path)}
    return {key: Path(path).exists() for key, path in local.items()}
