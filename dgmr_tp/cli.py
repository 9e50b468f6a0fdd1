"""The command line. Every command is one call into the library; a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dgmr_tp.errors import DgmrError, Preempted
from dgmr_tp.files import write_whole

if TYPE_CHECKING:
    from dgmr_tp.pruning import Amount

app = typer.Typer(
    help="Prune the MLPs of large vision transformers, recover them in closed form, distil, measure, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False)

MODEL_HELP = "open_clip:NAME, timm:NAME, a model directory, or demo."
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
PretrainedOption = Annotated[str | None, typer.Option(help="Weights for a NAME: the library's tag or a file; none for random ones.")]
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
    typer.Option(help="What the tower may cost: params=0.5, flops=0.4, latency=0.6 (measured here), or several by commas."),
]
RankingsOption = Annotated[Path | None, typer.Option(help="Choose by these rankings, written by dgmr-tp rank.")]
RoundOption = Annotated[int, typer.Option("--round-to", min=1, help="Keep counts are multiples of this, such as 8 or 64.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The directory to write; it must not exist.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    directory: Annotated[Path | None, typer.Option("--out", "-o", help="The run directory [default: runs/NAME].")] = None,
    redo: Annotated[str | None, typer.Option(help="Drop this stage and those after it, and do them again.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, without weights, data or a GPU; do nothing.")] = False,
) -> None:
    """Run a recipe: prune, recover, distil, evaluate, export, report. Goes on where it was stopped."""
    if dry:
        from dgmr_tp.dry_run import dry_run
        from dgmr_tp.recipe import load_recipe

        out.print(str(dry_run(load_recipe(recipe))), markup=False, soft_wrap=True)
        return
    from dgmr_tp.pipeline import Run
    from dgmr_tp.recipe import load_recipe

    parsed = load_recipe(recipe)
    this = Run(parsed, directory or Path("runs") / parsed.name)
    this.run(redo=redo, until=until, say=out.print)
    _report(this)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html of a run and print its table."""
    from dgmr_tp.pipeline import Run

    _report(Run.open(directory))


