"""Commands for a recipe and its run directory."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dgmr_tp.cli.common import out
from dgmr_tp.errors import DgmrError, Preempted

app = typer.Typer()
STAGES = "scenes, rank, prune, recover, distill, tune_text, evaluate, compare, export"


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    directory: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run directory [default: runs/NAME].")
    ] = None,
    redo: Annotated[
        str | None, typer.Option(help=f"Drop this stage and those after it, and do them again; one of {STAGES}.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage, likewise.")] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, without weights, data or a GPU; do nothing.")
    ] = False,
) -> None:
    """Run a recipe: prune, recover, distil, evaluate, export, report. Goes on where it was stopped."""
    if dry:
        from dgmr_tp.pipeline.dry_run import dry_run
        from dgmr_tp.pipeline.recipe import load_recipe

        out.print(str(dry_run(load_recipe(recipe, to_run=False))), soft_wrap=True)
        return
    from dgmr_tp.pipeline.recipe import load_recipe
    from dgmr_tp.pipeline.run import Run

    parsed = load_recipe(recipe)
    this = Run(parsed, directory or Path("runs") / parsed.name)
    with _preemptible():
        this.run(redo=redo, until=until, say=out.print)
        _report(this)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html of a run and print its table."""
    from dgmr_tp.pipeline.run import Run

    _report(Run.open(directory))


@app.command()
def distill(
    directory: Annotated[Path, typer.Argument(help="A run directory whose recipe has a distill section.")],
    size: Annotated[
        str | None, typer.Option(help="In a launched process: only this size, such as mlp_ratio-1.")
    ] = None,
) -> None:
    """Run the distillation of a run directory; also the program that the deepspeed launcher starts in every process.

    On a cluster: dgmr-tp run RECIPE --until recover, then deepspeed --hostfile HOSTS --no_local_rank --module dgmr_tp distill RUN_DIR,
    then dgmr-tp run RECIPE.
    """
    _train(directory, "distill", size)


@app.command("tune-text")
def tune_text(
    directory: Annotated[Path, typer.Argument(help="A run directory whose recipe has a tune_text section.")],
    size: Annotated[
        str | None, typer.Option(help="In a launched process: only this size, such as mlp_ratio-1.")
    ] = None,
) -> None:
    """Tune the text towers of a run directory to their pruned vision towers; launched like distill."""
    _train(directory, "tune_text", size)


def _train(directory: Path, stage: str, size: str | None) -> None:
    import torch

    from dgmr_tp.distillation.engine import stop_deepspeed
    from dgmr_tp.distillation.launch import end_with_parent, is_worker
    from dgmr_tp.pipeline.run import Run

    this = Run.open(directory)
    if getattr(this.recipe, stage) is None:
        raise DgmrError(f"the recipe of {directory} has no section {stage}")
    if not is_worker():
        with _preemptible():
            this.run(until=stage, say=out.print)
        return
    end_with_parent()
    for name in [size] if size else this.recipe.prune.sizes:
        this.train_here(stage, name)
        gc.collect()  # DeepSpeed's engine refers to itself
        torch.cuda.empty_cache()
    stop_deepspeed()


class _ToldToStop(BaseException):
    """No Exception: what turns a library's errors into sentences must not take it for one."""


@contextmanager
def _preemptible() -> Iterator[None]:
    """SIGTERM ends the command at once, wherever it is, and says so; trainings look to themselves."""
    mine = os.getpid()

    def leave(*_: object) -> None:
        if os.getpid() != mine:  # a process that reads images
            os._exit(Preempted.code)
        raise _ToldToStop

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except _ToldToStop:
        raise Preempted("preempted; run again to go on") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(this) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.pipeline.report import collect, print_table, write_html

    figures = {step.key: this.figures(step.key) for step in this.steps}
    data = collect(this.directory, this.recipe.name, figures, this.not_zero_shot)
    print_table(data, out)
    path = write_html(data, this.directory / "report.html")
    out.print(f"report: {path}")
    if failed := [entry for size in data["sizes"] for entry in size["files"] if not entry["verified"]]:
        raise DgmrError("; ".join(f"{entry['file']} failed its verification: {entry['status']}" for entry in failed))
