"""Commands that say how good a model or a file is, alone and beside another."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dgmr_tp.cli.common import PretrainedOption, SeedOption, TrustOption, device, out
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import write_whole

app = typer.Typer()
TextOption = Annotated[
    str | None,
    typer.Option(
        help="For an exported file: the model whose preprocessing and text tower go with it [default: what its export.json says]."
    ),
]


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Model directories, open_clip:NAME, demo, or exported .onnx, .pt, .pt2 files.")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="clip_benchmark's name of the data set, such as wds/NAME.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    knn_train: Annotated[
        Path | None, typer.Option(help="k-NN: images with classes, a folder of folders or tars with .cls.")
    ] = None,
    knn_test: Annotated[Path | None, typer.Option(help="k-NN: the images that are judged.")] = None,
    head_test: Annotated[
        Path | None, typer.Option(help="A linear classifier on the embeddings: the images that are judged.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="Its weight and bias: .safetensors, .pt. Without: the encoder's own classifier.")
    ] = None,
    head_train: Annotated[Path | None, typer.Option(help="Or fit it to the first model, with these images.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="dgmr-zoo: the three figures of DGMR's model zoo beside the published ones.")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="For a suite: a folder for each of its data sets.")] = None,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for the figures: a JSON each, and table.csv.")
    ] = Path("results"),
    pretrained: PretrainedOption = None,
    text: TextOption = None,
    task: Annotated[
        str, typer.Option(help="zeroshot_classification, zeroshot_retrieval, linear_probe or auto.")
    ] = "auto",
    annotations: Annotated[
        Path | None, typer.Option(help="Caption file of mscoco_captions, flickr30k and the like.")
    ] = None,
    classnames: Annotated[
        Path | None, typer.Option(help="Your own class names: JSON, keyed by the data set's name.")
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Your own prompts: JSON, keyed by the data set's name.")
    ] = None,
    save_classifier: Annotated[Path | None, typer.Option(help="Keep the class embeddings in this file.")] = None,
    load_classifier: Annotated[
        list[Path] | None, typer.Option(help="Class embeddings instead of the text tower; several are averaged.")
    ] = None,
    trust_file: TrustOption = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
) -> None:
    """Evaluate models or files with clip_benchmark's own code, by k-NN, or by a linear classifier; torchrun shares the images."""
    from dgmr_tp.evaluation.loading import open_served
    from dgmr_tp.evaluation.zero_shot import tabulate, task_of

    kinds = ((dataset, root), (knn_train, knn_test), (suite, data_root), (head_test,))
    if (
        sum(None not in kind for kind in kinds) != 1
        or sum(any(part is not None for part in kind) for kind in kinds) != 1
    ):
        raise DgmrError(
            "give --dataset and --root, or --knn-train and --knn-test, or --head-test, or --suite and --data-root"
        )
    if (head or head_train) and (head_test is None or (head and head_train)):
        raise DgmrError("--head FILE, or --head-train IMAGES, goes with --head-test IMAGES")
    if suite is not None and suite != "dgmr-zoo":
        raise DgmrError(f"--suite {suite}: the one suite is dgmr-zoo")
    if save_classifier and len(models) > 1:
        raise DgmrError(f"--save-classifier {save_classifier} keeps one text tower's classes; give one model")
    from dgmr_tp.utils.distributed import is_main_process, join_processes

    join_processes()
    speaks = is_main_process()
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
        served = open_served(name, pretrained, text=text, trusted=trust_file, device=device())
        tag = f"-{Path(pretrained).name}" if pretrained and name.startswith(("open_clip:", "timm:")) else ""
        label = _label(name + tag, list(rows))
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

        published: dict[str, Any] = {
            f"{name} (published)": dict(zip(FIGURES, row, strict=True)) for name, row in PUBLISHED.items()
        }
        _print_metrics({**rows, **published}, percent=True)
        return
    _print_metrics(rows)


