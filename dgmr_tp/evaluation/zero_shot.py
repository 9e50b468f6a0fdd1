"""Zero-shot classification, retrieval and linear probe, measured with clip_benchmark's data sets and metric functions.

The results are written in clip_benchmark's JSON form. clip_benchmark's mixed precision (amp) is off. Images are encoded
in the model's precision, which is float32 unless a GPU or the caller sets another. In float32 the metrics are the ones
that clip_benchmark's command line reports with ``--no_amp``, except for the linear probe on a CPU, which clip_benchmark
does not have; see :mod:`dgmr_tp.evaluation.linear_probe`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from dgmr_tp.data.labels import check_class_names
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.evaluation.checked_metrics import checked_metrics
from dgmr_tp.evaluation.class_embeddings import read_class_embeddings
from dgmr_tp.evaluation.linear_probe import image_features, linear_probe
from dgmr_tp.evaluation.shards import KINDS, dataset_kind
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.utils.config import Config, DataPath
from dgmr_tp.utils.distributed import all_gather_rows, get_rank, get_world_size, is_main_process
from dgmr_tp.utils.files import atomic_write, to_json
from dgmr_tp.utils.lazy_imports import require

RECALLS = (1, 5, 10)
SEED = 0
"""clip_benchmark's default seed."""
PROBE_LEARNING_RATE, PROBE_EPOCHS = 0.1, 10
"""clip_benchmark's defaults for the linear probe on a GPU."""
TASKS = ("zeroshot_classification", "zeroshot_retrieval", "image_caption_selection", "linear_probe")


class DatasetConfig(Config):
    """A clip_benchmark data set."""

    dataset: str
    """clip_benchmark's name, such as ``wds/cifar10``."""
    root: Annotated[str, DataPath()]
    """Directory of the data set, or ``scenes:classes`` or ``scenes:captions``."""
    task: Literal["auto", "zeroshot_classification", "zeroshot_retrieval"] = "auto"
    """Task to evaluate. ``auto`` uses the data set's default task."""


