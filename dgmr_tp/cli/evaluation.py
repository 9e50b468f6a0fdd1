"""Commands that evaluate models and exported files, and that compare two encoders.

The library is imported inside the commands, so that ``--help`` does not load torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from dgmr_tp.cli.common import (
    DeviceOption,
    DtypeOption,
    PretrainedOption,
    SeedOption,
    TrustOption,
    compute_config,
    number_option,
    out,
    path_option,
)
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import check_output, check_output_directory, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.index_compatibility import Thresholds
    from dgmr_tp.evaluation.linear_head import LinearHead
    from dgmr_tp.evaluation.loading import LoadedEncoder

app = typer.Typer()
SUITE = "dgmr-zoo"
TABLE_METRICS = 4
"""Number of metric columns that fit into 80 characters. With more metrics, the models become the columns."""
Metrics = dict[str, float]
TextOption = Annotated[
    str | None,
    typer.Option(
        help="For an exported file: the model with its preprocessing and text tower [default: the model in its "
        "export.json]."
    ),
]


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Model directories, open_clip:NAME, demo, or exported .onnx, .pt, .pt2 files.")
    ],
    dataset: Annotated[str | None, typer.Option(help="clip_benchmark's name of a data set, such as wds/NAME.")] = None,
    root: Annotated[
        Path | None,
        path_option(help="Directory of the data set. {dataset} in it stands for the data set's name.", kind="any"),
    ] = None,
    knn_train: Annotated[
        str | None,
        typer.Option(help="k-NN: labeled images, a directory with a subdirectory per class or tar files with .cls."),
    ] = None,
    knn_test: Annotated[str | None, typer.Option(help="k-NN: labeled images to classify.")] = None,
    head_test: Annotated[
        str | None, typer.Option(help="Linear classifier on the embeddings: labeled images to classify.")
    ] = None,
    head: Annotated[
        Path | None,
        path_option(
            help="File with the classifier's weight and bias [default: the encoder's own classifier].", kind="file"
        ),
    ] = None,
    head_train: Annotated[
        str | None, typer.Option(help="Labeled images to fit the classifier to, with the first model's embeddings.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="dgmr-zoo: the three figures of DGMR's model zoo, next to the published ones.")
    ] = None,
    data_root: Annotated[
        Path | None,
        path_option(help="Suite: directory with a subdirectory for each of its data sets.", kind="directory"),
    ] = None,
    out_dir: Annotated[
        Path,
        path_option("--out", "-o", help="Output directory for a JSON file per result and table.csv.", kind="directory"),
    ] = Path("results"),
    pretrained: PretrainedOption = None,
    text: TextOption = None,
    task: Annotated[
        str, typer.Option(help="zeroshot_classification, zeroshot_retrieval, linear_probe or auto.")
    ] = "auto",
    annotations: Annotated[
        Path | None, path_option(help="Caption file of data sets such as mscoco_captions and flickr30k.", kind="file")
    ] = None,
    classnames: Annotated[
        Path | None, path_option(help="Custom class names: JSON, keyed by the data set's name.", kind="file")
    ] = None,
    templates: Annotated[
        Path | None, path_option(help="Custom prompts: JSON, keyed by the data set's name.", kind="file")
    ] = None,
    save_classifier: Annotated[
        Path | None, path_option(help="Save the class embeddings to this file.", kind="file")
    ] = None,
    load_classifier: Annotated[
        list[Path] | None,
        path_option(help="Use saved class embeddings instead of the text tower. Several are averaged.", kind="file"),
    ] = None,
    trust_file: TrustOption = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that read images.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Evaluate models or exported files on a clip_benchmark data set, by k-NN, or by a linear classifier.

    The processes of a torchrun launch share the images.
    """
    from dgmr_tp.encoders import is_library_name
    from dgmr_tp.evaluation.linear_head import read_head
    from dgmr_tp.evaluation.loading import load_encoder
    from dgmr_tp.evaluation.zero_shot import default_task, tabulate
    from dgmr_tp.utils.distributed import is_main_process, join_processes

    kind = _evaluation_kind(dataset, root, knn_train, knn_test, head_test, suite, data_root)
    if (head or head_train) and (head_test is None or (head and head_train)):
        raise DgmrError(
            "--head and --head-train need --head-test and exclude each other. Give --head-test and one of them."
        )
    if suite is not None and suite != SUITE:
        raise DgmrError(f"unknown suite {suite!r}. Use --suite {SUITE}.")
    if save_classifier and len(models) > 1:
        raise DgmrError(f"--save-classifier {save_classifier} saves the classes of one text tower. Give one model.")
    check_output_directory(out_dir)
    if save_classifier:
        check_output(save_classifier, replace=True)
    join_processes()
    compute = compute_config(device, dtype)
    loading = _Loading(batch_size, workers)
    options: dict[str, Any] = {
        "annotations": annotations,
        "classnames": classnames,
        "templates": templates,
        "save_classifier": save_classifier,
        "load_classifiers": load_classifier or [],
    }
    dataset_task = default_task(dataset, root) if dataset and root and task == "auto" else task
    linear_head = read_head(head) if head else None
    files: list[Path] = []
    rows: dict[str, Metrics] = {}
    for source in models:
        loaded = load_encoder(source, pretrained, text=text, trusted=trust_file, compute=compute)
        is_name = is_library_name(source)
        label = _label(f"{source}-{Path(pretrained).name}" if pretrained and is_name else source, list(rows))
        if kind == "dataset":
            assert dataset and root
            files.append(out_dir / f"{label}-{dataset.replace('/', '_')}-{dataset_task}.json")
            rows[label] = _evaluate_dataset(
                loaded, label, dataset, root, files[-1], loading, task=dataset_task, **options
            )
        elif kind == "knn":
            assert knn_train and knn_test
            files.append(out_dir / f"{label}-knn.json")
            rows[label] = _evaluate_knn(loaded, label, knn_train, knn_test, files[-1], loading)
        elif kind == "head":
            assert head_test
            files.append(out_dir / f"{label}-head.json")
            linear_head = linear_head or _choose_head(loaded, head_train, loading)
            rows[label] = _evaluate_head(loaded, label, linear_head, head_test, files[-1], loading)
        else:
            assert data_root
            rows[label], suite_files = _evaluate_suite(loaded, label, data_root, out_dir, loading)
            files += suite_files
    if is_main_process():
        tabulate(files, out_dir / "table.csv")
        if kind == "suite":
            _print_metrics({**rows, **_published_rows()}, percent=True)
        else:
            _print_metrics(rows)


