"""Run a recipe: the order of its steps, their manifests, and the lock on the run directory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.context import RunContext
from dgmr_tp.pipeline.preflight import check_trust, run_preflight
from dgmr_tp.pipeline.recipe import Recipe, parse_recipe
from dgmr_tp.pipeline.run_directory import RunDirectory, Step
from dgmr_tp.pipeline.stages import STAGE_NAMES, STAGES
from dgmr_tp.pipeline.stages.training import TrainingStage
from dgmr_tp.utils.files import LOCK_NAME, atomic_write, lock_directory, read_json, write_json

RECIPE = "recipe.json"
"""The resolved recipe, in the run directory."""
OVERRIDES = "overrides.json"
"""The ``--set`` options of the latest start, in the run directory."""


class Run:
    """A recipe in a run directory.

    Args:
        recipe: the recipe.
        directory: the run directory; made at the first start.
        overrides: the ``--set`` options that are part of ``recipe``, to be recorded.
        trusted: the user trusts the shell commands in the recipe, ``pipe:`` URLs.

    Raises:
        DgmrError: the directory exists but is not a run directory.
    """

    def __init__(
        self, recipe: Recipe, directory: str | Path, overrides: tuple[str, ...] = (), *, trusted: bool = False
    ) -> None:
        self.recipe = recipe
        self.overrides = overrides
        self.run_directory = RunDirectory(directory)
        self.context = RunContext(recipe, self.run_directory, STAGES, trusted)
        path = self.run_directory.path
        is_new = not path.exists() or all(file.name == LOCK_NAME for file in path.iterdir())
        if not is_new and not (path / RECIPE).exists():
            raise DgmrError(
                f"{path} is not a run directory (it has no {RECIPE}) and is not empty. Name a new one with -o."
            )

    @classmethod
    def open(cls, directory: str | Path, *, trusted: bool = False) -> Run:
        """Open the run that was started in ``directory``."""
        path = Path(directory) / RECIPE
        if not path.exists():
            raise DgmrError(f"{directory} is not a run directory: it has no {RECIPE}. Name one made by dgmr-tp run.")
        content = read_json(path, dict, remedy="Start the run again with its recipe.")
        return cls(parse_recipe(content, path), directory, trusted=trusted)

    @cached_property
    def steps(self) -> list[Step]:
        """All steps of the recipe in the order in which they run. Steps with ``runs_first`` come first."""
        steps = [step for stage in STAGES for step in stage.steps(self.context)]
        return sorted(steps, key=lambda step: not step.runs_first)

    @property
    def figures(self) -> dict[str, dict[str, Any] | None]:
        """The figures of every step, by key; None for a step that has not run."""
        return {step.key: self.run_directory.figures(step.key) for step in self.steps}

    def run(
        self,
        redo: str | None = None,
        until: str | None = None,
        say: Callable[[str], None] = print,
        *,
        accept_versions: bool = False,
    ) -> None:
        """Do every step that is not done yet, in order.

        Args:
            redo: drop the results of this stage and of those after it first.
            until: stop after this stage.
            say: receives one line per step.
            accept_versions: keep steps that were made with other versions of packages, and record that.

        Raises:
            DgmrError: another run works here, a preflight check fails, the recipe runs a shell command that is not
                trusted, a finished step was made from something else, or the error of a step.
        """
        for name in (redo, until):
            if name is not None and name not in STAGE_NAMES:
                raise DgmrError(f"unknown stage {name!r}. Use one of {', '.join(STAGE_NAMES)}.")
        run_preflight(self.context)
        check_trust(self.context)
        root = self.run_directory.path
        with lock_directory(root, "dgmr-tp run is working"):
            dropped = STAGE_NAMES[STAGE_NAMES.index(redo) :] if redo else ()
            for step in self.steps:
                if step.stage not in dropped:
                    self.run_directory.check_unchanged(step, accept_versions=accept_versions)
            for stage in dropped:
                shutil.rmtree(root / stage, ignore_errors=True)
            atomic_write(root / RECIPE, self.recipe.model_dump_json(indent=1) + "\n")
            write_json(root / OVERRIDES, list(self.overrides))
            last = STAGE_NAMES.index(until) if until else len(STAGE_NAMES)
            for step in self.steps:
                if STAGE_NAMES.index(step.stage) <= last:
                    self._run_step(step, say)

    def _run_step(self, step: Step, say: Callable[[str], None]) -> None:
        if self.run_directory.is_done(step):
            say(f"{step.key}: done before")
            return
        say(f"{step.key}: running")
        started = time.monotonic()
        self.run_directory.run_step(step)
        say(f"{step.key}: done in {time.monotonic() - started:.1f} s")

    def train_worker(self, name: str, size: str) -> None:
        """Run one launched process of a training stage. Rank 0 leaves the model and its figures.

        Raises:
            DgmrError: the recipe runs a shell command that is not trusted, it has no such training, a step that it
                reads is not finished, or it was started from something else.
        """
        check_trust(self.context)
        stage = next(stage for stage in STAGES if stage.name == name)
        assert isinstance(stage, TrainingStage)
        step = next((step for step in self.steps if step.key == f"{name}/{size}"), None)
        if step is None:
            sizes = ", ".join(self.recipe.prune.sizes)
            raise DgmrError(f"this run's recipe has no {name} for a size {size!r}. Its sizes are {sizes}.")
        if self.run_directory.is_done(step):
            print(f"{step.key}: done before", flush=True)
            return
        if unfinished := [key for key in step.inputs if self.run_directory.figures(key) is None]:
            raise DgmrError(
                f"{unfinished[0]} is not finished, which {step.key} reads. Run dgmr-tp run RECIPE -o "
                f"{self.run_directory.path} --until {unfinished[0].split('/')[0]}."
            )
        staging = self.run_directory.staging(step)
        if os.environ.get("RANK", "0") == "0":  # the other processes wait for rank 0 in the first collective
            self.run_directory.check_unchanged(step)
            staging = self.run_directory.prepare(step)
        stage.train_worker(self.context, step, staging)
