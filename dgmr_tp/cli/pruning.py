"""Commands that decide which neurons stay, prune and recover."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dgmr_tp.cli.common import ModelOption, PretrainedOption, SeedOption, device, out
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import write_whole

if TYPE_CHECKING:
    from dgmr_tp.pruning import Amount

app = typer.Typer()
CriterionOption = Annotated[
    str | None,
    typer.Option(
        help="dgmr, l1, l2, random; or output, activation, taylor, amp, which look at images [default: output with images, else dgmr]."
    ),
]
RatioOption = Annotated[float | None, typer.Option(help="Hidden width as a multiple of the token width [default: 1].")]
KeepRatioOption = Annotated[float | None, typer.Option(help="Hidden width as a fraction of what it is.")]
KeepOption = Annotated[int | None, typer.Option(help="Hidden width, in neurons.")]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        help="What the tower may cost: params=0.5, flops=0.4, latency=0.6 (measured here), or several by commas."
    ),
]
RankingsOption = Annotated[Path | None, typer.Option(help="Choose by these rankings, written by dgmr-tp rank.")]
RoundOption = Annotated[
    int, typer.Option("--round-to", min=1, help="Keep counts are multiples of this, such as 8 or 64.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The directory to write; it must not exist.")]


@app.command()
def rank(
    images: Annotated[
        str, typer.Option(help="Unlabelled images like those you serve: a folder, a tar, shards, or URLs of shards.")
    ],
    file: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    criterion: Annotated[str, typer.Option(help="output or activation.")] = "output",
    count: Annotated[int, typer.Option(min=1, help="How many images to look at.")] = 1024,
    seed: SeedOption = 0,
) -> None:
    """Order all neurons by what they do on images, once; plan and prune then take any size from the file at once."""
    from dgmr_tp.compression.criteria import rank as rank_model
    from dgmr_tp.encoders import open_model

    _refuse_existing(file)
    opened = open_model(model, pretrained)
    opened.module.to(device())
    rankings = rank_model(opened, criterion, images, calibration=count, seed=seed)
    rankings.save(file)
    table = Table(
        "site", "hidden", "neurons for 99 %", "sensitivity", title=f"{rankings.encoder} · {criterion}", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, ranking in rankings.sites.items():
        enough = int((ranking.error > 0.01).sum())
        table.add_row(name, str(len(ranking.order)), str(enough), f"{ranking.sensitivity:.4f}")
    out.print(table)
    out.print("neurons for 99 %: from so many the MLP's output can be rebuilt but for 1 % of its variance")
    out.print("sensitivity: what an MLP's error does to the embedding")
    out.print(f"written: {file}")


@app.command()
def amp(
    images: Annotated[
        str, typer.Option(help="Unlabelled images, not those you will judge by: a folder, shards, URLs.")
    ],
    file: Annotated[Path, typer.Option("--out", "-o", help="The plan (JSON) to write.")],
    threshold: Annotated[float, typer.Option(help="How much each MLP's cut may raise the entropy, nats.")] = 0.01,
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Of the similarities.")] = 1 / 15,
    candidates: Annotated[
        int, typer.Option(min=2, help="Images of one entropy; the threshold's meaning depends on it.")
    ] = 512,
    count: Annotated[
        int, typer.Option(min=1, help="How many images to search on, in whole groups of candidates.")
    ] = 4096,
    two_sided: Annotated[
        bool, typer.Option("--two-sided", help="A fall of the entropy counts too; the paper lets it pass.")
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """Find every MLP's width by AMP's search (arXiv 2603.08100) and write the plan. Goes on where it was stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m dgmr_tp amp ...
    """
    from dgmr_tp.compression.criteria import search
    from dgmr_tp.encoders import open_model

    _refuse_existing(file)
    journal = file.with_name(f".{file.name}.partial")
    opened = open_model(model, pretrained)
    from dgmr_tp.utils.distributed import is_main_process, join_processes

    join_processes()
    opened.module.to(device())
    found = search(
        opened,
        images,
        threshold=threshold,
        two_sided=two_sided,
        temperature=temperature,
        candidates=candidates,
        calibration=count,
        seed=seed,
        journal=journal,
    )
    if is_main_process():
        _print_plan(opened, found.plan)
        blocks = len(opened.adapter.blocks())
        out.print(
            f"entropy {found.entropy:.4f} nats; the search cost {found.image_blocks / blocks:,.0f} forward passes of an image"
        )
        write_whole(file, found.plan.to_json() + "\n")  # in the journal's place


@app.command()
def plan(
    recipe: Annotated[
        Path | None, typer.Argument(help="With --devices: a recipe, whose distillation is planned.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="Does the recipe's distillation fit into these? Such as 8x48GB.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            help="With --devices: images per second, or a run directory that measured them, to say how long it takes."
        ),
    ] = None,
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    criterion: CriterionOption = None,
    mlp_ratio: RatioOption = None,
    keep_ratio: KeepRatioOption = None,
    keep: KeepOption = None,
    budget: BudgetOption = None,
    round_to: RoundOption = 1,
    seed: SeedOption = 0,
    images: Annotated[str | None, typer.Option(help="For criteria that look at images: unlabelled ones.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1024,
    rankings: RankingsOption = None,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the plan to this JSON file.")] = None,
) -> None:
    """Decide which neurons stay and print it. Changes nothing. Several --budget: one line each.

    plan RECIPE --devices 8x48GB says instead what the recipe's distillation needs on each device, and fails if it does not fit.
    """
    if recipe or devices:
        from dgmr_tp.pipeline.dry_run import plan_memory
        from dgmr_tp.pipeline.recipe import load_recipe

        if not recipe or not devices:
            raise DgmrError("a recipe and --devices go together, as in: dgmr-tp plan RECIPE --devices 8x48GB")
        text, misfit = plan_memory(load_recipe(recipe, to_run=False), devices, rate)
        out.print(text, markup=False, soft_wrap=True, highlight=False)
        if misfit:
            raise DgmrError(misfit)
        return
    from dgmr_tp.compression.criteria import SEEING, Rankings, make_plan
    from dgmr_tp.compression.criteria import rank as rank_model
    from dgmr_tp.encoders import open_model

    amounts = _amounts(mlp_ratio, keep_ratio, keep, budget, round_to)
    timed = any("latency" in (amount["budget"] or {}) for amount in amounts)
    if rankings and (images or criterion):
        raise DgmrError("--rankings were made from images by a criterion already; leave out --images and --criterion")
    if file and len(amounts) > 1:
        raise DgmrError("one plan can be written at a time; give one --budget with --out")
    opened = open_model(model, pretrained, weights="none" if rankings and not timed else "memory")
    if timed:
        opened.module.to(device())
    if rankings:
        ranked = Rankings.read(rankings)
        decided = [ranked.plan(opened, **amount) for amount in amounts]
    else:
        opened.module.to(device())
        options = {"calibration": count, "seed": seed}
        rule = criterion or ("output" if images else "dgmr")
        if rule in SEEING and len(amounts) > 1:
            ranked = rank_model(opened, rule, images, **options)
            decided = [ranked.plan(opened, **amount) for amount in amounts]
        else:
            decided = [make_plan(opened, rule, images, **options, **amount) for amount in amounts]
    if len(decided) == 1:
        _print_plan(opened, decided[0])
    else:
        _print_plans(opened, budget or [], decided)
    if file:
        write_whole(file, decided[0].to_json() + "\n")


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
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Apply this plan instead of deciding.")] = None,
    rankings: RankingsOption = None,
    recover: Annotated[
        str | None, typer.Option(help="Recover on these unlabelled images: a folder, shards, URLs.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images recovery reads.")] = 1024,
    damping: Annotated[float, typer.Option(help="Ridge of the recovery, relative.")] = 1e-3,
    seed: SeedOption = 0,
    min_cosine: Annotated[
        float | None,
        typer.Option(help="Find the smallest size whose embeddings keep this mean cosine on images held out."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            help="Find the smallest size whose k-NN accuracy falls by no more than this, such as 1%; needs classes."
        ),
    ] = None,
    held_out: Annotated[int, typer.Option(min=50, help="For these two: how many images judge.")] = 512,
    stream: Annotated[
        bool, typer.Option(help="From file to file, MLP by MLP, for towers larger than memory; without recovery.")
    ] = False,
) -> None:
    """Prune an encoder, recover it if images are given, and write a model directory."""
    amounts = _amounts(mlp_ratio, keep_ratio, keep, budget, round_to)
    if len(amounts) > 1:
        raise DgmrError("prune writes one model; give one --budget (limits that hold together are joined by a comma)")
    [amount] = amounts
    if stream:
        if plan_file or rankings or recover or min_cosine is not None or max_drop is not None:
            raise DgmrError(
                "--stream decides by the weights alone and does not recover; leave out what looks at images, and --plan"
            )
        _prune_streaming(model, pretrained, out_dir, criterion or "dgmr", seed, amount)
        return
    if plan_file and rankings:
        raise DgmrError("give either --plan or --rankings")
    if criterion and (plan_file or rankings):
        raise DgmrError("a plan or rankings were made by a criterion already; leave out --criterion")
    if min_cosine is not None or max_drop is not None:
        if plan_file or recover is None or any(value is not None for key, value in amount.items() if key != "round_to"):
            raise DgmrError(
                "--min-cosine and --max-drop find the size by themselves, on images: give --recover IMAGES and no size or plan"
            )
        limits = {"min_cosine": min_cosine, "max_drop": None if max_drop is None else _fraction(max_drop)}
        options = {
            "criterion": criterion or "output",
            "calibration": count,
            "held_out": held_out,
            "round_to": round_to,
            "damping": damping,
            "seed": seed,
        }
        _prune_to_promise(model, pretrained, out_dir, recover, rankings, {**limits, **options})
        return
    from dgmr_tp.compression.criteria import Rankings
    from dgmr_tp.compression.prune import prune as prune_model
    from dgmr_tp.encoders import open_model
    from dgmr_tp.pruning import Plan

    _refuse_existing(out_dir)
    opened = open_model(model, pretrained)
    opened.module.to(device())
    decided = Plan.read(plan_file) if plan_file else None
    if rankings:
        decided, amount = Rankings.read(rankings).plan(opened, **amount), {}
    batches, found = _images(recover, count, seed, opened)
    result = prune_model(
        opened,
        batches,
        criterion=criterion,
        **amount,
        plan=decided,
        damping=damping,
        seed=seed,
    )
    _finish(opened, result, out_dir, found)


@app.command()
def recover(
    pruned: Annotated[Path, typer.Argument(help="A model directory that dgmr-tp pruned.")],
    images: Annotated[str, typer.Option(help="Unlabelled images: a folder, a tar, shards, or URLs of shards.")],
    out_dir: OutOption,
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    count: Annotated[int, typer.Option(min=1, help="How many images to read.")] = 1024,
    damping: Annotated[float, typer.Option(help="Ridge, relative.")] = 1e-3,
    seed: SeedOption = 0,
) -> None:
    """Prune MODEL again by the plan of a pruned directory, and recover it in closed form."""
    prune(
        out_dir=out_dir,
        model=model,
        pretrained=pretrained,
        plan_file=pruned / "plan.json",
        recover=images,
        count=count,
        damping=damping,
        seed=seed,
    )


def _prune_streaming(model, pretrained, directory, criterion, seed, amount) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.compression.streaming import prune_streaming

    plan = prune_streaming(model, directory, pretrained, criterion=criterion, seed=seed, **amount)
    out.print(str(plan), markup=False)
    out.print(f"written: {directory}")


def _prune_to_promise(model, pretrained, directory, images, rankings, options) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.compression.criteria import Rankings
    from dgmr_tp.compression.quality_target import prune_to_promise
    from dgmr_tp.encoders import open_model

    _refuse_existing(directory)
    opened = open_model(model, pretrained)
    opened.module.to(device())
    ranked = Rankings.read(rankings) if rankings else None
    found = prune_to_promise(opened, images, rankings=ranked, **options)
    what = "mean cosine" if options["min_cosine"] is not None else "drop of k-NN accuracy"
    table = Table("M params", what, "95 % bound", "", box=None)
    for trial in found.trials:
        table.add_row(
            f"{trial.parameters / 1e6:.2f}",
            f"{trial.value:.4f}",
            f"{trial.bound:.4f}",
            "kept" if trial.kept else "broken",
        )
    out.print(table)
    _finish(opened, found.pruned, directory, None)


def _images(source, count, seed, opened):  # type: ignore[no-untyped-def]
    if source is None:
        return None, None
    from dgmr_tp.data.streams import find_images

    found = find_images(source)
    return found.sample(count, seed, opened.preprocess), found


def _finish(opened, result, directory, found) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.pruning.cost import parameters

    result.model.module.cpu()
    result.model.save(directory, result.plan)
    recovered = any(row.cut_error is not None for row in result.table)
    table = Table("site", "hidden", "kept", *(("error cut", "recovered") if recovered else ()), box=None)
    for row in result.table:
        errors = (
            (f"{row.cut_error:.4f}", f"{row.recovered_error:.4f}" + (" (kept cut)" if row.kept_cut else ""))
            if row.cut_error is not None
            else ()
        )
        table.add_row(row.site, str(row.hidden), str(row.kept), *errors)
    out.print(table)
    if found is not None and (found.broken or found.other_files):
        out.print(
            f"skipped {len(found.broken)} images that do not decode and {found.other_files} files that are no images"
        )
    before, after = parameters(opened.tower), parameters(result.model.tower)
    out.print(
        f"{opened.name}: {before / 1e6:.2f} M → {after / 1e6:.2f} M parameters ({after / before - 1:+.1%}) in {directory}"
    )


def _print_plan(opened, plan) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.pruning import find_sites
    from dgmr_tp.pruning.cost import costs

    tower = opened.tower
    found = costs(tower, [site for site in find_sites(tower) if site.name in plan.sites], opened.image_size)
    size, work, after = found["params"], found["flops"], plan.cost(found)
    table = Table(
        "site", "width", "hidden", "kept", "M params", "GFLOPs", title=f"{plan.encoder} · {plan.criterion}", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, site in plan.sites.items():
        kept = len(site.kept)
        spent = (f"{kept * size.neuron[name] / 1e6:.3f}", f"{kept * work.neuron[name] / 1e9:.3f}")
        table.add_row(name, str(site.width), str(site.hidden), str(kept), *spent)
    out.print(table)
    out.print(
        f"tower: {size.total / 1e6:.2f} M → {after['params'] / 1e6:.2f} M parameters ({after['params'] / size.total - 1:+.1%}), "
        f"{work.total / 1e9:.2f} → {after['flops'] / 1e9:.2f} GFLOPs an image ({after['flops'] / work.total - 1:+.1%})"
    )


def _print_plans(opened, names, plans) -> None:  # type: ignore[no-untyped-def]
    """One line per plan."""
    from dgmr_tp.pruning import find_sites
    from dgmr_tp.pruning.cost import costs

    tower = opened.tower
    sites = [site for site in find_sites(tower) if site.name in plans[0].sites]
    found = costs(tower, sites, opened.image_size)
    table = Table(
        "budget",
        "M params",
        "GFLOPs",
        "narrowest",
        "widest",
        title=f"{plans[0].encoder} · {plans[0].criterion}",
        box=None,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("all", f"{found['params'].total / 1e6:.2f}", f"{found['flops'].total / 1e9:.2f}", "", "")
    for name, plan in zip(names, plans, strict=True):
        after = plan.cost(found)
        kept = [len(site.kept) for site in plan.sites.values()]
        table.add_row(
            name, f"{after['params'] / 1e6:.2f}", f"{after['flops'] / 1e9:.2f}", str(min(kept)), str(max(kept))
        )
    out.print(table)


def _amounts(
    mlp_ratio: float | None, keep_ratio: float | None, keep: int | None, budgets: list[str] | None, round_to: int
) -> list[Amount]:
    """The options that say how many neurons stay, as the library takes them: one size, or one per budget."""
    limits = [_budget(text) for text in budgets] if budgets else [None]
    return [
        {"mlp_ratio": mlp_ratio, "keep_ratio": keep_ratio, "keep": keep, "budget": limit, "round_to": round_to}
        for limit in limits
    ]


def _budget(text: str) -> dict[str, float]:
    try:
        return {key: float(value) for key, value in (limit.split("=") for limit in text.split(","))}
    except ValueError:
        raise DgmrError(f"--budget {text}: write it as params=0.5 or params=0.5,flops=0.4") from None


def _fraction(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise DgmrError(f"--max-drop {text}: write it as 1% or 0.01") from None


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise DgmrError(f"{path} exists already; name another with -o")
    if not path.absolute().parent.is_dir():
        raise DgmrError(f"the folder {path.absolute().parent} for {path.name} does not exist; make it first")
