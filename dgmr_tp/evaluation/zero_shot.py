"""The bridge to clip_benchmark: its own command line, run in this process, with one more model type registered.

clip_benchmark has no plug-ins, but the dictionary of its loaders is shared with its command line. Everything it computes
and writes is its own, but for the linear probe on a CPU, which it does not have. In comparisons amp is always off.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.evaluation.linear_probe import linear_probe
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.distributed import all_gather_rows, get_rank, get_world_size
from dgmr_tp.utils.lazy_imports import require

RECALLS = ("1", "5", "10")
MODEL_TYPE = "dgmr_tp"
Loader = Callable[..., tuple[nn.Module, Callable[[Any], Tensor], Callable[[list[str]], Tensor] | None]]
"""clip_benchmark's own form: ``(model_name, pretrained, cache_dir, device)`` to model, transform and tokenizer."""


class CLIPWithEncoder(nn.Module):
    """A CLIP whose image encoder is something else, such as an exported file; text goes through the CLIP's own tower."""

    def __init__(self, clip: nn.Module, encode_image: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.clip = clip
        self.encode_image = encode_image

    def encode_text(self, text: Tensor) -> Tensor:
        return self.clip.encode_text(text)  # type: ignore[operator]


def as_clip(model: OpenedModel, encode_image: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A model with ``encode_image``, its own or another, and, if it has a text tower, ``encode_text``."""
    if encode_image is None and hasattr(model.module, "encode_image"):
        return model.module
    return CLIPWithEncoder(model.text or model.module, encode_image or ImageEncoder(model.adapter))


def shared(encode_image: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, of whose every batch each process of a launcher embeds its part."""

    def encode(images: Tensor) -> Tensor:
        rank, world = get_rank(), get_world_size()
        share = -(-len(images) // world)
        padded = torch.cat(
            [images, images[:1].expand(share * world - len(images), *images.shape[1:])]
        )  # an empty part suits no runtime
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
    """Evaluate with clip_benchmark and keep its JSON file. Under torch.distributed the processes share the images of every batch.

    Args:
        model: has ``encode_image`` and, for what is zero-shot, ``encode_text``.
        preprocess, tokenizer: the model's own.
        dataset: a clip_benchmark data set, such as ``wds/NAME`` for a webdataset folder.
        root: where it lies.
        output: the JSON file; its folder is made.
        name: what the file calls the model.
        task: ``zeroshot_classification``, ``zeroshot_retrieval``, ``linear_probe``, or ``auto``: by the folder's ``dataset_type.txt``.
        annotations: the caption file of data sets such as ``mscoco_captions`` and ``flickr30k``.
        classnames, templates: JSON files of your own, keyed by the data set's name.
        save_classifier: where to keep the class embeddings; load_classifiers: use the mean of these instead of the text tower.
        batch_size: images a step; workers: processes that read them.

    Returns:
        The metrics of the JSON file, such as ``acc1`` or ``text_retrieval_recall@5``, as fractions.

    Raises:
        DgmrError: the model has no text tower and needs one, the data set cannot be read, or a linear probe on several GPUs.
    """
    cli = require("clip_benchmark.cli", "eval")
    root = Path(root)
    if not root.is_dir():
        raise DgmrError(f"the data set folder {root} does not exist")
    task = task_of(dataset, root) if task == "auto" else task
    if (tokenizer is None or not hasattr(model, "encode_text")) and task != "linear_probe" and not load_classifiers:
        raise DgmrError(f"{name} has no text tower, or no tokenizer; zero-shot evaluation needs a CLIP")
    for path in (annotations, classnames, templates, *load_classifiers):
        if path is not None and not path.exists():
            raise DgmrError(f"{path} does not exist")
    rank = get_rank()
    device = next(model.parameters()).device if any(True for _ in model.parameters()) else torch.device("cpu")
    if task == "linear_probe" and device.type == "cuda" and distributed.is_initialized():
        raise DgmrError("clip_benchmark's linear probe takes one process; start it without torchrun")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{rank}.partial")
    features = output.with_name(
        f".{output.name}.features"
    )  # clip_benchmark would take those of another model by the same name
    options: dict[str, Any] = {
        "--model_type": MODEL_TYPE,
        "--model": name,
        "--pretrained": "none",
        "--dataset": dataset,
        "--dataset_root": root,
        "--task": task,
        "--annotation_file": annotations,
        "--custom_classname_file": classnames,
        "--custom_template_file": templates,
        "--save_clf": save_classifier,
        "--batch_size": batch_size,
        "--num_workers": workers,
        "--feature_root": features,
        "--output": str(aside).replace("{", "{{").replace("}", "}}"),
    }
    arguments = [part for key, value in options.items() if value is not None for part in (key, str(value))]
    arguments += ["--no_amp", "--quiet", "--recall_k", *RECALLS]
    arguments += ["--load_clfs", *map(str, load_classifiers)] if load_classifiers else []
    shutil.rmtree(features, ignore_errors=True)  # of an evaluation that was interrupted
    if distributed.is_initialized():
        model = CLIPWithEncoder(model, shared(model.encode_image))
    with (
        patch.object(torch.cuda, "is_available", lambda: device.type == "cuda"),
        patch.object(
            torch.cuda, "device_count", lambda: 1
        ),  # a linear probe would spread a tower that does not take it
        registered(lambda **_: (model, preprocess, tokenizer)),
        contextlib.nullcontext(io.StringIO())
        if sys.stderr.isatty()
        else contextlib.redirect_stderr(io.StringIO()) as noise,
    ):
        try:
            _call(cli.main, ["eval", *arguments])
        except SystemExit as error:
            raise DgmrError(
                f"clip_benchmark refused its arguments: {' '.join(noise.getvalue().splitlines()[-1:])}"
            ) from error
        except Exception as error:  # whatever a data set or a loader inside clip_benchmark raises
            raise DgmrError(
                f"clip_benchmark cannot evaluate {dataset} in {root}: {type(error).__name__}: {first_line(error)}"
            ) from error
    shutil.rmtree(features, ignore_errors=True)
    metrics = json.loads(aside.read_text())["metrics"]
    if rank == 0:
        os.replace(aside, output)
    else:
        aside.unlink()
    return metrics


def task_of(dataset: str, root: Path) -> str:
    """What a data set is for: a webdataset folder's ``dataset_type.txt`` says it, of the others clip_benchmark knows it."""
    if not dataset.startswith("wds/"):
        return require("clip_benchmark.datasets.builder", "eval").get_dataset_default_task(dataset)
    kind = root / "dataset_type.txt"
    return (
        "zeroshot_retrieval" if kind.exists() and kind.read_text().strip() == "retrieval" else "zeroshot_classification"
    )


def clip_benchmark(arguments: Sequence[str], load: Loader) -> None:
    """clip_benchmark's own command line with every argument as it is, and ``--model_type dgmr_tp`` known and the default.

    Raises:
        DgmrError: what clip_benchmark raised, in one sentence.
    """
    cli = require("clip_benchmark.cli", "eval")
    given = list(arguments)
    if given[:1] == ["eval"] and not any(argument.partition("=")[0] == "--model_type" for argument in given):
        given += ["--model_type", MODEL_TYPE]
    with registered(load):
        try:
            _call(cli.main, given)
        except DgmrError:
            raise
        except Exception as error:
            raise DgmrError(f"clip_benchmark: {type(error).__name__}: {first_line(error)}") from error


def tabulate(files: Iterable[Path], table: Path) -> None:
    """clip_benchmark's CSV of its JSON files, one row each."""
    cli = require("clip_benchmark.cli", "eval")
    aside = table.with_name(f".{table.name}.partial")
    cli.main_build(argparse.Namespace(files=[str(path) for path in files], output=str(aside)))
    os.replace(aside, table)


@contextlib.contextmanager
def registered(load: Loader) -> Iterator[None]:
    """clip_benchmark knows the model type ``dgmr_tp``, and a linear probe where there is no GPU."""
    cli, models = require("clip_benchmark.cli", "eval"), require("clip_benchmark.models", "eval")
    models.MODEL_TYPES.append(MODEL_TYPE)
    try:
        with (
            patch.dict(models.TYPE2FUNC, {MODEL_TYPE: load}),
            contextlib.nullcontext()
            if torch.cuda.is_available()
            else patch.object(cli.linear_probe, "evaluate", linear_probe),
        ):
            yield
    finally:
        models.MODEL_TYPES.remove(MODEL_TYPE)


def _call(main: Callable[[], None], arguments: Sequence[str]) -> None:
    with patch.object(sys, "argv", ["clip_benchmark", *arguments]):
        main()