class CLIPWithEncoder(nn.Module):
    """A CLIP with another image encoder, such as an exported file. Text goes through the CLIP's text tower.

    Embeddings that are not finite raise DgmrError.
    """

    def __init__(self, clip: nn.Module, encode_image: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.clip = clip
        self.image_encoder = encode_image

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the image encoder's embeddings."""
        return check_embeddings(self.image_encoder(images), "the images")

    def encode_text(self, text: Tensor) -> Tensor:
        """Return the CLIP's text embeddings."""
        return check_embeddings(self.clip.encode_text(text), "the texts")  # type: ignore[operator]


def as_clip(model: OpenedModel, encode_image: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Return a module with ``encode_image`` and, if the model has a text tower, ``encode_text``.

    Args:
        model: the model.
        encode_image: image encoder to use instead of the model's own.
    """
    if encode_image is None and hasattr(model.module, "encode_image") and not model.has_adapter:
        return CLIPWithEncoder(model.module, model.module.encode_image)  # type: ignore[arg-type]
    return CLIPWithEncoder(model.text or model.module, encode_image or ImageEncoder(model.adapter))


def split_over_processes(encode_image: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function with the same result in which each process of a launch encodes its part of every batch."""

    def encode(images: Tensor) -> Tensor:
        rank, world_size = get_rank(), get_world_size()
        share = -(-len(images) // world_size)
        padding = images[:1].expand(share * world_size - len(images), *images.shape[1:])
        padded = torch.cat([images, padding])  # no process gets an empty batch, which some runtimes refuse
        return all_gather_rows(encode_image(padded[rank * share :][:share]))[: len(images)]

    return encode


def evaluate(
    model: nn.Module,
    preprocess: Callable[[Any], Tensor],
    tokenizer: Callable[[list[str]], Tensor] | None,
    *,
    dataset: str,
    root: str | Path,
    output: Path,
    name: str,
    task: str = "auto",
    annotations: Path | None = None,
    classnames: Path | None = None,
    templates: Path | None = None,
    save_classifier: Path | None = None,
    load_classifiers: Sequence[Path] = (),
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, float]:
    """Evaluate a model on a clip_benchmark data set and write the result in clip_benchmark's JSON form.

    Under torch.distributed the processes share the images of every batch, and the main process writes the file.

    Args:
        model: module with ``encode_image`` and, for the zero-shot tasks, ``encode_text``.
        preprocess: the model's preprocessing of a PIL image.
        tokenizer: the model's tokenizer, or None.
        dataset: clip_benchmark's name of the data set, such as ``wds/NAME`` for a directory of webdataset shards.
        root: directory of the data set.
        output: the JSON file. Its directory is created.
        name: name of the model in the file.
        task: one of :data:`TASKS`, or ``auto`` for the data set's default; see :func:`default_task`.
        annotations: caption file of data sets such as ``mscoco_captions`` and ``flickr30k``.
        classnames, templates: JSON files with custom class names and prompts, keyed by the data set's name.
        save_classifier: file to which the class embeddings are saved.
        load_classifiers: saved class embeddings to average and use instead of the text tower.
        batch_size: images per batch.
        workers: number of processes that read images.

    Returns:
        The metrics in the file, such as ``acc1`` or ``text_retrieval_recall@5``, as fractions.

    Raises:
        DgmrError: the task is unknown, the model lacks a text tower that the task needs, a file is missing, the data
            set cannot be read, or a linear probe on a GPU was started by torchrun.
    """
    require("clip_benchmark", "eval")
    root = find_root(dataset, root)
    task = default_task(dataset, root) if task == "auto" else task
    device = _device_of(model)
    _check_request(name, model, tokenizer, task, load_classifiers, device)
    for path in (annotations, classnames, templates, *load_classifiers):
        if path is not None and not path.exists():
            raise DgmrError(f"{path} does not exist. Check the path.")
    for path in (classnames, templates):
        if path is not None:
            _check_own_names(path, dataset)
    encode: Any = model.encode_image
    if distributed.is_initialized():
        encode = split_over_processes(encode)
    model = CLIPWithEncoder(model, encode)
    data = _DatasetLoader(dataset, root, preprocess, task, annotations, classnames, templates, batch_size, workers)
    try:
        with _progress_on_terminal_only(), checked_metrics(f"{dataset} in {root}"):
            torch.manual_seed(SEED)
            model.eval()
            if task == "linear_probe":
                metrics = _linear_probe(model, data, device)
            else:
                save = save_classifier if is_main_process() else None
                metrics = _zero_shot(model, tokenizer, data, device, save, load_classifiers)
    except DgmrError as error:  # a worker's error has its traceback before the message
        raise DgmrError(first_line(error)) from error
    except Exception as error:  # data sets and loaders of clip_benchmark raise many kinds
        raise DgmrError(
            f"clip_benchmark cannot evaluate {dataset} in {root}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if is_main_process():
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, to_json(result_json(dataset, name, task, metrics)))
    return metrics


def result_json(
    dataset: str, model: str, task: str, metrics: dict[str, float], *, language: str = "en"
) -> dict[str, Any]:
    """Return a result with the keys of clip_benchmark's JSON files."""
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": "none",
        "task": task,
        "metrics": metrics,
        "language": language,
    }


def find_root(dataset: str, root: str | Path) -> Path:
    """Return the directory of a data set. ``{dataset}`` in it stands for the name, as in clip_benchmark.

    Raises:
        DgmrError: it does not exist.
    """
    name = dataset.removeprefix("wds/")
    filled = str(root).replace("{dataset}", name).replace("{dataset_cleaned}", name.replace("/", "-"))
    for path in (Path(root).expanduser(), Path(filled).expanduser()):
        if path.is_dir():
            return path
    raise DgmrError(f"the data set directory {root} does not exist. Check --root, or the root in the recipe.")


def default_task(dataset: str, root: str | Path) -> str:
    """Return the default task of a data set.

    A webdataset directory states it in ``dataset_type.txt``. For other data sets clip_benchmark knows it.
    """
    if not dataset.startswith("wds/"):
        return require("clip_benchmark.datasets.builder", "eval").get_dataset_default_task(dataset)
    return KINDS[dataset_kind(find_root(dataset, root))]


def tabulate(files: Iterable[Path], table: Path) -> None:
    """Write a CSV file with one row per JSON result, as clip_benchmark's ``build`` command does."""
    cli = require("clip_benchmark.cli", "eval")
    staging_path = table.with_name(f".{table.name}.partial")
    cli.main_build(argparse.Namespace(files=[str(path) for path in files], output=str(staging_path)))
    os.replace(staging_path, table)


@dataclass(frozen=True)
class _DatasetLoader:
    """A data set and the options to load it."""

    dataset: str
    root: Path
    preprocess: Callable[[Any], Tensor]
    task: str
    annotations: Path | None
    classnames: Path | None
    templates: Path | None
    batch_size: int
    workers: int

    def test_loader(self) -> tuple[Any, DataLoader[Any]]:
        """Return the test split and its batches."""
        custom = {"custom_classname_file": self.classnames, "custom_template_file": self.templates}
        paths = {key: str(path) if path else None for key, path in custom.items()}
        test = self._build("test", language="en", task=self.task, **paths)
        if self.dataset.startswith("wds/"):
            batches = test.batched(self.batch_size)
            return test, DataLoader(batches, batch_size=None, shuffle=False, num_workers=self.workers)
        return test, self._loader(test)

    def train_loader(self) -> DataLoader[Any]:
        """Return the batches of the training split."""
        return self._loader(self._build("train"))

    def _build(self, split: str, **options: Any) -> Any:
        builder = require("clip_benchmark.datasets.builder", "eval")
        annotations = str(self.annotations) if self.annotations else ""
        return builder.build_dataset(
            self.dataset,
            root=str(self.root),
            transform=self.preprocess,
            split=split,
            annotation_file=annotations,
            **options,
        )

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        builder = require("clip_benchmark.datasets.builder", "eval")
        collate = builder.get_dataset_collate_fn(self.dataset)
        return DataLoader(dataset, self.batch_size, shuffle=False, num_workers=self.workers, collate_fn=collate)


def _check_request(
    name: str,
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor] | None,
    task: str,
    load_classifiers: Sequence[Path],
    device: str,
) -> None:
    """Raise DgmrError if the model or the launch does not suit the task."""
    if task not in TASKS:
        raise DgmrError(f"unknown task {task!r}. Use auto, {', '.join(TASKS)}.")
    has_text = tokenizer is not None and hasattr(model, "encode_text")
    if not has_text and task != "linear_probe" and not load_classifiers:
        raise DgmrError(
            f"{name} has no text tower, or no tokenizer. Use a CLIP for zero-shot tasks, or evaluate by k-NN or "
            "linear_probe."
        )
    if task == "linear_probe" and device == "cuda" and distributed.is_initialized():
        raise DgmrError("clip_benchmark's linear probe runs in a single process. Start it without torchrun.")


def _check_own_names(path: Path, dataset: str) -> None:
    """Raise DgmrError if a JSON file of class names or prompts has no entry that clip_benchmark would use."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DgmrError(f"cannot read {path}: {first_line(error)}. Give a JSON file in UTF-8.") from error
    names = (dataset, dataset.removeprefix("wds/"), "imagenet1k")
    if not isinstance(content, dict) or not any(content.get(name) for name in names):
        raise DgmrError(
            f"{path} has no entry for {names[1]}, or it is empty. Write a mapping with the data set's name."
        )


def _device_of(model: nn.Module) -> str:
    """Return the type of the device of a model's parameters, or ``cpu``."""
    parameter = next(iter(model.parameters()), None)
    return "cpu" if parameter is None else parameter.device.type


def _zero_shot(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor] | None,
    data: _DatasetLoader,
    device: str,
    save_classifier: Path | None,
    load_classifiers: Sequence[Path],
) -> dict[str, float]:
    """Return clip_benchmark's metrics of a task other than the linear probe."""
    dataset, loader = data.test_loader()
    options = {"device": device, "amp": False}
    if data.task == "zeroshot_retrieval":
        if hasattr(dataset, "__len__") and len(dataset) < max(RECALLS):
            raise DgmrError(
                f"{data.dataset} in {data.root} has {len(dataset)} images, and recall@{max(RECALLS)} needs at least "
                f"{max(RECALLS)}. Give more images."
            )
        metric = require("clip_benchmark.metrics.zeroshot_retrieval", "eval")
        return metric.evaluate(model, loader, tokenizer, recall_k_list=list(RECALLS), **options)
    if data.task == "image_caption_selection":
        metric = require("clip_benchmark.metrics.image_caption_selection", "eval")
        return metric.evaluate(model, loader, tokenizer, **options)
    classes, templates = getattr(dataset, "classes", None), getattr(dataset, "templates", None)
    if classes is None or templates is None:
        raise DgmrError(
            f"{data.dataset} in {data.root} has no class names or no prompts for zero-shot classification. "
            "Give custom class names and prompts, or choose another task."
        )
    check_class_names(classes, f"{data.dataset} in {data.root}")
    for path in load_classifiers:
        if (columns := read_class_embeddings(path).shape[1]) != len(classes):
            raise DgmrError(
                f"{path} has the embeddings of {columns} classes, but {data.dataset} in {data.root} has "
                f"{len(classes)}. Use class embeddings of this data set."
            )
    metric = require("clip_benchmark.metrics.zeroshot_classification", "eval")
    return metric.evaluate(
        model,
        loader,
        tokenizer,
        classes,
        templates,
        save_clf=str(save_classifier) if save_classifier else None,
        load_clfs=[str(path) for path in load_classifiers],
        **options,
    )


