"""clip_benchmark's functions with checks: its data sets are read by our reader, and labels, names and prompts match.

Our evaluations and ``dgmr-tp clip_benchmark`` both run inside :func:`checked_metrics`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dgmr_tp.data.labels import check_class_names, check_label_range, check_prompts
from dgmr_tp.errors import DgmrError
from dgmr_tp.evaluation.shards import Shards, dataset_kind
from dgmr_tp.utils.lazy_imports import require


@contextlib.contextmanager
def checked_metrics(origin: str) -> Iterator[None]:
    """Replace clip_benchmark's reader of webdatasets, and check what its zero-shot classification gets and gives.

    Args:
        origin: name of the data set in messages.
    """
    builder = require("clip_benchmark.datasets.builder", "eval")
    metric = require("clip_benchmark.metrics.zeroshot_classification", "eval")
    read, evaluate = builder.build_wds_dataset, metric.evaluate
    embed_classes, classify = metric.zero_shot_classifier, metric.run_classification

    def read_checked(name: str, transform: Any, split: str = "test", data_dir: str = "root", **options: Any) -> Any:
        if "://" in data_dir or dataset_kind(Path(data_dir)) == "multilabel":
            return read(name, transform, split=split, data_dir=data_dir, **options)
        return Shards(Path(data_dir), split, transform)

    def embed_classes_checked(model: Any, tokenizer: Any, names: Any, prompts: Any, *options: Any, **more: Any) -> Any:
        check_class_names(names, origin)
        check_prompts(prompts, names, origin)
        return embed_classes(model, tokenizer, names, prompts, *options, **more)

    def classify_checked(model: Any, classifier: Tensor, loader: Any, *options: Any, **more: Any) -> Any:
        logits, labels = classify(model, classifier, loader, *options, **more)
        if not logits.isfinite().all():
            raise DgmrError("the encoder's outputs are not finite. Check its weights, or run it in float32.")
        if labels.ndim == 1:
            check_label_range(labels.unique().tolist(), logits.shape[1], origin)
        return logits, labels

    def evaluate_checked(*arguments: Any, **options: Any) -> dict[str, float]:
        metrics = evaluate(*arguments, **options)
        return {name: value for name, value in metrics.items() if not math.isnan(value)}  # acc5 of fewer than 5 classes

    with (
        patch.object(builder, "build_wds_dataset", read_checked),
        patch.object(metric, "zero_shot_classifier", embed_classes_checked),
        patch.object(metric, "run_classification", classify_checked),
        patch.object(metric, "evaluate", evaluate_checked),
    ):
        yield