@app.command()
def rank(
    images: Annotated[str, typer.Option(help="Unlabelled images like those you serve: a folder, a tar, shards, or URLs of shards.")],
    file: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    criterion: Annotated[str, typer.Option(help="output or activation.")] = "output",
    count: Annotated[int, typer.Option(min=1, help="How many images to look at.")] = 1024,
    seed: SeedOption = 0,
) -> None:
    """Order all neurons by what they do on images, once; plan and prune then take any size from the file at once."""
    from dgmr_tp.decide import rank as rank_model
    from dgmr_tp.encoders import open_model
    from dgmr_tp.progress import shown

    _refuse_existing(file)
    opened = open_model(model, pretrained)
    opened.module.to(_device())
    with shown() as progress:
        rankings = rank_model(opened, criterion, images, calibration=count, seed=seed, progress=progress)
    rankings.save(file)
    table = Table("site", "hidden", "neurons for 99 %", "sensitivity", title=f"{rankings.encoder} · {criterion}", box=None)
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
    images: Annotated[str, typer.Option(help="Unlabelled images, not those you will judge by: a folder, shards, URLs.")],
    file: Annotated[Path, typer.Option("--out", "-o", help="The plan (JSON) to write.")],
    threshold: Annotated[float, typer.Option(help="How much each MLP's cut may raise the entropy, nats.")] = 0.01,
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Of the similarities.")] = 1 / 15,
    candidates: Annotated[int, typer.Option(min=2, help="Images of one entropy; the threshold's meaning depends on it.")] = 512,
    count: Annotated[int, typer.Option(min=1, help="How many images to search on, in whole groups of candidates.")] = 4096,
    two_sided: Annotated[bool, typer.Option("--two-sided", help="A fall of the entropy counts too; the paper lets it pass.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Find every MLP's width by AMP's search (arXiv 2603.08100) and write the plan. Goes on where it was stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m dgmr_tp amp ...
    """
    from dgmr_tp.decide import search
    from dgmr_tp.encoders import open_model
    from dgmr_tp.progress import shown

    _refuse_existing(file)
    journal = file.with_name(f".{file.name}.partial")
    opened = open_model(model, pretrained)
    first = _join_processes()
    opened.module.to(_device())
    with shown() as progress:
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
            progress=progress,
        )
    if first:
        _print_plan(opened, found.plan)
        blocks = len(opened.encoder.blocks())
        out.print(f"entropy {found.entropy:.4f} nats; the search cost {found.image_blocks / blocks:,.0f} forward passes of an image")
        write_whole(file, found.plan.to_json() + "\n")  # in the journal's place


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="With --devices: a recipe, whose distillation is planned.")] = None,
    devices: Annotated[str | None, typer.Option(help="Does the recipe's distillation fit into these? Such as 8x48GB.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="With --devices: images per second, to say how long it takes.")] = None,
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
        from dgmr_tp.dry_run import plan_memory
        from dgmr_tp.recipe import load_recipe

        if not recipe or not devices:
            raise DgmrError("a recipe and --devices go together, as in: dgmr-tp plan RECIPE --devices 8x48GB")
        text, misfit = plan_memory(load_recipe(recipe), devices, rate)
        out.print(text, markup=False, soft_wrap=True, highlight=False)
        if misfit:
            raise DgmrError(misfit)
        return
    from dgmr_tp.decide import SEEING, Rankings, make_plan
    from dgmr_tp.decide import rank as rank_model
    from dgmr_tp.encoders import open_model
    from dgmr_tp.progress import shown

    amounts = _amounts(mlp_ratio, keep_ratio, keep, budget, round_to)
    timed = any("latency" in (amount["budget"] or {}) for amount in amounts)
    if rankings and (images or criterion):
        raise DgmrError("--rankings were made from images by a criterion already; leave out --images and --criterion")
    if file and len(amounts) > 1:
        raise DgmrError("one plan can be written at a time; give one --budget with --out")
    opened = open_model(model, pretrained, weights="none" if rankings and not timed else "memory")
    if timed:
        opened.module.to(_device())
    if rankings:
        ranked = Rankings.read(rankings)
        decided = [ranked.plan(opened, **amount) for amount in amounts]
    else:
        opened.module.to(_device())
        with shown() as progress:
            options = {"calibration": count, "seed": seed, "progress": progress}
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
    recover: Annotated[str | None, typer.Option(help="Recover on these unlabelled images: a folder, shards, URLs.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images recovery reads.")] = 1024,
    damping: Annotated[float, typer.Option(help="Ridge of the recovery, relative.")] = 1e-3,
    seed: SeedOption = 0,
    min_cosine: Annotated[
        float | None, typer.Option(help="Find the smallest size whose embeddings keep this mean cosine on images held out.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Find the smallest size whose k-NN accuracy falls by no more than this, such as 1%; needs classes.")
    ] = None,
    held_out: Annotated[int, typer.Option(min=50, help="For these two: how many images judge.")] = 512,
    stream: Annotated[bool, typer.Option(help="From file to file, MLP by MLP, for towers larger than memory; without recovery.")] = False,
) -> None:
    """Prune an encoder, recover it if images are given, and write a model directory."""
    amounts = _amounts(mlp_ratio, keep_ratio, keep, budget, round_to)
    if len(amounts) > 1:
        raise DgmrError("prune writes one model; give one --budget (limits that hold together are joined by a comma)")
    [amount] = amounts
    if stream:
        if plan_file or rankings or recover or min_cosine is not None or max_drop is not None:
            raise DgmrError("--stream decides by the weights alone and does not recover; leave out what looks at images, and --plan")
        _prune_streaming(model, pretrained, out_dir, criterion or "dgmr", seed, amount)
        return
    if plan_file and rankings:
        raise DgmrError("give either --plan or --rankings")
    if criterion and (plan_file or rankings):
        raise DgmrError("a plan or rankings were made by a criterion already; leave out --criterion")
    if min_cosine is not None or max_drop is not None:
        if plan_file or recover is None or any(value is not None for key, value in amount.items() if key != "round_to"):
            raise DgmrError("--min-cosine and --max-drop find the size by themselves, on images: give --recover IMAGES and no size or plan")
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
    from dgmr_tp.decide import Rankings
    from dgmr_tp.encoders import open_model
    from dgmr_tp.oneshot import prune as prune_model
    from dgmr_tp.progress import shown
    from dgmr_tp.pruning import Plan

    _refuse_existing(out_dir)
    opened = open_model(model, pretrained)
    opened.module.to(_device())
    decided = Plan.read(plan_file) if plan_file else None
    if rankings:
        decided, amount = Rankings.read(rankings).plan(opened, **amount), {}
    batches, found = _images(recover, count, seed, opened)
    with shown() as progress:
        result = prune_model(
            opened,
            batches,
            criterion=criterion,
            **amount,
            plan=decided,
            damping=damping,
            seed=seed,
            progress=progress,
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


@app.command()
def distill(
    directory: Annotated[Path, typer.Argument(help="A run directory whose recipe has a distill section.")],
    size: Annotated[str | None, typer.Option(help="In a launched process: only this size, such as mlp_ratio-1.")] = None,
) -> None:
    """Run the distillation of a run directory; also the program that the deepspeed launcher starts in every process.

    On a cluster: dgmr-tp run RECIPE --until recover, then deepspeed --hostfile HOSTS --no_local_rank --module dgmr_tp distill RUN_DIR,
    then dgmr-tp run RECIPE.
    """
    _train(directory, "distill", size)


@app.command("tune-text")
def tune_text(
    directory: Annotated[Path, typer.Argument(help="A run directory whose recipe has a tune_text section.")],
    size: Annotated[str | None, typer.Option(help="In a launched process: only this size, such as mlp_ratio-1.")] = None,
) -> None:
    """Tune the text towers of a run directory to their pruned vision towers; launched like distill."""
    _train(directory, "tune_text", size)


TextOption = Annotated[
    str | None,
    typer.Option(
        help="For an exported file: the model whose preprocessing and text tower go with it [default: what its export.json says]."
    ),
]
TrustOption = Annotated[bool, typer.Option("--trust-file", help="Open .pt and .pt2 files, which are code, wherever they come from.")]


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model directories, open_clip:NAME, demo, or exported .onnx, .pt, .pt2 files.")],
    dataset: Annotated[str | None, typer.Option(help="clip_benchmark's name of the data set, such as wds/NAME.")] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    knn_train: Annotated[Path | None, typer.Option(help="k-NN: images with classes, a folder of folders or tars with .cls.")] = None,
    knn_test: Annotated[Path | None, typer.Option(help="k-NN: the images that are judged.")] = None,
    head_test: Annotated[Path | None, typer.Option(help="A linear classifier on the embeddings: the images that are judged.")] = None,
    head: Annotated[
        Path | None, typer.Option(help="Its weight and bias: .safetensors, .pt. Without: the encoder's own classifier.")
    ] = None,
    head_train: Annotated[Path | None, typer.Option(help="Or fit it to the first model, with these images.")] = None,
    suite: Annotated[str | None, typer.Option(help="dgmr-zoo: the three figures of DGMR's model zoo beside the published ones.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="For a suite: a folder for each of its data sets.")] = None,
    folder: Annotated[Path, typer.Option("--out", "-o", help="The folder for the figures: a JSON each, and table.csv.")] = Path("results"),
    pretrained: PretrainedOption = None,
    text: TextOption = None,
    task: Annotated[str, typer.Option(help="zeroshot_classification, zeroshot_retrieval, linear_probe or auto.")] = "auto",
    annotations: Annotated[Path | None, typer.Option(help="Caption file of mscoco_captions, flickr30k and the like.")] = None,
    classnames: Annotated[Path | None, typer.Option(help="Your own class names: JSON, keyed by the data set's name.")] = None,
    templates: Annotated[Path | None, typer.Option(help="Your own prompts: JSON, keyed by the data set's name.")] = None,
    save_classifier: Annotated[Path | None, typer.Option(help="Keep the class embeddings in this file.")] = None,
    load_classifier: Annotated[
        list[Path] | None, typer.Option(help="Class embeddings instead of the text tower; several are averaged.")
    ] = None,
    trust_file: TrustOption = False,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
) -> None:
    """Evaluate models or files with clip_benchmark's own code, by k-NN, or by a linear classifier; torchrun shares the images."""
    from dgmr_tp.evaluation.zero_shot import tabulate, task_of
    from dgmr_tp.served import open_served

    asked = [dataset is not None and root is not None, knn_train is not None and knn_test is not None, suite is not None]
    if sum([*asked, head_test is not None]) != 1:
        raise DgmrError("give --dataset and --root, or --knn-train and --knn-test, or --head-test, or --suite and --data-root")
    if (head or head_train) and (head_test is None or (head and head_train)):
        raise DgmrError("--head FILE, or --head-train IMAGES, goes with --head-test IMAGES")
    if suite is not None and (suite != "dgmr-zoo" or data_root is None):
        raise DgmrError(f"--suite {suite}: the one suite is dgmr-zoo, and it needs --data-root")
    if save_classifier and len(models) > 1:
        raise DgmrError(f"--save-classifier {save_classifier} keeps one text tower's classes; give one model")
    speaks = _join_processes()
    how: dict[str, Any] = {
        "task": task_of(dataset, root) if dataset and root and task == "auto" else task,
        "annotations": annotations,
        "classnames": classnames,
        "templates": templates,
        "workers": workers,
    }
    how |= {"save_classifier": save_classifier, "load_classifiers": load_classifier or [], "batch_size": batch_size}
    files: list[Path] = []
    rows: dict[str, dict[str, float]] = {}
    known_head = _read_head(head)
    for name in models:
        served = open_served(name, pretrained, text=text, trusted=trust_file, device=_device())
        label = _label(name, list(rows))
        if suite:
            assert data_root
            rows[label], written = _zoo(served, label, data_root, folder, batch_size, workers, speaks)
            files += written
            continue
        what = f"{dataset.replace('/', '_')}-{how['task']}" if dataset else "head" if head_test else "knn"
        files.append(folder / f"{label}-{what}.json")
        if dataset:
            rows[label] = _benchmark(served, label, dataset, root, files[-1], **how)
            continue
        options = {"batch_size": batch_size, "workers": workers, "speaks": speaks}
        if head_test:
            if known_head is None:
                known_head = _choose_head(served, head_train, **options)
            rows[label] = _head(served, label, known_head, head_test, files[-1], **options)
        else:
            rows[label] = _knn(served, label, knn_train, knn_test, files[-1], **options)
    if not speaks:
        return
    tabulate(files, folder / "table.csv")
    if suite:
        from dgmr_tp.evaluation.zoo import FIGURES, PUBLISHED

        published: dict[str, Any] = {f"{name} (published)": dict(zip(FIGURES, row, strict=True)) for name, row in PUBLISHED.items()}
        _print_metrics({**rows, **published}, percent=True)
        return
    _print_metrics(rows)


@app.command("clip_benchmark", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def clip_benchmark(context: typer.Context, trust_file: TrustOption = False) -> None:
    """clip_benchmark's own command line, which then knows --model_type dgmr_tp: --model takes what eval takes, files too.

    --pretrained is a NAME's weights, or for a file the model that goes with it; none: what its export.json says.
    """
    from dgmr_tp.evaluation.zero_shot import clip_benchmark as run_command
    from dgmr_tp.served import is_file, open_served

    def load(model_name: str, pretrained: str, cache_dir: str | None, device: str):  # type: ignore[no-untyped-def]
        given = any(argument.startswith("--pretrained") for argument in context.args)
        named = pretrained if given and pretrained != "none" else None
        weights = {"text": named} if is_file(model_name) else {"pretrained": pretrained if given else None}
        served = open_served(model_name, trusted=trust_file, device=device, **weights)
        return served.clip, served.model.preprocess, served.model.tokenizer

    run_command(context.args, load)


@app.command()
def compare(
    old: Annotated[str, typer.Argument(help="The encoder of your index: a model, an exported file, or its embeddings as .npy.")],
    new: Annotated[str, typer.Argument(help="The encoder to be served, likewise.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="The folder for compatibility.json and .html.")],
    images: Annotated[Path | None, typer.Option(help="Images like those in your index. Not with .npy.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names, a line each, to compare zero-shot decisions; or saved embeddings (.pt).")
    ] = None,
    count: Annotated[int, typer.Option(min=100, help="How many images.")] = 5000,
    queries: Annotated[int, typer.Option(min=1, help="How many of them ask; the others are the index.")] = 1000,
    keep: Annotated[float, typer.Option(help="From this share on the index is kept.")] = 0.98,
    convenient: Annotated[float, typer.Option(help="From this share on re-embedding may wait.")] = 0.9,
    old_pretrained: Annotated[str | None, typer.Option(help="Weights of OLD, for a NAME.")] = None,
    new_pretrained: Annotated[str | None, typer.Option(help="Weights of NEW, for a NAME.")] = None,
    text: TextOption = None,
    trust_file: TrustOption = False,
    seed: SeedOption = 0,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
) -> None:
    """Must the index be rebuilt? What old and new embeddings of your own images find in each other."""
    from dgmr_tp.evaluation.compatibility import Limits, compatibility
    from dgmr_tp.extras import require_installed
    from dgmr_tp.report import in_words, percent, write_html

    for package, extra in (("faiss", "eval"), ("jinja2", "export")):  # said before anything is embedded
        require_installed(package, extra)
    limits = Limits(keep, convenient)
    arrays = [Path(side).suffix == ".npy" for side in (old, new)]
    if any(arrays) and (not all(arrays) or images or (classes and classes.suffix != ".pt")):
        raise DgmrError("OLD and NEW are both .npy, without --images, and --classes then are saved embeddings (.pt); or neither is")
    if not any(arrays) and images is None:
        raise DgmrError("two encoders are compared on images: give --images FOLDER, with images like those in your index")
    if all(arrays):
        from dgmr_tp.evaluation.survey import saved_classifier

        rows = [_array(side) for side in (old, new)]
        found = compatibility(*rows, classifier=saved_classifier(classes) if classes else None, queries=queries, limits=limits, seed=seed)
    else:
        from dgmr_tp.evaluation.survey import Side, survey, text_classifier
        from dgmr_tp.progress import shown
        from dgmr_tp.served import open_served

        opened = [
            open_served(side, pretrained, text=text, trusted=trust_file, device=_device())
            for side, pretrained in ((old, old_pretrained), (new, new_pretrained))
        ]
        options = {"count": count, "queries": queries, "limits": limits, "seed": seed, "device": _device(), "workers": workers}
        with shown() as progress:
            found = survey(
                *(Side(side.embed, side.model.preprocess) for side in opened),
                images,
                classifier=text_classifier(opened[0].model, classes) if classes else None,
                progress=progress,
                **options,
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_whole(out_dir / "compatibility.json", json.dumps(found, indent=1) + "\n")
    page = write_html({"found": found, "old": _label(old, []), "new": _label(new, [])}, out_dir / "compatibility.html", "compare.html.j2")
    out.print(in_words(found))
    table = Table("", "same of 10", "same of 100", "first among ten", box=None)
    for name, way in found["ways"].items():
        table.add_row(name, *map(percent, way.values()))
    out.print(table)
    out.print(f"report: {page}", soft_wrap=True)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="The folder for the files.")],
    pretrained: PretrainedOption = None,
    original: Annotated[str | None, typer.Option(help="The model before pruning, to be timed beside it.")] = None,
    original_pretrained: Annotated[str | None, typer.Option(help="Its weights, for a NAME.")] = None,
    formats: Annotated[
        str, typer.Option(help="By commas: onnx, onnx-fp16, onnx-int8, torchscript, pt2, aotinductor.")
    ] = "onnx,torchscript",
    outputs: Annotated[str, typer.Option(help="By commas: embedding, patches.")] = "embedding",
    normalised: Annotated[bool, typer.Option("--normalised", help="Make embeddings of length 1 inside the files.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Export a CLIP's text tower too.")] = False,
    layout: Annotated[str, typer.Option(help="Names and side files: plain, huggingface, immich.")] = "plain",
    images: Annotated[str | None, typer.Option(help="Your own images, to prove the files with [default: generated scenes].")] = None,
    tolerance: Annotated[
        list[str] | None, typer.Option(help="The relative error that a format may have, such as onnx-int8=0.3; may be repeated.")
    ] = None,
) -> None:
    """Export the towers; every file is proved against PyTorch in a process of its own, and timed beside the original's."""
    import tempfile

    from dgmr_tp.encoders import open_model
    from dgmr_tp.export.bundle import failures
    from dgmr_tp.export.layouts import export_model

    named = [name.strip() for name in formats.split(",")]
    allowed = dict(_tolerance(entry) for entry in tolerance or [])
    opened = open_model(model, pretrained)
    shown = _proof_images(opened, images)
    options: dict[str, Any] = {"outputs": tuple(name.strip() for name in outputs.split(",")), "normalised": normalised}
    options |= {"layout": layout, "formats": named, "tolerance": allowed}
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".original-") as scratch:
        before = None
        if original:
            before, dense = Path(scratch), open_model(original, original_pretrained)
            if dense.image_size != opened.image_size:
                raise DgmrError(
                    f"{original} takes images of {dense.image_size} pixels, {model} of {opened.image_size}; name its own original"
                )
            export_model(dense, shown, before, source=original, latency_batches=(), **options)
        source = os.path.relpath(opened.source, out_dir) if opened.source else model
        bundle = export_model(opened, shown, out_dir, source=source, text=text, original=before, **options)
    if "torchscript" in named:
        out.print("torchscript: PyTorch has deprecated it; pt2 comes after it")
    for tower in bundle["towers"].values():
        for entry in tower["files"].values():
            _print_file(out_dir, entry)
    if failed := failures(bundle):
        raise DgmrError("; ".join(f"{out_dir / file}: {why}" for file, why in failed.items()))


@app.command()
def inspect(model: Annotated[str, typer.Argument(help=MODEL_HELP)]) -> None:
    """Show the MLP sites of an encoder, its parameters and FLOPs. Reads no weights; any size costs nothing."""
    from dgmr_tp.encoders import open_model
    from dgmr_tp.pruning import find_sites
    from dgmr_tp.pruning.cost import flops, parameters

    opened = open_model(model, weights="none")
    tower = opened.encoder.module
    table = Table("site", "width", "hidden", "share of parameters", box=None)
    total = parameters(tower)
    for site in find_sites(tower):
        share = parameters(tower.get_submodule(site.name)) / total
        table.add_row(site.name, str(site.width), str(site.hidden), f"{share:.1%}")
    out.print(table)
    out.print(f"{opened.name}: {total / 1e6:.2f} M parameters, {flops(tower, opened.image_size) / 1e9:.2f} GFLOPs an image")


@app.command()
def relocate(directory: Annotated[Path, typer.Argument(help="A model directory that was moved.")]) -> None:
    """Write a model directory's new path into its config, for open_clip models whose timm trunk was pruned."""
    from dgmr_tp.extras import require

    changed = require("dgmr_tp.encoders.open_clip_models", "encoders").relocate(directory)
    out.print(f"{directory}: {'its config names the new path' if changed else 'its config holds no path; nothing to do'}")


def main() -> None:
    """Entry point of ``dgmr-tp``."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except Preempted as error:
        print(f"dgmr-tp: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    except (DgmrError, OSError) as error:  # OSError: no space, no permission, no such folder; it names the file
        print(f"dgmr-tp: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _train(directory: Path, stage: str, size: str | None) -> None:
    from dgmr_tp.distillation.engine import stop_deepspeed
    from dgmr_tp.distillation.launch import end_with_parent, is_worker
    from dgmr_tp.pipeline import Run

    this = Run.open(directory)
    if getattr(this.recipe, stage) is None:
        raise DgmrError(f"the recipe of {directory} has no section {stage}")
    if not is_worker():
        this.run(until=stage, say=out.print)
        return
    end_with_parent()
    for name in [size] if size else this.recipe.prune.sizes:
        this.train_here(stage, name)
    stop_deepspeed()


def _report(this) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.report import collect, print_table, write_html

    figures = {step.key: this.figures(step.key) for step in this.steps}
    data = collect(this.directory, this.recipe.name, figures, this.not_zero_shot)
    print_table(data, out)
    path = write_html(data, this.directory / "report.html")
    out.print(f"report: {path}")
    if failed := [entry for size in data["sizes"] for entry in size["files"] if not entry["verified"]]:
        raise DgmrError("; ".join(f"{entry['file']} failed its proof: {entry['verdict']}" for entry in failed))


def _tolerance(text: str) -> tuple[str, float]:
    try:
        name, value = text.split("=")
        return name, float(value)
    except ValueError:
        raise DgmrError(f"--tolerance {text}: write it as onnx-int8=0.3") from None


def _proof_images(opened, images):  # type: ignore[no-untyped-def]
    """Images to prove an export with, as the model takes them."""
    import torch

    from dgmr_tp.export.proof import EXAMPLES

    if images is not None:
        from dgmr_tp.data.streams import find_images

        return torch.cat(list(find_images(images).sample(EXAMPLES, 0, opened.preprocess)))
    from PIL import Image

    from dgmr_tp.data.scenes import Scene

    return torch.stack([opened.preprocess(Image.fromarray(Scene.draw(0, i).image())) for i in range(EXAMPLES)])


def _print_file(directory, entry) -> None:  # type: ignore[no-untyped-def]
    """Two lines at most: what came out, and how fast it is."""
    out.print(f"{directory / entry['file']}: {entry['verdict']}, {entry['megabytes']:.1f} MB", soft_wrap=True)
    if entry["verdict"] != "verified":
        return
    error = max(value for by_batch in entry["relative_error"].values() for value in by_batch.values())
    cosine = min(value for by_batch in entry["cosine"].values() for value in by_batch.values())
    out.print(f"  relative error {error:.0e}, cosine {cosine:.6f}, {entry['peak_memory_mb']:.0f} MB of memory")
    for batch, times in entry["latency_ms"].items():
        old = f"original {times['original']['median']:.1f} ms, " if "original" in times else ""
        out.print(f"  batch {batch}: {old}this {times['pruned']['median']:.1f} ms")


def _prune_streaming(model, pretrained, directory, criterion, seed, amount) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.progress import shown
    from dgmr_tp.streaming import prune_streaming

    with shown() as progress:
        plan = prune_streaming(model, directory, pretrained, criterion=criterion, seed=seed, progress=progress, **amount)
    out.print(str(plan), markup=False)
    out.print(f"written: {directory}")


def _prune_to_promise(model, pretrained, directory, images, rankings, options) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.decide import Rankings
    from dgmr_tp.encoders import open_model
    from dgmr_tp.progress import shown
    from dgmr_tp.promise import prune_to_promise

    _refuse_existing(directory)
    opened = open_model(model, pretrained)
    opened.module.to(_device())
    ranked = Rankings.read(rankings) if rankings else None
    with shown() as progress:
        found = prune_to_promise(opened, images, rankings=ranked, progress=progress, **options)
    what = "mean cosine" if options["min_cosine"] is not None else "drop of k-NN accuracy"
    table = Table("M params", what, "95 % bound", "", box=None)
    for trial in found.trials:
        table.add_row(f"{trial.parameters / 1e6:.2f}", f"{trial.value:.4f}", f"{trial.bound:.4f}", "kept" if trial.kept else "broken")
    out.print(table)
    _finish(opened, found.pruned, directory, None)


def _fraction(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise DgmrError(f"--max-drop {text}: write it as 1% or 0.01") from None


def _amounts(mlp_ratio: float | None, keep_ratio: float | None, keep: int | None, budgets: list[str] | None, round_to: int) -> list[Amount]:
    """The options that say how many neurons stay, as the library takes them: one size, or one per budget."""
    limits = [_budget(text) for text in budgets] if budgets else [None]
    return [{"mlp_ratio": mlp_ratio, "keep_ratio": keep_ratio, "keep": keep, "budget": limit, "round_to": round_to} for limit in limits]


def _budget(text: str) -> dict[str, float]:
    try:
        return {key: float(value) for key, value in (limit.split("=") for limit in text.split(","))}
    except ValueError:
        raise DgmrError(f"--budget {text}: write it as params=0.5 or params=0.5,flops=0.4") from None


def _print_plans(opened, names, plans) -> None:  # type: ignore[no-untyped-def]
    """One line per plan."""
    from dgmr_tp.pruning import find_sites
    from dgmr_tp.pruning.cost import costs

    tower = opened.encoder.module
    sites = [site for site in find_sites(tower) if site.name in plans[0].sites]
    found = costs(tower, sites, opened.image_size)
    table = Table("budget", "M params", "GFLOPs", "narrowest", "widest", title=f"{plans[0].encoder} · {plans[0].criterion}", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("all", f"{found['params'].total / 1e6:.2f}", f"{found['flops'].total / 1e9:.2f}", "", "")
    for name, plan in zip(names, plans, strict=True):
        after = plan.cost(found)
        kept = [len(site.kept) for site in plan.sites.values()]
        table.add_row(name, f"{after['params'] / 1e6:.2f}", f"{after['flops'] / 1e9:.2f}", str(min(kept)), str(max(kept)))
    out.print(table)


def _print_plan(opened, plan) -> None:  # type: ignore[no-untyped-def]
    from dgmr_tp.pruning import find_sites
    from dgmr_tp.pruning.cost import costs

    tower = opened.encoder.module
    found = costs(tower, [site for site in find_sites(tower) if site.name in plan.sites], opened.image_size)
    size, work, after = found["params"], found["flops"], plan.cost(found)
    table = Table("site", "width", "hidden", "kept", "M params", "GFLOPs", title=f"{plan.encoder} · {plan.criterion}", box=None)
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


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise DgmrError(f"{path} exists already; name another with -o")
    if not path.absolute().parent.is_dir():
        raise DgmrError(f"the folder {path.absolute().parent} for {path.name} does not exist; make it first")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _join_processes() -> bool:
    """Meet the other processes of a torchrun, if there are any; whether this one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()
    return torch.distributed.get_rank() == 0


def _array(path: str):  # type: ignore[no-untyped-def]
    import numpy as np
    import torch

    try:
        rows = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DgmrError(f"cannot read the embeddings {path}: {error}") from error
    if rows.ndim != 2:
        raise DgmrError(f"{path} has the shape {list(rows.shape)}; embeddings are rows and columns")
    return rows


def _label(source: str, taken: list[str]) -> str:
    """A short name for a model, such as distilled-mlp_ratio-1, that no other has."""
    path = Path(source).resolve() if Path(source).exists() else Path(source.replace(":", "-"))
    parts = [part for part in path.parts if part != os.sep]
    names = ("-".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((name for name in names if name not in taken and name != "model"), f"{'-'.join(parts)}-{len(taken)}")


def _benchmark(served, label, dataset, root, file, **how) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from dgmr_tp.evaluation.zero_shot import evaluate as run_clip_benchmark

    model = served.model
    return run_clip_benchmark(served.clip, model.preprocess, model.tokenizer, dataset=dataset, root=root, output=file, name=label, **how)


def _knn(served, label, train, test, file, **options) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.knn import knn_accuracy

    bank, judged = Images.find(train), Images.find(test)
    metrics = _with_progress(partial(knn_accuracy, train=bank, test=judged), served, **options)
    return _written(metrics, label, "knn", test, file, options["speaks"])


def _read_head(path):  # type: ignore[no-untyped-def]
    from dgmr_tp.evaluation.linear_head import read_head

    return read_head(path) if path else None


def _choose_head(served, train, **options):  # type: ignore[no-untyped-def]
    """One that is fitted, or None: the model's own."""
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.linear_head import check_classifier, fitted_head

    if train is None:
        return check_classifier(served.model)
    return _with_progress(partial(fitted_head, train=Images.find(train)), served, **options)


def _head(served, label, head, test, file, **options) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.linear_head import head_accuracy

    metrics = _with_progress(partial(head_accuracy, head=head, test=Images.find(test)), served, **options)
    return _written(metrics, label, "head", test, file, options["speaks"])


def _with_progress(measure, served, speaks, **options):  # type: ignore[no-untyped-def]
    from dgmr_tp.progress import shown

    with shown() as progress:
        if speaks:
            options["progress"] = progress
        return measure(served.embed, served.model.preprocess, device=served.device, **options)


def _written(metrics, label, task, test, file, speaks) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Figures that are not clip_benchmark's own, kept in its form."""
    if speaks:
        file.parent.mkdir(parents=True, exist_ok=True)
        form = {"dataset": str(test), "model": label, "pretrained": "none", "task": task, "metrics": metrics, "language": ""}
        write_whole(file, json.dumps(form, indent=1) + "\n")
    return metrics


def _zoo(served, label, root, folder, batch_size, workers, speaks) -> tuple[dict[str, float], list[Path]]:  # type: ignore[no-untyped-def]
    from dgmr_tp.evaluation.zoo import RETRIEVAL, find_zoo, knn_folders, zoo_figures

    found, (train, test) = find_zoo(root), knn_folders(root)
    metrics, files = {}, []
    for name, (dataset, place) in found.items():
        task = "zeroshot_retrieval" if name in RETRIEVAL else "zeroshot_classification"
        files.append(folder / f"{label}-{name}-{task}.json")
        metrics[name] = _benchmark(served, label, dataset, place, files[-1], task=task, batch_size=batch_size, workers=workers)
    files.append(folder / f"{label}-knn.json")
    knn = _knn(served, label, train, test, files[-1], batch_size=batch_size, workers=workers, speaks=speaks)
    return zoo_figures(metrics, knn), files


def _print_metrics(rows: dict[str, dict[str, float]], percent: bool = False) -> None:
    """One model: a line per metric; several: a table."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    form = lambda value: "–" if value is None else f"{value:.1f}" if percent else f"{value:.4f}"  # noqa: E731
    if len(rows) == 1:
        for name, value in next(iter(rows.values())).items():
            out.print(f"{name:<28} {form(value)}")
        return
    wide = len(names) > 4  # more metrics than 80 columns hold: then they are the rows
    table = Table("metric" if wide else "model", box=None)
    for name in rows if wide else names:
        table.add_column(name, justify="right", overflow="fold")
    for name in names if wide else rows:
        cells = [rows[model].get(name) for model in rows] if wide else [rows[name].get(metric) for metric in names]
        table.add_row(name, *map(form, cells))
    out.print(table)


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
        out.print(f"skipped {len(found.broken)} images that do not decode and {found.other_files} files that are no images")
    before, after = parameters(opened.encoder.module), parameters(result.model.encoder.module)
    out.print(f"{opened.name}: {before / 1e6:.2f} M → {after / 1e6:.2f} M parameters ({after / before - 1:+.1%}) in {directory}")
