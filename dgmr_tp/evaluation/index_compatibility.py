"""Must an index of old embeddings be rebuilt? Old and new embeddings of the same images, compared by what a search returns."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgmr_tp.data.embeddings import embed_share
from dgmr_tp.data.images import Images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.utils.lazy_imports import require

PERCENTILES = (1, 5, 25, 50, 75)
NEAR, FAR = 10, 100
MANY = 500
"""Images of an index from which on its first 100 mean something."""
WORST = 8
CHUNK = 65536
"""Embeddings that are worked on at a time."""
FEWEST = 100
"""Images that a comparison needs."""
WAYS = {
    "new queries, old index": ("new", "old"),
    "old queries, new index": ("old", "new"),
    "new queries, new index": ("new", "new"),
}
THUMBNAIL = 112
"""Pixels of the longer side."""
PROMPTS = "zeroshot_classification_templates.txt"
VERDICTS = ("keep the index", "re-embed when convenient", "re-embed before you deploy")


@dataclass(frozen=True)
class Limits:
    """From which score on an index is kept, or may wait; between 0 and 1."""

    keep: float = 0.98
    convenient: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.convenient <= self.keep <= 1:
            raise DgmrError(
                f"the limits must rise from convenient to keep, between 0 and 1: {self.convenient}, {self.keep}"
            )

    def place(self, score: float) -> int:
        """Of the verdict, in :data:`VERDICTS`."""
        return 0 if score >= self.keep else 1 if score >= self.convenient else 2


def compatibility(
    old: Tensor,
    new: Tensor,
    *,
    classifier: Tensor | None = None,
    queries: int = 1000,
    limits: Limits | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two encoders by their embeddings of the same images.

    A random part of the images are queries, the others are the index; what old queries find in the old index is what users get today.
    The neighbour search is faiss's exact one by cosine.

    Args:
        old, new: ``[n, width]`` of any float type, row by row of the same images, n ≥ 100.
        classifier: class embeddings of the *old* text tower, float32 ``[width, classes]``: zero-shot decisions are compared too.
        queries: how many images ask, at most half of them.
        limits: of the verdict.
        seed: draws the queries.

    Returns:
        ``images``, ``queries``; ``cosine`` between old and new: ``mean`` and percentiles; ``worst``: rows of the lowest cosines;
        ``ways``: for new queries in the old index, old ones in the new, and new ones in the new (after re-embedding everything):
        ``overlap@10`` and ``overlap@100`` with today's neighbours (the second None in an index of less than 500), and ``recall@10``, how
        often today's first neighbour is among ten; ``agreement`` of the zero-shot decisions, None without a classifier; ``score``, the
        lowest of the agreement and the recalls of the two mixed ways, ``limits``, and the ``verdict`` with its ``place`` among the three.

    Raises:
        DgmrError: widths or numbers of images differ, too few images, embeddings that are not finite, or a classifier of another width.
    """
    limits = limits or Limits()
    if old.shape != new.shape:
        raise DgmrError(
            f"old embeddings are {list(old.shape)}, new ones {list(new.shape)}: these cannot share an index; re-embed"
        )
    if len(old) < FEWEST:
        raise DgmrError(f"{len(old)} images; a comparison needs at least {FEWEST}")
    if classifier is not None and classifier.shape[0] != old.shape[1]:
        raise DgmrError(
            f"class embeddings are {list(classifier.shape)}; they must be [{old.shape[1]}, classes] for these encoders"
        )
    cosines, alike = [], []
    for before, after in zip(old.split(CHUNK), new.split(CHUNK), strict=True):
        before, after = before.float(), after.float()
        if not bool(before.isfinite().all() and after.isfinite().all()):
            raise DgmrError("there are embeddings that are not finite")
        cosines.append(F.cosine_similarity(before, after))
        if classifier is not None:
            alike.append((before @ classifier).argmax(1) == (after @ classifier).argmax(1))
    order = np.random.default_rng(seed).permutation(len(old))
    asked, indexed = np.split(order, [min(queries, len(old) // 2)])
    rows = {"old": old, "new": new}
    found = {}
    for answering in rows:
        index = _index(rows[answering], indexed)
        for asking in rows:
            found[asking, answering] = index.search(_unit(rows[asking], asked), min(FAR, len(indexed)))[1]
    today = found["old", "old"]
    ways: dict[str, dict[str, Any]] = {
        name: {
            f"overlap@{NEAR}": _overlap(today[:, :NEAR], found[way][:, :NEAR]),
            f"overlap@{FAR}": _overlap(today, found[way]) if len(indexed) >= MANY else None,
            f"recall@{NEAR}": float((found[way][:, :NEAR] == today[:, :1]).any(1).mean()),
        }
        for name, way in WAYS.items()
    }
    agreement = None if classifier is None else float(torch.cat(alike).float().mean())
    mixed = [ways[name][f"recall@{NEAR}"] for name in WAYS if name != "new queries, new index"]
    score = min(mixed if agreement is None else [*mixed, agreement])
    values = torch.cat(cosines).numpy()
    return {
        "images": len(old),
        "queries": len(asked),
        "cosine": {"mean": float(values.mean()), **{f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}},
        "worst": [{"row": int(row), "cosine": float(values[row])} for row in values.argsort()[:WORST]],
        "ways": ways,
        "agreement": agreement,
        "score": score,
        "limits": {"keep": limits.keep, "convenient": limits.convenient},
        "place": limits.place(score),
        "verdict": VERDICTS[limits.place(score)],
    }


def _index(rows: Tensor, indexed: np.ndarray) -> Any:
    """faiss's exact index of the cosines with ``rows[indexed]``, filled by chunks: a million embeddings are held once, not thrice."""
    flat = require("faiss", "eval").IndexFlatIP(rows.shape[1])
    for start in range(0, len(indexed), CHUNK):
        flat.add(_unit(rows, indexed[start : start + CHUNK]))
    return flat


def _unit(rows: Tensor, places: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(rows[places].float(), dim=-1).numpy())


def _overlap(before: np.ndarray, after: np.ndarray) -> float:
    """The mean share of the first that are among the second, per row."""
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(before.tolist(), after.tolist(), strict=True)]))


