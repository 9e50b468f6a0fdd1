"""Commands for recipes and their run directories."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgmr_tp.cli.common import TrustRecipeOption, out, path_argument, path_option, require_new
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import atomic_write, check_output_directory

if TYPE_CHECKING:
    from dgmr_tp.pipeline.run import Run

app = typer.Typer()
recipes_app = typer.Typer(help="List the recipes of the package, or copy one to edit it.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a YAML file, or a name that dgmr-tp recipes lists.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set a key of the recipe, such as distill.steps=100; may be repeated."),
]


@app.command()
def run(
    recipe: RecipeArgument,
    directory: Annotated[
        Path | None, path_option("--out", "-o", help="The run directory [default: runs/NAME].", kind="directory")
    ] = None,
    overrides: SetOption = None,
    redo: Annotated[
        str | None, typer.Option(help="Drop the results of this stage and of those after it, and redo them.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    accept_versions: Annotated[
        bool, typer.Option(help="Keep results that were made with other versions of packages, and record that.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the recipe without weights, data or a GPU. Runs nothing.")
    ] = False,
    trust_recipe: TrustRecipeOption = False,
) -> None:
    """Run a recipe: prune, recover, distill, evaluate, export, report. Resumes where it was stopped."""
    from dgmr_tp.pipeline.recipe import load_recipe

    if dry:
        from dgmr_tp.pipeline.dry_run import dry_run

        out.print(str(dry_run(load_recipe(recipe, overrides or (), to_run=False))))
        return
    from dgmr_tp.distillation.processes import preemptible
    from dgmr_tp.pipeline.run import Run

    parsed = load_recipe(recipe, overrides or ())
    check_output_directory(directory or Path("runs") / parsed.name)
    this_run = Run(parsed, directory or Path("runs") / parsed.name, tuple(overrides or ()), trusted=trust_recipe)
    with preemptible():
        this_run.run(redo=redo, until=until, say=out.print, accept_versions=accept_versions)
        _write_report(this_run)


@app.command()
def estimate(
    recipe: RecipeArgument,
    devices: Annotated[str, typer.Option(help="Number and memory of the devices, such as 8x48GB.")],
    rate: Annotated[
        str | None,
        typer.Option(help="Images per second, or a run directory that measured them, to estimate the hours."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Estimate the memory and time of a recipe's distillation, before anything is loaded. Fails if it does not fit."""
    from dgmr_tp.pipeline.estimate import estimate_distillation
    from dgmr_tp.pipeline.recipe import load_recipe

    result = estimate_distillation(load_recipe(recipe, overrides or (), to_run=False), devices, rate)
    out.print(result.text)
    if result.remedy:
        raise DgmrError(result.remedy)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is not None:
        return
    from dgmr_tp.pipeline.recipe import shipped_recipes

    for name, path in shipped_recipes().items():
        out.print(f"{name:<28} {_summary(path)}")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe of the package.")],
    target: Annotated[Path | None, path_argument(help="The file to write [default: NAME.yaml].", kind="any")] = None,
) -> None:
    """Copy a recipe of the package to a file."""
    from dgmr_tp.pipeline.recipe import find_recipe

    source, target = find_recipe(name), target or Path(f"{name}.yaml")
    require_new(target)
    atomic_write(target, source.read_text("utf-8"))
    out.print(f"written: {target}")


@app.command()
def report(directory: Annotated[Path, path_argument(help="A run directory.", kind="directory")]) -> None:
    """Write report.html of a run and print its table."""
    from dgmr_tp.pipeline.run import Run

    _write_report(Run.open(directory))


@app.command()
def distill(
    directory: Annotated[
        Path, path_argument(help="A run directory whose recipe has a section distill.", kind="directory")
    ],
    size: Annotated[
        str | None, typer.Option(help="In a launched process: only this size, such as mlp_ratio-1.")
    ] = None,
    trust_recipe: TrustRecipeOption = False,
) -> None:
    """Run the distillation of a run directory. The deepspeed launcher starts this command in every process.

    On a cluster: dgmr-tp run RECIPE --until recover, then deepspeed --hostfile HOSTS --no_local_rank --module dgmr_tp
    distill RUN_DIR, then dgmr-tp run RECIPE.
    """
    _train(directory, "distill", size, trust_recipe)


@app.command("tune-text")
def tune_text(
    directory: Annotated[
        Path, path_argument(help="A run directory whose recipe has a section tune_text.", kind="directory")
    ],
    size: Annotated[
        str | None, typer.Option(help="In a launched process: only this size, such as mlp_ratio-1.")
    ] = None,
    trust_recipe: TrustRecipeOption = False,
) -> None:
    """Tune the text towers of a run directory to their pruned vision towers. Launched like distill."""
    _train(directory, "tune_text", size, trust_recipe)


def _train(directory: Path, stage: str, size: str | None, trusted: bool) -> None:
    import torch

    from dgmr_tp.distillation.engine import stop_deepspeed
    from dgmr_tp.distillation.processes import end_with_parent, is_worker, preemptible
    from dgmr_tp.pipeline.run import Run

    this_run = Run.open(directory, trusted=trusted)
    if getattr(this_run.recipe, stage) is None:
        raise DgmrError(f"the recipe of {directory} has no section {stage}. Add one and run again.")
    if not is_worker():
        with preemptible():
            this_run.run(until=stage, say=out.print)
        return
    end_with_parent()
    for name in [size] if size else this_run.recipe.prune.sizes:
        this_run.train_worker(stage, name)
        gc.collect()  # DeepSpeed's engine refers to itself
        torch.cuda.empty_cache()
    stop_deepspeed()


def _write_report(this_run: Run) -> None:
    from dgmr_tp.pipeline.report import collect, print_table, write_html
    from dgmr_tp.pipeline.stages.tune_text import not_zero_shot

    recipe, directory = this_run.recipe, this_run.run_directory.path
    content = collect(directory, recipe.name, this_run.figures, not_zero_shot(recipe))
    print_table(content, out)
    path = write_html(content, directory / "report.html")
    out.print(f"report: {path}")
    if failed := [entry for size in content.sizes for entry in size.files if not entry["verified"]]:
        problems = "; ".join(f"{entry['file']}: {entry['status']}" for entry in failed)
        raise DgmrError(f"files failed their verification: {problems}. Deploy another format.")


def _summary(path: Path) -> str:
    """Return the first clause of a recipe's leading comment."""
    words = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    description = " ".join(words[1:] if words and "dgmr-tp run" in words[0] else words).strip()
    return re.split(r"[:.,] | \(", description)[0].rstrip(".")