@app.command(
    "clip_benchmark",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def clip_benchmark(context: typer.Context, trust_file: TrustOption = False) -> None:
    """Run clip_benchmark's command line with our models: --model takes a model or a file, as eval does.

    --pretrained is the weights of a NAME. For a file it is the model that the file came from; none uses its
    export.json.
    """
    from dgmr_tp.encoders import is_library_name
    from dgmr_tp.evaluation.clip_benchmark_command import run_clip_benchmark
    from dgmr_tp.evaluation.loading import load_encoder
    from dgmr_tp.export.formats import is_exported_file

    def load(
        model_name: str, pretrained: str, cache_dir: str | None, device: str
    ) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[[list[str]], Tensor] | None]:
        given = any(argument.startswith("--pretrained") for argument in context.args)
        if given and pretrained != "none" and not (is_library_name(model_name) or is_exported_file(model_name)):
            raise DgmrError(
                f"--pretrained {pretrained} is not used, because {model_name} has weights of its own. Leave it out."
            )
        if is_exported_file(model_name):
            weights = {"text": pretrained if given and pretrained != "none" else None}
        else:
            weights = {"pretrained": pretrained if given else None}
        compute = compute_config(device, "float32")  # clip_benchmark has an option for mixed precision
        loaded = load_encoder(model_name, trusted=trust_file, compute=compute, **weights)
        return loaded.clip, loaded.model.preprocess, loaded.model.tokenizer

    run_clip_benchmark(context.args, load)


