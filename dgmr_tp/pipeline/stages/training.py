"""Base class of the training stages. It launches the processes, and is the entry point of each of them."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmr_tp.distillation.config import TrainingConfig
from dgmr_tp.distillation.loop import curve_names, read_curve
from dgmr_tp.distillation.processes import STOP_FILE, launch
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.run_directory import Step
from dgmr_tp.pipeline.stages.base import IMAGE_PACKAGES, Stage
from dgmr_tp.utils.files import read_json, sha256, write_json
from dgmr_tp.utils.lazy_imports import require_installed

if TYPE_CHECKING:
    from dgmr_tp.pipeline.context import RunContext

FIGURES = "figures.json"
"""Written by rank 0 of a finished training, for the process that launched it."""
MAIN_CURVES = {"losses": "loss", "scores": "score", "knn": "knn"}
"""Curves with a place of their own in the figures, by the figures' key; the others are details."""


class TrainingStage(Stage):
    """A stage that trains one model per size under the DeepSpeed launcher."""

    own_packages = ("deepspeed", *IMAGE_PACKAGES)
    command: str
    """The subcommand of ``dgmr-tp`` that each launched process runs."""

    @abstractmethod
    def train(self, context: RunContext, model: OpenedModel, folder: Path, step: Step) -> dict[str, Any] | None:
        """Train ``model`` in place, in every launched process. Rank 0 returns the figures, the others None."""

    def config(self, context: RunContext) -> TrainingConfig:
        """Return the recipe's section of this stage.

        Raises:
            DgmrError: the recipe has none.
        """
        config = getattr(context.recipe, self.name)
        if config is None:
            raise DgmrError(
                f"the recipe of {context.run_directory.path} has no section {self.name}. Add one and run again."
            )
        return config

    def preflight(self, context: RunContext) -> None:
        require_installed("deepspeed", "distill")
        if hosts := self.config(context).hostfile:
            _check_hosts(f"{self.name}.hostfile", hosts)

    def steps(self, context: RunContext) -> list[Step]:
        if not self.is_planned(context.recipe):
            return []
        steps = []
        for size in context.recipe.prune.sizes:
            inputs = (context.last_model_step(size, before=self.name), *context.scenes_steps)
            describe, work = partial(self.describe, context), partial(self.launch, context, size)
            steps.append(
                Step(self.name, size, describe, inputs, work, packages=self.packages(context), has_checkpoints=True)
            )
        return steps

    def describe(self, context: RunContext) -> dict[str, Any]:
        """Return what decides the outcome: the section, and the DeepSpeed file that it names."""
        config = self.config(context)
        section: dict[str, Any] = {self.name: config.outcome_settings}
        if config.deepspeed and Path(config.deepspeed).is_file():
            section["deepspeed_sha256"] = sha256(Path(config.deepspeed))
        return section

    def launch(self, context: RunContext, size: str, folder: Path) -> dict[str, Any]:
        """Launch the training processes and wait for them. Return the figures with the curves."""
        config = self.config(context)
        context.release_dense()  # the memory belongs to the training
        if not (folder / FIGURES).exists():
            arguments = [self.command, str(context.run_directory.path), "--size", size]
            arguments += ["--trust-recipe"] if context.trusted else []
            launch(arguments, config.processes, config.batch_size, folder / STOP_FILE, config.hostfile)
        if not (folder / FIGURES).exists():
            raise DgmrError("the deepspeed launcher was killed. Run again to resume from the last checkpoint.")
        figures = read_json(folder / FIGURES, dict, remedy=f"Run again with --redo {self.name}.")
        curves = {key: read_curve(folder, name) for key, name in MAIN_CURVES.items()}
        details = {name: read_curve(folder, name) for name in curve_names(folder) if name not in MAIN_CURVES.values()}
        return {**figures, **curves, "details": details}

    def train_worker(self, context: RunContext, step: Step, folder: Path) -> None:
        """Run one launched process. Rank 0 leaves the trained model and its figures in ``folder``."""
        model = context.open_model_of(step.inputs[0])
        figures = self.train(context, model, folder, step)
        if figures is not None:
            context.save_model(model, context.plan(step.size), folder, step.key)
            write_json(folder / FIGURES, figures)


def _check_hosts(key: str, hostfile: str) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        machines = fetch_hostfile(hostfile)
    except ValueError as error:
        raise DgmrError(f"{key}: {hostfile}: {error}. It takes lines such as node1 slots=8.") from error
    if len(machines) > 1 and not shutil.which("pdsh"):
        raise DgmrError(
            f"{key}: {hostfile}: the deepspeed launcher reaches other machines by pdsh, which is not installed. "
            "Install it, or start the processes yourself (docs/distillation.md)."
        )