def _linear_probe(model: nn.Module, data: _DatasetLoader, device: str) -> dict[str, float]:
    """Return clip_benchmark's metrics of a linear probe on a GPU, or those of our own on a CPU.

    On a GPU we compute the features and store them where clip_benchmark looks for features of an earlier run. It would
    spread the model over all visible GPUs, which not every tower supports.
    """
    _, test = data.test_loader()
    train = data.train_loader()
    if device == "cpu":
        return linear_probe(model, train, test)
    metric = require("clip_benchmark.metrics.linear_probe", "eval")
    model_id = "model"
    with tempfile.TemporaryDirectory() as features_root:
        (Path(features_root) / model_id).mkdir()
        for split, batches in (("train", train), ("test", test)):
            features, labels = image_features(model, batches, device=device)
            torch.save(features, Path(features_root) / model_id / f"features_{split}.pt")
            torch.save(labels, Path(features_root) / model_id / f"targets_{split}.pt")
        return metric.evaluate(
            model,
            train,
            test,
            fewshot_k=-1,
            batch_size=data.batch_size,
            num_workers=data.workers,
            lr=PROBE_LEARNING_RATE,
            epochs=PROBE_EPOCHS,
            model_id=model_id,
            seed=SEED,
            feature_root=features_root,
            device=device,
            amp=False,
        )


@contextlib.contextmanager
def _progress_on_terminal_only() -> Iterator[None]:
    """Hide clip_benchmark's progress bars unless standard error is a terminal."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