@app.command()
def compare(
    old: Annotated[
        str, typer.Argument(help="Encoder of your index: a model, an exported file, or its embeddings as .npy.")
    ],
    new: Annotated[str, typer.Argument(help="Encoder to deploy, in the same form.")],
    out_dir: Annotated[
        Path,
        path_option(
            "--out", "-o", help="Output directory for compatibility.json and compatibility.html.", kind="directory"
        ),
    ],
    images: Annotated[
        str | None, typer.Option(help="Images like those in your index. Not allowed with .npy files.")
    ] = None,
    classes: Annotated[
        Path | None,
        path_option(
            help="Compare zero-shot decisions too: a file with one class name per line, a directory with "
            "classnames.txt, or saved class embeddings (.pt).",
            kind="any",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=100, help="Number of images to use.")] = 5000,
    queries: Annotated[
        int, typer.Option(min=1, help="Number of these images that are queries. The others form the index.")
    ] = 1000,
    keep: Annotated[
        float, number_option(help="Minimum score at which the index can be kept.", minimum=0, maximum=1)
    ] = 0.98,
    convenient: Annotated[
        float, number_option(help="Minimum score at which re-embedding can be deferred.", minimum=0, maximum=1)
    ] = 0.9,
    old_pretrained: Annotated[str | None, typer.Option(help="Weights of OLD, for a NAME.")] = None,
    new_pretrained: Annotated[str | None, typer.Option(help="Weights of NEW, for a NAME.")] = None,
    text: TextOption = None,
    trust_file: TrustOption = False,
    seed: SeedOption = 0,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that read images.")] = 0,
    device: DeviceOption = None,
) -> None:
    """Decide whether an index of old embeddings can be kept, by what old and new embeddings of your images retrieve."""
    from dgmr_tp.evaluation.class_embeddings import class_embeddings, read_class_embeddings
    from dgmr_tp.evaluation.index_compatibility import ComparedEncoder, compare_embeddings, compare_encoders
    from dgmr_tp.evaluation.loading import load_encoder
    from dgmr_tp.pipeline.report import describe_compatibility, percent, write_html
    from dgmr_tp.utils.lazy_imports import require_installed

    require_installed("faiss", "eval")  # before anything is embedded
    check_output_directory(out_dir)
    compute = compute_config(device, "float32")  # rounding would count as a difference between old and new
    thresholds = _thresholds(keep, convenient)
    is_array = [Path(source).suffix == ".npy" for source in (old, new)]
    if any(is_array) and (not all(is_array) or images or (classes and classes.suffix != ".pt")):
        raise DgmrError(
            "OLD and NEW must both be .npy files or both be encoders. With .npy files, leave out --images and give "
            "--classes as saved class embeddings (.pt)."
        )
    if all(is_array):
        result = compare_embeddings(
            _read_embeddings(old),
            _read_embeddings(new),
            classifier=read_class_embeddings(classes) if classes else None,
            queries=queries,
            thresholds=thresholds,
            seed=seed,
        )
    else:
        if images is None:
            raise DgmrError(
                "two encoders are compared on images, and none are given. Pass --images DIRECTORY with images like "
                "those in your index."
            )
        load = partial(load_encoder, text=text, trusted=trust_file, compute=compute)
        old_encoder, new_encoder = load(old, old_pretrained), load(new, new_pretrained)
        result = compare_encoders(
            ComparedEncoder(old_encoder.embed, old_encoder.model.preprocess),
            ComparedEncoder(new_encoder.embed, new_encoder.model.preprocess),
            images,
            classifier=class_embeddings(old_encoder.model, classes) if classes else None,
            count=count,
            queries=queries,
            thresholds=thresholds,
            seed=seed,
            device=compute.choose_device(),
            workers=workers,
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "compatibility.json", result)
    page_data = {"found": result, "old": _label(old, []), "new": _label(new, [])}
    page = write_html(page_data, out_dir / "compatibility.html", "compare.html.j2")
    out.print(describe_compatibility(result))
    table = Table("", "same of 10", "same of 100", "first among ten", box=None)
    for name, figures in result["ways"].items():
        table.add_row(name, *map(percent, figures.values()))
    out.print(table)
    if result.get("skipped"):
        out.print(result["skipped"])
    out.print(f"report: {page}")


@dataclass(frozen=True)
class _Loading:
    """Options for reading images."""

    batch_size: int
    workers: int


