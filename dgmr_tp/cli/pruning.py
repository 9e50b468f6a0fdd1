"""Commands that choose neurons, prune and recover."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dgmr_tp.cli.common import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    PretrainedOption,
    SaveDtypeOption,
    SeedOption,
    compute_config,
    finite_number,
    number_option,
    numbers_by_name,
    out,
    path_argument,
    path_option,
    print_skipped,
    require_new,
)
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import atomic_write, staging_file

if TYPE_CHECKING:
    from dgmr_tp.compression.prune import Pruned
    from dgmr_tp.encoders import OpenedModel
    from dgmr_tp.pruning import Amount, Plan
    from dgmr_tp.utils.compute import ComputeConfig

app = typer.Typer()
JOURNAL = "search.json"
"""The decisions of AMP's search so far, in the staging directory of the plan."""
CriterionOption = Annotated[
    str | None,
    typer.Option(help="A name that dgmr-tp criteria lists [default: output with images, else dgmr]."),
]
RatioOption = Annotated[
    float | None, number_option(help="Hidden width as a multiple of the token width [default: 1].", above=0)
]
KeepRatioOption = Annotated[
    float | None, number_option(help="Hidden width as a fraction of what it is.", above=0, maximum=1)
]
KeepOption = Annotated[int | None, typer.Option(help="Hidden width in neurons.")]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(help="Cost of the tower: params=0.5, flops=0.4, latency=0.6 (measured here), or several by commas."),
]
RankingsOption = Annotated[Path | None, path_option(help="Use these rankings, written by dgmr-tp rank.", kind="file")]
RoundOption = Annotated[int, typer.Option("--round-to", min=1, help="Keep counts are multiples of this.")]
OutOption = Annotated[Path, path_option("--out", "-o", help="The directory to write; it must not exist.", kind="any")]
CalibrationOption = Annotated[
    int | None,
    typer.Option("--calibration-images", min=1, help="Number of calibration images to read [default: 1024]."),
]
DampingOption = Annotated[
    float | None,
    number_option(
        help="Ridge of the recovery, relative to the mean variance of the hidden activations [default: 0.001].",
        minimum=0,
    ),
]
TuneOption = Annotated[
    int | None,
    typer.Option(
        "--tune-blocks",
        metavar="STEPS",
        min=0,
        help="Then train each block this many steps towards the dense one, without labels, such as 500 [default: 0].",
    ),
]


@app.command()
def criteria() -> None:
    """List the criteria that choose neurons, and the data that each needs."""
    from dgmr_tp.compression.criteria import CRITERIA

    table = Table("criterion", "needs", "", box=None)
    for name, criterion in CRITERIA.items():
        table.add_row(name, criterion.needs, criterion.summary)
    out.print(table)