class Side(NamedTuple):
    """One of the two encoders."""

    embed: Callable[[Tensor], Tensor]
    """Preprocessed images to embeddings."""
    preprocess: Callable[[Any], Tensor]
    """A PIL image to a tensor."""


def survey(
    old: Side,
    new: Side,
    images: str | Path,
    *,
    classifier: Tensor | None = None,
    count: int = 5000,
    queries: int = 1000,
    limits: Limits | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Embed the same images by both encoders and compare.

    Args:
        old: the encoder of the index; new: the one that is to be served.
        images: a folder, a tar or shards of images like those in the index.
        classifier: class embeddings, see :func:`text_classifier`; None: decisions are not compared.
        count: how many of the images, drawn by ``seed``.
        queries, limits: see :func:`~dgmr_tp.evaluation.index_compatibility.compatibility`.
        device, workers: where images are embedded and how many processes read them.

    Returns:
        What ``compatibility`` returns; the ``worst`` images have their ``name`` and a ``thumbnail``, a data URI. ``left_out`` is the number
        of images that do not decode.

    Raises:
        DgmrError: no images, or as ``compatibility``.
    """
    found = Images.find(images)
    if len(found) > count:
        found, _ = found.split(count, seed)
    how: dict[str, Any] = {"device": device, "workers": workers}
    before, places = embed_share(*old, found, title="old embeddings", **how)
    after, _ = embed_share(*new, found, title="new embeddings", **how)
    result = compatibility(before.cpu(), after.cpu(), classifier=classifier, queries=queries, limits=limits, seed=seed)
    result["left_out"] = len(found.broken)
    for worst in result["worst"]:
        record = found.records[int(places[worst.pop("row")])]
        worst |= {"name": record.name, "thumbnail": _thumbnail(record.read())}
    return result


def text_classifier(model: OpenedModel, classes: Path) -> Tensor:
    """Class embeddings ``[width, classes]`` of a model's text tower, as clip_benchmark makes them.

    Args:
        model: a CLIP.
        classes: a text file with a class name a line; a folder with ``classnames.txt`` and, if there are prompts,
            ``zeroshot_classification_templates.txt`` (``a photo of a {c}``); or class embeddings that clip_benchmark saved (``.pt``).

    Raises:
        DgmrError: the file cannot be read, or the model has no text tower.
    """
    if classes.suffix == ".pt":
        return saved_classifier(classes)
    tower = model.text
    if model.tokenizer is None or tower is None:
        raise DgmrError(f"{model.name} has no text tower for the classes of {classes}")
    names, prompts = (
        (classes / "classnames.txt", classes / PROMPTS) if classes.is_dir() else (classes, classes.with_name(PROMPTS))
    )
    try:
        lines = [line.strip() for line in names.read_text("utf-8").splitlines() if line.strip()]
        templates = (
            [line for line in prompts.read_text("utf-8").splitlines() if "{c}" in line] if prompts.exists() else []
        )
    except (OSError, UnicodeDecodeError) as error:
        raise DgmrError(f"cannot read the class names {names}: {first_line(error)}") from error
    if len(lines) < 2:
        raise DgmrError(f"{names} names {len(lines)} classes; decisions need at least two, one a line")
    metric = require("clip_benchmark.metrics.zeroshot_classification", "eval")
    device = next(tower.parameters()).device.type
    model.module.eval()  # text towers with dropout
    prompts_or_one = templates or ["a photo of a {c}."]
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return (
            metric.zero_shot_classifier(tower, model.tokenizer, lines, prompts_or_one, device, amp=False).float().cpu()
        )


def saved_classifier(path: Path) -> Tensor:
    """Class embeddings ``[width, classes]`` as clip_benchmark's ``--save_clf`` keeps them."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True).float()
    except Exception as error:  # pickle and torch raise many kinds
        raise DgmrError(f"cannot read the class embeddings {path}: {first_line(error)}") from error


def _thumbnail(image: Any) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