def _evaluation_kind(
    dataset: str | None,
    root: Path | None,
    knn_train: str | None,
    knn_test: str | None,
    head_test: str | None,
    suite: str | None,
    data_root: Path | None,
) -> Literal["dataset", "knn", "head", "suite"]:
    """Return the one kind of evaluation whose options are all given.

    Raises:
        DgmrError: no kind is given, more than one, or only a part of a kind's options.
    """
    options: dict[Literal["dataset", "knn", "head", "suite"], tuple[object, ...]] = {
        "dataset": (dataset, root),
        "knn": (knn_train, knn_test),
        "head": (head_test,),
        "suite": (suite, data_root),
    }
    started = [kind for kind, values in options.items() if any(value is not None for value in values)]
    if len(started) != 1 or None in options[started[0]]:
        raise DgmrError(
            "the options must name exactly one evaluation. Give --dataset and --root, or --knn-train and --knn-test, "
            "or --head-test, or --suite and --data-root."
        )
    return started[0]


def _evaluate_dataset(
    loaded: LoadedEncoder, label: str, dataset: str, root: Path, file: Path, loading: _Loading, **options: Any
) -> Metrics:
    """Return the metrics of a clip_benchmark data set, and write them."""
    from dgmr_tp.evaluation.zero_shot import evaluate as evaluate_zero_shot

    return evaluate_zero_shot(
        loaded.clip,
        loaded.model.preprocess,
        loaded.model.tokenizer,
        dataset=dataset,
        root=root,
        output=file,
        name=label,
        batch_size=loading.batch_size,
        workers=loading.workers,
        **options,
    )


def _evaluate_knn(
    loaded: LoadedEncoder, label: str, train_path: str | Path, test_path: str | Path, file: Path, loading: _Loading
) -> Metrics:
    """Return the k-NN accuracies, and write them."""
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.knn import knn_accuracy

    train, test = Images.find(train_path), Images.find(test_path)
    metrics = _run(partial(knn_accuracy, train=train, test=test), loaded, loading)
    _write_result(metrics, label, "knn", file, test, train)
    return metrics


def _choose_head(loaded: LoadedEncoder, train_path: str | None, loading: _Loading) -> LinearHead | None:
    """Return a classifier that is fitted to the model, or None for the model's own."""
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.linear_head import check_classifier, fit_head
    from dgmr_tp.utils.distributed import is_main_process

    if train_path is None:
        check_classifier(loaded.model)
        return None
    train = Images.find(train_path)
    head = _run(partial(fit_head, train=train), loaded, loading)
    if is_main_process():
        _report_images(train)
    return head


def _evaluate_head(
    loaded: LoadedEncoder, label: str, head: LinearHead | None, test_path: str, file: Path, loading: _Loading
) -> Metrics:
    """Return the accuracy of a linear classifier, and write it."""
    from dgmr_tp.data.images import Images
    from dgmr_tp.evaluation.linear_head import head_accuracy

    test = Images.find(test_path)
    metrics = _run(partial(head_accuracy, head=head, test=test), loaded, loading)
    _write_result(metrics, label, "head", file, test)
    return metrics


def _evaluate_suite(
    loaded: LoadedEncoder, label: str, root: Path, out_dir: Path, loading: _Loading
) -> tuple[Metrics, list[Path]]:
    """Return the zoo's three figures and the files that were written."""
    from dgmr_tp.evaluation.zoo import RETRIEVAL, find_zoo, knn_folders, zoo_figures

    datasets, (train, test) = find_zoo(root), knn_folders(root)
    metrics, files = {}, []
    for name, (dataset, folder) in datasets.items():
        task = "zeroshot_retrieval" if name in RETRIEVAL else "zeroshot_classification"
        files.append(out_dir / f"{label}-{name}-{task}.json")
        metrics[name] = _evaluate_dataset(loaded, label, dataset, folder, files[-1], loading, task=task)
    files.append(out_dir / f"{label}-knn.json")
    knn = _evaluate_knn(loaded, label, train, test, files[-1], loading)
    return zoo_figures(metrics, knn), files