@app.command()
def rank(
    images: Annotated[
        str, typer.Option(help="Unlabeled images like those you serve: a folder, a tar, shards, or URLs.")
    ],
    file: Annotated[Path, path_option("--out", "-o", help="The file to write.", kind="any")],
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    criterion: Annotated[str, typer.Option(help="A criterion that needs activations.")] = "output",
    num_images: CalibrationOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Rank all neurons on images, once. plan and prune then take any size from the file."""
    from dgmr_tp.compression.calibration import CalibrationImages
    from dgmr_tp.compression.rankings import rank as rank_model

    require_new(file)
    opened = _open(model, pretrained, compute_config(device, dtype))
    calibration = CalibrationImages.read(images, opened, num_images, seed)
    rankings = rank_model(opened, criterion, calibration)
    rankings.save(file)
    table = _table("site", "hidden", "neurons for 99 %", "sensitivity", title=f"{rankings.encoder} · {criterion}")
    for name, ranking in rankings.sites.items():
        enough = int((ranking.error > 0.01).sum())
        table.add_row(name, str(len(ranking.order)), str(enough), f"{ranking.sensitivity:.4f}")
    out.print(table)
    out.print("neurons for 99 %: this many neurons explain 99 % of the variance of the MLP's output")
    out.print("sensitivity: relative error of the embedding per relative error of the MLP's output")
    print_skipped(calibration.broken, calibration.others)
    out.print(f"written: {file}")


@app.command()
def amp(
    images: Annotated[str, typer.Option(help="Unlabeled images, distinct from those that you evaluate on.")],
    file: Annotated[Path, path_option("--out", "-o", help="The plan (JSON) to write.", kind="any")],
    threshold: Annotated[
        float, number_option(help="Largest rise of the entropy by each MLP's cut, in nats.", minimum=0)
    ] = 0.01,
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    temperature: Annotated[
        float | None, number_option(help="Temperature of the similarities [default: 1/15].", minimum=1e-3)
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=2, help="Group size for the entropy. The threshold depends on it [default: 512].")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--calibration-images", min=1, help="Number of calibration images to read [default: 4096]."),
    ] = None,
    two_sided: Annotated[
        bool, typer.Option("--two-sided", help="Reject falls of the entropy too. The paper accepts any fall.")
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Find the width of every MLP by AMP's search (arXiv 2603.08100) and write the plan. Resumes where it was stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m dgmr_tp amp ...
    """
    from dgmr_tp.compression.amp_search import SearchConfig, search
    from dgmr_tp.compression.calibration import CalibrationImages
    from dgmr_tp.utils.distributed import is_main_process, join_processes

    require_new(file)
    join_processes()
    opened = _open(model, pretrained, compute_config(device, dtype))
    config = SearchConfig.model_validate(_given(candidates=candidates, temperature=temperature, two_sided=two_sided))
    calibration = CalibrationImages.read(images, opened, num_images or config.images, seed)
    with ExitStack() as stack:
        journal = None
        if is_main_process():
            written = stack.enter_context(staging_file(file, "dgmr-tp amp is searching", resumable=(JOURNAL,)))
            journal = written.with_name(JOURNAL)
        result = search(opened, calibration, threshold=threshold, config=config, journal=journal, seed=seed)
        if is_main_process():
            written.write_text(result.plan.to_json() + "\n", "utf-8")
    if is_main_process():
        _print_plan(opened, result.plan)
        forward_passes = result.image_blocks / len(opened.adapter.blocks())
        out.print(
            f"entropy {result.entropy:.4f} nats; the search cost {forward_passes:,.0f} forward passes of an image"
        )
        print_skipped(calibration.broken, calibration.others)


@app.command()
def plan(
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    criterion: CriterionOption = None,
    mlp_ratio: RatioOption = None,
    keep_ratio: KeepRatioOption = None,
    keep: KeepOption = None,
    budget: BudgetOption = None,
    round_to: RoundOption = 1,
    seed: SeedOption = 0,
    images: Annotated[str | None, typer.Option(help="Unlabeled images, for criteria that need them.")] = None,
    num_images: CalibrationOption = None,
    rankings: RankingsOption = None,
    file: Annotated[
        Path | None, path_option("--out", "-o", help="Also write the plan to this JSON file.", kind="file")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Choose the neurons that stay and print the plan. Changes nothing. Several --budget: one line each."""
    from dgmr_tp.compression.calibration import CalibrationImages
    from dgmr_tp.compression.criteria import criterion_named, default_criterion
    from dgmr_tp.compression.planning import make_plan
    from dgmr_tp.compression.rankings import Rankings
    from dgmr_tp.compression.rankings import rank as rank_model

    amounts = _amounts(mlp_ratio, keep_ratio, keep, budget, round_to)
    measures_latency = any("latency" in (amount["budget"] or {}) for amount in amounts)
    if rankings and (images or criterion):
        raise DgmrError("--rankings were made on images by a criterion already. Leave out --images and --criterion.")
    if file:
        require_new(file, replace=True)
    if file and len(amounts) > 1:
        raise DgmrError("--out writes one plan. Give one --budget with it.")
    compute = compute_config(device, dtype)
    opened = _open(model, pretrained, compute, with_weights=rankings is None or measures_latency)
    calibration = None
    if rankings:
        ranked = Rankings.read(rankings)
        plans = [ranked.plan(opened, **amount) for amount in amounts]
    else:
        if images is not None:
            calibration = CalibrationImages.read(images, opened, num_images, seed)
        name = criterion or default_criterion(images is not None)
        if criterion_named(name).needs == "activations" and len(amounts) > 1:
            ranked = rank_model(opened, name, calibration)
            plans = [ranked.plan(opened, **amount) for amount in amounts]
        else:
            plans = [make_plan(opened, name, calibration, seed=seed, **amount) for amount in amounts]
    if len(plans) == 1:
        _print_plan(opened, plans[0])
    else:
        _print_plans(opened, budget or [], plans)
    if calibration:
        print_skipped(calibration.broken, calibration.others)
    if file:
        atomic_write(file, plans[0].to_json() + "\n")


@app.command()
def prune(
    out_dir: OutOption,
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    criterion: CriterionOption = None,
    mlp_ratio: RatioOption = None,
    keep_ratio: KeepRatioOption = None,
    keep: KeepOption = None,
    budget: BudgetOption = None,
    round_to: RoundOption = 1,
    plan_file: Annotated[
        Path | None, path_option("--plan", help="Apply this plan instead of making one.", kind="file")
    ] = None,
    rankings: RankingsOption = None,
    recover: Annotated[
        str | None, typer.Option(help="Recover on these unlabeled images: a folder, shards, URLs.")
    ] = None,
    num_images: CalibrationOption = None,
    damping: DampingOption = None,
    tune_blocks: TuneOption = None,
    seed: SeedOption = 0,
    min_cosine: Annotated[
        float | None,
        number_option(
            help="Find the smallest size whose embeddings keep this mean cosine on held-out images.", above=0, below=1
        ),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            help="Find the smallest size whose k-NN accuracy drops by at most this, such as 1%; needs classes."
        ),
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Number of held-out images for these two [default: 512].")
    ] = None,
    stream: Annotated[
        bool, typer.Option(help="From file to file, MLP by MLP, for towers larger than memory; no recovery.")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    save_dtype: SaveDtypeOption = None,
) -> None:
    """Prune a model, recover it if images are given, and write a model directory."""
    from dgmr_tp.compression.prune import prune as prune_model
    from dgmr_tp.compression.rankings import Rankings
    from dgmr_tp.pruning import Plan
    from dgmr_tp.pruning.allocation import given_amount

    amounts = _amounts(mlp_ratio, keep_ratio, keep, budget, round_to)
    if len(amounts) > 1:
        raise DgmrError("prune writes one model. Give one --budget; join limits that hold together by a comma.")
    [amount] = amounts
    if tune_blocks and recover is None:
        raise DgmrError("--tune-blocks trains on the images of the recovery. Give --recover IMAGES.")
    require_new(out_dir)
    has_target = min_cosine is not None or max_drop is not None
    if stream:
        if plan_file or rankings or recover or has_target:
            raise DgmrError(
                "--stream selects by the weights alone and does not recover. Leave out --plan and what needs images."
            )
        if save_dtype:
            raise DgmrError("--stream copies the weights in the dtype of the checkpoint. Leave out --save-dtype.")
        _prune_streaming(model, pretrained, out_dir, criterion or "dgmr", seed, amount)
        return
    if plan_file and rankings:
        raise DgmrError("--plan and --rankings both choose the neurons. Give one of them.")
    if criterion and (plan_file or rankings):
        raise DgmrError("a plan or rankings were made by a criterion already. Leave out --criterion.")
    if has_target and (plan_file or recover is None or given_amount(amount)):
        raise DgmrError(
            "--min-cosine and --max-drop find the size themselves, on images. Give --recover IMAGES, and no size or "
            "plan."
        )
    opened = _open(model, pretrained, compute_config(device, dtype, save_dtype))
    if has_target:
        from dgmr_tp.compression.quality_target import prune_to_target

        assert recover is not None
        result = prune_to_target(
            opened,
            recover,
            min_cosine=min_cosine,
            max_drop=None if max_drop is None else _fraction(max_drop),
            criterion=criterion or "output",
            round_to=round_to,
            seed=seed,
            rankings=Rankings.read(rankings) if rankings else None,
            **_given(num_calibration_images=num_images, held_out=held_out, damping=damping, tune_steps=tune_blocks),
        )
        table = _table(
            "M params", "mean cosine" if min_cosine is not None else "drop of k-NN accuracy", "95 % bound", ""
        )
        for trial in result.trials:
            status = "met" if trial.met else "missed"
            table.add_row(f"{trial.parameters / 1e6:.2f}", f"{trial.value:.4f}", f"{trial.bound:.4f}", status)
        out.print(table)
        _save(opened, result.pruned, out_dir)
        return
    decided = Plan.read(plan_file) if plan_file else None
    if rankings:
        decided, amount = Rankings.read(rankings).plan(opened, **amount), {}
    pruned = prune_model(
        opened,
        recover,
        criterion=criterion,
        plan=decided,
        num_calibration_images=num_images,
        seed=seed,
        **_given(damping=damping, tune_steps=tune_blocks),
        **amount,
    )
    _save(opened, pruned, out_dir)


@app.command()
def recover(
    pruned: Annotated[Path, path_argument(help="A model directory that dgmr-tp pruned.", kind="directory")],
    images: Annotated[str, typer.Option(help="Unlabeled images: a folder, a tar, shards, or URLs.")],
    out_dir: OutOption,
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    num_images: CalibrationOption = None,
    damping: DampingOption = None,
    tune_blocks: TuneOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    save_dtype: SaveDtypeOption = None,
) -> None:
    """Prune MODEL again by the plan of a pruned directory, and recover it."""
    prune(
        out_dir=out_dir,
        model=model,
        pretrained=pretrained,
        plan_file=pruned / "plan.json",
        recover=images,
        num_images=num_images,
        damping=damping,
        tune_blocks=tune_blocks,
        seed=seed,
        device=device,
        save_dtype=save_dtype,
    )


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given. The library's defaults apply for the others."""
    return {name: value for name, value in options.items() if value is not None}


def _open(model: str, pretrained: str | None, compute: ComputeConfig, *, with_weights: bool = True) -> OpenedModel:
    """Open a model for running as ``compute`` says, or its shapes alone."""
    from dgmr_tp.encoders import open_model

    if not with_weights:
        return open_model(model, pretrained, weights="none")
    opened = open_model(model, pretrained)
    return opened.with_compute(compute)


def _prune_streaming(
    model: str, pretrained: str | None, directory: Path, criterion: str, seed: int, amount: Amount
) -> None:
    from dgmr_tp.compression.streaming import prune_streaming

    plan = prune_streaming(model, directory, pretrained, criterion=criterion, seed=seed, **amount)
    out.print(str(plan))
    out.print(f"written: {directory}")


def _save(dense: OpenedModel, pruned: Pruned, directory: Path) -> None:
    """Write the model directory and print what was cut and recovered."""
    from dgmr_tp.compression.prune import describe_shortage
    from dgmr_tp.pruning.cost import parameters

    pruned.model.save(directory, pruned.plan)
    has_errors = any(row.cut_error is not None for row in pruned.table)
    is_tuned = any(row.tuned_error is not None for row in pruned.table)
    errors = ("error cut", "recovered") if has_errors else ()
    table = Table("site", "hidden", "kept", *errors, *(("block", "tuned") if is_tuned else ()), box=None)
    for row in pruned.table:
        cells = [row.site, str(row.hidden), str(row.num_kept)]
        if row.cut_error is not None:
            note = " (fit rejected)" if row.fit_rejected else ""
            cells += [f"{row.cut_error:.4f}", f"{row.recovered_error:.4f}{note}"]
        if row.tuned_error is not None:
            cells += [f"{row.block_error:.4f}", f"{row.tuned_error:.4f}"]
        table.add_row(*cells)
    out.print(table)
    if shortage := describe_shortage([row.images_needed for row in pruned.table]):
        out.print(shortage)
    if pruned.images:
        if pruned.images.notice:
            out.print(pruned.images.notice, soft_wrap=True)
        print_skipped(pruned.images.broken, pruned.images.others)
    before, after = parameters(dense.tower), parameters(pruned.model.tower)
    out.print(
        f"{dense.name}: {before / 1e6:.2f} M → {after / 1e6:.2f} M parameters ({after / before - 1:+.1%}) in "
        f"{directory}"
    )


def _print_plan(model: OpenedModel, plan: Plan) -> None:
    from dgmr_tp.pruning.cost import costs

    tower_costs = costs(model.tower, [site for site in model.sites if site.name in plan.sites], model.image_size)
    size, work, after = tower_costs["params"], tower_costs["flops"], plan.cost(tower_costs)
    table = _table("site", "width", "hidden", "kept", "M params", "GFLOPs", title=f"{plan.encoder} · {plan.criterion}")
    for name, site in plan.sites.items():
        kept = len(site.kept)
        params, flops = kept * size.neuron[name] / 1e6, kept * work.neuron[name] / 1e9
        table.add_row(name, str(site.width), str(site.hidden), str(kept), f"{params:.3f}", f"{flops:.3f}")
    out.print(table)
    out.print(
        f"tower: {size.total / 1e6:.2f} M → {after['params'] / 1e6:.2f} M parameters "
        f"({after['params'] / size.total - 1:+.1%}), {work.total / 1e9:.2f} → {after['flops'] / 1e9:.2f} GFLOPs "
        f"per image ({after['flops'] / work.total - 1:+.1%})"
    )


def _print_plans(model: OpenedModel, names: list[str], plans: list[Plan]) -> None:
    """Print one line per plan."""
    from dgmr_tp.pruning.cost import costs

    sites = [site for site in model.sites if site.name in plans[0].sites]
    tower_costs = costs(model.tower, sites, model.image_size)
    title = f"{plans[0].encoder} · {plans[0].criterion}"
    table = _table("budget", "M params", "GFLOPs", "narrowest", "widest", title=title)
    table.add_row("all", f"{tower_costs['params'].total / 1e6:.2f}", f"{tower_costs['flops'].total / 1e9:.2f}", "", "")
    for name, plan in zip(names, plans, strict=True):
        after = plan.cost(tower_costs)
        widths = [len(site.kept) for site in plan.sites.values()]
        params, flops = f"{after['params'] / 1e6:.2f}", f"{after['flops'] / 1e9:.2f}"
        table.add_row(name, params, flops, str(min(widths)), str(max(widths)))
    out.print(table)


def _table(*columns: str, title: str | None = None) -> Table:
    """Return a table whose columns, except the first, are aligned to the right."""
    table = Table(*columns, title=title, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _amounts(
    mlp_ratio: float | None, keep_ratio: float | None, keep: int | None, budgets: list[str] | None, round_to: int
) -> list[Amount]:
    """Return the size options as the library takes them: one size, or one per budget."""
    example = "params=0.5 or params=0.5,flops=0.4"
    limits = [numbers_by_name("--budget", text, example) for text in budgets] if budgets else [None]
    if repeated := [text for text, limit in zip(budgets or (), limits, strict=False) if limits.count(limit) > 1]:
        raise DgmrError(f"--budget {repeated[0]} is given more than once. Give it once.")
    return [
        {"mlp_ratio": mlp_ratio, "keep_ratio": keep_ratio, "keep": keep, "budget": limit, "round_to": round_to}
        for limit in limits
    ]


def _fraction(text: str) -> float:
    value = finite_number("--max-drop", text.strip().removesuffix("%"), "1% or 0.01")
    return value / (100 if text.strip().endswith("%") else 1)
