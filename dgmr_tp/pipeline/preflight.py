"""Preflight checks: fail before the first stage if a package, a file or a part of the model is missing."""

from __future__ import annotations

from pathlib import Path

from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.context import RunContext
from dgmr_tp.pipeline.recipe import Recipe, is_generated
from dgmr_tp.utils.config import data_paths
from dgmr_tp.utils.sources import Source, is_url


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
    return {key: not Source.parse(path).missing for key, path in local.items()}


def check_trust(context: RunContext) -> None:
    """Check that the user trusts the shell commands in the recipe, if it contains any.

    Raises:
        DgmrError: names the key and the command.
    """
    for key, path in shell_commands(context.recipe).items():
        if not context.trusted:
            raise DgmrError(
                f"{key}: {path} runs a shell command on this machine. Read it, and give --trust-recipe if you trust "
                "the recipe."
            )


def shell_commands(recipe: Recipe) -> dict[str, str]:
    """Return the paths of the recipe that run a shell command, by key."""
    return {key: path for key, path in recipe.paths.items() if Source.parse(path).runs_command}