@app.command(
    "clip_benchmark",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def clip_benchmark(context: typer.Context, trust_file: TrustOption = False) -> None:
    """clip_benchmark's own command line, which then knows --model_type dgmr_tp: --model takes what eval takes, files too.

    --pretrained is a NAME's weights, or for a file the model that goes with it; none: what its export.json says.
    """
    from dgmr_tp.evaluation.loading import is_file, open_served
    from dgmr_tp.evaluation.zero_shot import clip_benchmark as run_command

    def load(model_name: str, pretrained: str, cache_dir: str | None, device: str):  # type: ignore[no-untyped-def]
        given = any(argument.startswith("--pretrained") for argument in context.args)
        named = pretrained if given and pretrained != "none" else None
        weights = {"text": named} if is_file(model_name) else {"pretrained": pretrained if given else None}
        served = open_served(model_name, trusted=trust_file, device=device, **weights)
        return served.clip, served.model.preprocess, served.model.tokenizer

    run_command(context.args, load)


@app.command()
def compare(
    old: Annotated[
        str, typer.Argument(help="The encoder of your index: a model, an exported file, or its embeddings as .npy.")
    ],
    new: Annotated[str, typer.Argument(help="The encoder to be served, likewise.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="The folder for compatibility.json and .html.")],
    images: Annotated[Path | None, typer.Option(help="Images like those in your index. Not with .npy.")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="To compare zero-shot decisions: class names, a line each; a folder with classnames.txt; or saved embeddings (.pt)."
        ),
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
    from dgmr_tp.evaluation.index_compatibility import Limits, compatibility
    from dgmr_tp.pipeline.report import in_words, percent, write_html
    from dgmr_tp.utils.lazy_imports import require_installed

    for package, extra in (("faiss", "eval"), ("jinja2", "export")):  # said before anything is embedded
        require_installed(package, extra)
    limits = Limits(keep, convenient)
    arrays = [Path(side).suffix == ".npy" for side in (old, new)]
    if any(arrays) and (not all(arrays) or images or (classes and classes.suffix != ".pt")):
        raise DgmrError(
            "OLD and NEW are both .npy, without --images, and --classes then are saved embeddings (.pt); or neither is"
        )
    if not any(arrays) and images is None:
        raise DgmrError(
            "two encoders are compared on images: give --images FOLDER, with images like those in your index"
        )
    if all(arrays):
        from dgmr_tp.evaluation.index_compatibility import saved_classifier

        rows = [_array(side) for side in (old, new)]
        found = compatibility(
            *rows, classifier=saved_classifier(classes) if classes else None, queries=queries, limits=limits, seed=seed
        )
    else:
        from dgmr_tp.evaluation.index_compatibility import Side, survey, text_classifier
        from dgmr_tp.evaluation.loading import open_served

        opened = [
            open_served(side, pretrained, text=text, trusted=trust_file, device=device())
            for side, pretrained in ((old, old_pretrained), (new, new_pretrained))
        ]
        options = {
            "count": count,
            "queries": queries,
            "limits": limits,
            "seed": seed,
            "device": device(),
            "workers": workers,
        }
        found = survey(
            *(Side(side.embed, side.model.preprocess) for side in opened),
            images,
            classifier=text_classifier(opened[0].model, classes) if classes else None,
            **options,
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_whole(out_dir / "compatibility.json", json.dumps(found, indent=1) + "\n")
    page = write_html(
        {"found": found, "old": _label(old, []), "new": _label(new, [])},
        out_dir / "compatibility.html",
        "compare.html.j2",
    )
    out.print(in_words(found))
    table = Table("", "same of 10", "same of 100", "first among ten", box=None)
    for name, way in found["ways"].items():
        table.add_row(name, *map(percent, way.values()))
    out.print(table)
    out.print(f"report: {page}", soft_wrap=True)


def _benchmark(served, label, dataset, root, file, **how) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from dgmr_tp.evaluation.zero_shot import evaluate as run_clip_benchmark

    model = served.model
    return run_clip_benchmark(
        served.clip, model.preprocess, model.tokenizer, dataset=dataset, root=root, output=file, name=label, **how
    )


def _knn(served, label, train, test, file, **options) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.knn import knn_accuracy

    bank, judged = Images.find(train), Images.find(test)
    metrics = _measured(partial(knn_accuracy, train=bank, test=judged), served, **options)
    return _written(metrics, label, "knn", file, options["speaks"], judged, bank)


def _read_head(path):  # type: ignore[no-untyped-def]
    from dgmr_tp.evaluation.linear_head import read_head

    return read_head(path) if path else None


def _choose_head(served, train, **options):  # type: ignore[no-untyped-def]
    """One that is fitted, or None: the model's own."""
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.linear_head import check_classifier, fitted_head

    if train is None:
        return check_classifier(served.model)
    images = Images.find(train)
    fitted = _measured(partial(fitted_head, train=images), served, **options)
    if options["speaks"]:
        _say_what_is_left_out(images)
    return fitted


def _head(served, label, head, test, file, **options) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.linear_head import head_accuracy

    judged = Images.find(test)
    metrics = _measured(partial(head_accuracy, head=head, test=judged), served, **options)
    return _written(metrics, label, "head", file, options["speaks"], judged)


def _zoo(served, label, root, folder, batch_size, workers, speaks) -> tuple[dict[str, float], list[Path]]:  # type: ignore[no-untyped-def]
    from dgmr_tp.evaluation.zoo import RETRIEVAL, find_zoo, knn_folders, zoo_figures

    found, (train, test) = find_zoo(root), knn_folders(root)
    metrics, files = {}, []
    for name, (dataset, place) in found.items():
        task = "zeroshot_retrieval" if name in RETRIEVAL else "zeroshot_classification"
        files.append(folder / f"{label}-{name}-{task}.json")
        metrics[name] = _benchmark(
            served, label, dataset, place, files[-1], task=task, batch_size=batch_size, workers=workers
        )
    files.append(folder / f"{label}-knn.json")
    knn = _knn(served, label, train, test, files[-1], batch_size=batch_size, workers=workers, speaks=speaks)
    return zoo_figures(metrics, knn), files


def _measured(measure, served, speaks, **options):  # type: ignore[no-untyped-def]
    return measure(served.embed, served.model.preprocess, device=served.device, **options)


def _written(metrics, label, task, file, speaks, judged, *others) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Figures that are not clip_benchmark's own, kept in its form."""
    if speaks:
        file.parent.mkdir(parents=True, exist_ok=True)
        form = {
            "dataset": str(judged.source),
            "model": label,
            "pretrained": "none",
            "task": task,
            "metrics": metrics,
            "language": "",
        }
        left_out = _say_what_is_left_out(judged, *others)
        write_whole(file, json.dumps({**form, "images_left_out": left_out}, indent=1) + "\n")
    return metrics


def _say_what_is_left_out(*looked_at) -> int:  # type: ignore[no-untyped-def]
    """How many images did not decode."""
    for images in looked_at:
        if images.broken:
            name, error = next(iter(images.broken.items()))
            share = f"{len(images.broken)} of {len(images)} images of {images.source}"
            out.print(f"{share} do not decode and are left out; the first: {name}: {error}", soft_wrap=True)
    return sum(len(images.broken) for images in looked_at)


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