def _run(measure: Callable[..., Any], loaded: LoadedEncoder, loading: _Loading) -> Any:
    """Call a measurement of images with the encoder and the options for reading images."""
    return measure(
        loaded.embed,
        loaded.model.preprocess,
        device=loaded.device,
        batch_size=loading.batch_size,
        workers=loading.workers,
    )


def _write_result(metrics: Metrics, label: str, task: str, file: Path, test: Images, *others: Images) -> None:
    """Write metrics that are not clip_benchmark's in its JSON form, with the number of images that were left out."""
    from dgmr_tp.evaluation.zero_shot import result_json
    from dgmr_tp.utils.distributed import is_main_process

    if is_main_process():
        file.parent.mkdir(parents=True, exist_ok=True)
        result = result_json(str(test.source), label, task, metrics, language="")
        result["images_left_out"] = _report_images(test, *others)
        write_json(file, result)


def _report_images(*sources: Images) -> int:
    """Print how the classes of each source were read and what was skipped. Return the number of broken images."""
    from dgmr_tp.data.images import describe_others

    for images in sources:
        if images.notice:
            out.print(images.notice, soft_wrap=True)
        if images.others:
            out.print(f"{images.source}: {describe_others(images.others)}", soft_wrap=True)
        if images.broken:
            name, error = next(iter(images.broken.items()))
            share = f"{len(images.broken)} of {len(images)} images of {images.source}"
            out.print(f"{share} do not decode and are left out; the first: {name}: {error}")
    return sum(len(images.broken) for images in sources)


def _thresholds(keep: float, convenient: float) -> Thresholds:
    from pydantic import ValidationError

    from dgmr_tp.evaluation.index_compatibility import Thresholds

    try:
        return Thresholds(keep=keep, convenient=convenient)
    except ValidationError as error:
        problem = error.errors()[0]
        key = "".join(f"--{part}: " for part in problem["loc"])
        raise DgmrError(f"{key}{problem['msg'].removeprefix('Value error, ')}") from error


def _read_embeddings(path: str) -> Tensor:
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DgmrError(f"cannot read the embeddings {path}: {error}. Give an array that numpy.save wrote.") from error
    if array.dtype.kind not in "fi" and array.dtype != np.uint8:
        raise DgmrError(
            f"{path} holds {array.dtype} values, which are no embeddings. Give floating-point numbers, or int8; "
            "convert float16 and bfloat16 that are stored as their bits."
        )
    embeddings = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    if embeddings.ndim != 2:
        raise DgmrError(
            f"{path} has the shape {list(embeddings.shape)}. Give an array with rows and columns, [images, width]."
        )
    return embeddings


def _label(source: str, taken: list[str]) -> str:
    """Return a short name for a model, such as ``distilled-mlp_ratio-1``, that is not taken."""
    path = Path(source).resolve() if Path(source).exists() else Path(source.replace(":", "-"))
    parts = [part for part in path.parts if part != os.sep]
    names = ("-".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((name for name in names if name not in taken and name != "model"), f"{'-'.join(parts)}-{len(taken)}")


def _published_rows() -> dict[str, Any]:
    """Return the published figures of the zoo as rows of the printed table."""
    from dgmr_tp.evaluation.zoo import FIGURES, PUBLISHED

    return {f"{name} (published)": dict(zip(FIGURES, values, strict=True)) for name, values in PUBLISHED.items()}


def _print_metrics(rows: dict[str, Metrics], percent: bool = False) -> None:
    """Print one line per metric for a single model, and a table for several models."""
    metrics = list(dict.fromkeys(name for row in rows.values() for name in row))

    def number(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.1f}" if percent else f"{value:.4f}"

    if len(rows) == 1:
        for name, value in next(iter(rows.values())).items():
            out.print(f"{name:<28} {number(value)}")
        return
    models_as_columns = len(metrics) > TABLE_METRICS
    table = Table("metric" if models_as_columns else "model", box=None)
    for name in rows if models_as_columns else metrics:
        table.add_column(name, justify="right", overflow="fold")
    if models_as_columns:
        for metric in metrics:
            table.add_row(metric, *(number(row.get(metric)) for row in rows.values()))
    else:
        for model, row in rows.items():
            table.add_row(model, *(number(row.get(metric)) for metric in metrics))
    out.print(table)
