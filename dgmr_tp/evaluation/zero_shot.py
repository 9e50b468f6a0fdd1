"""The bridge to clip_benchmark: its own command line, run in this process, with one more model type registered.

clip_benchmark has no plug-ins, but the dictionary of its loaders is shared with its command line. Everything it computes
and writes is its own; amp is always off, so that formats and models compare.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.extras import require

RECALLS = ("1", "5", "10")
MODEL_TYPE = "dgmr_tp"


class CLIPWithEncoder(nn.Module):
    """A CLIP whose image encoder is something else, such as an exported file; text goes through the CLIP's own tower."""

    def __init__(self, clip: nn.Module, encode_image: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.clip = clip
        self.encode_image = encode_image

    def encode_text(self, text: Tensor) -> Tensor:
        return self.clip.encode_text(text)  # type: ignore[operator]


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
    batch_size: int = 64,
) -> dict[str, float]:
    """Evaluate zero-shot classification or retrieval with clip_benchmark and keep its JSON file.

    Args:
        model: has ``encode_image`` and ``encode_text``.
        preprocess, tokenizer: the model's own.
        dataset: a clip_benchmark data set, such as ``wds/NAME`` for a webdataset folder.
        root: where it lies.
        output: the JSON file; its folder is made.
        name: what the file calls the model.
        task: ``zeroshot_classification``, ``zeroshot_retrieval``, or ``auto``: by the folder's ``dataset_type.txt``.
        annotations: the caption file of data sets such as ``mscoco_captions`` and ``flickr30k``.
        batch_size: images a step.

    Returns:
        The metrics of the JSON file, such as ``acc1`` or ``text_retrieval_recall@5``, as fractions.

    Raises:
        DgmrError: the model has no text tower, or the data set cannot be read.
    """
    cli = require("clip_benchmark.cli", "eval")
    loaders = require("clip_benchmark.models", "eval")
    if tokenizer is None or not hasattr(model, "encode_text"):
        raise DgmrError(f"{name} has no text tower; zero-shot evaluation needs a CLIP")
    root = Path(root)
    if not root.is_dir():
        raise DgmrError(f"the data set folder {root} does not exist")
    if task == "auto":
        kind = root / "dataset_type.txt"
        task = "zeroshot_retrieval" if kind.exists() and kind.read_text().strip() == "retrieval" else "zeroshot_classification"
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.partial")
    arguments = [
        "eval",
        "--model_type",
        MODEL_TYPE,
        "--model",
        name,
        "--pretrained",
        "none",
        "--dataset",
        dataset,
        "--dataset_root",
        str(root),
    ]
    arguments += ["--task", task, "--no_amp", "--recall_k", *RECALLS, "--batch_size", str(batch_size), "--num_workers", "0"]
    arguments += ["--output", str(aside), "--quiet", *(["--annotation_file", str(annotations)] if annotations else [])]
    device = next(model.parameters()).device if any(True for _ in model.parameters()) else torch.device("cpu")
    with (
        patch.dict(loaders.TYPE2FUNC, {MODEL_TYPE: lambda **_: (model, preprocess, tokenizer)}),
        _listed(loaders.MODEL_TYPES, MODEL_TYPE),
        patch.object(sys, "argv", ["clip_benchmark", *arguments]),
        patch.object(torch.cuda, "is_available", lambda: device.type == "cuda"),
        contextlib.nullcontext(io.StringIO()) if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()) as noise,
    ):
        try:
            cli.main()
        except SystemExit as error:
            raise DgmrError(f"clip_benchmark refused its arguments: {' '.join(noise.getvalue().splitlines()[-1:])}") from error
        except Exception as error:  # whatever a data set or a loader inside clip_benchmark raises
            raise DgmrError(f"clip_benchmark cannot evaluate {dataset} in {root}: {type(error).__name__}: {error}") from error
    os.replace(aside, output)
    return json.loads(output.read_text())["metrics"]


@contextlib.contextmanager
def _listed(values: list[str], value: str) -> Iterator[None]:
    values.append(value)
    try:
        yield
    finally:
        values.remove(value)
