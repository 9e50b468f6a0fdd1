"""Decide whether an index of old embeddings can be kept, by comparing what old and new embeddings retrieve.

:func:`compare_embeddings` works on two arrays of embeddings of the same images. :func:`compare_encoders` computes the
arrays first. Both return the figures and a verdict. They know nothing about the model that made the embeddings.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from dgmr_tp.data.embeddings import embed_share
from dgmr_tp.data.images import Images, describe_skipped
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.utils.config import Config, DataPath
from dgmr_tp.utils.lazy_imports import require

MIN_IMAGES = 100
PERCENTILES = (1, 5, 25, 50, 75)
NUM_WORST = 8
"""Number of images with the lowest cosines to report."""
NEIGHBORS, MANY_NEIGHBORS = 10, 100
MIN_INDEX_FOR_MANY = 500
"""Minimum index size for the overlap of the first 100 neighbors, which is not informative in a smaller one."""
CHUNK_ROWS = 65536
"""Number of embeddings to convert to float32 at a time."""
THUMBNAIL_PIXELS = 112
"""Longer side of a thumbnail."""
WAYS = {
    "new queries, old index": ("new", "old"),
    "old queries, new index": ("old", "new"),
    "new queries, new index": ("new", "new"),
}
"""Searches that are compared with old queries in the old index: the encoder of the queries and of the index."""
REEMBEDDED = "new queries, new index"
VERDICTS = ("keep the index", "re-embed when convenient", "re-embed before you deploy")


class Thresholds(Config):
    """Minimum scores of the verdicts."""

    keep: float = Field(default=0.98, ge=0, le=1)
    """Minimum score at which the index can be kept."""
    convenient: float = Field(default=0.9, ge=0, le=1)
    """Minimum score at which re-embedding can be deferred."""

    @model_validator(mode="after")
    def _check_order(self) -> Thresholds:
        if self.convenient > self.keep:
            raise ValueError(
                f"convenient = {self.convenient} is above keep = {self.keep}. Lower convenient or raise keep."
            )
        return self

    def place(self, score: float) -> int:
        """Return the index in :data:`VERDICTS` of the verdict for a score."""
        if score >= self.keep:
            return 0
        return 1 if score >= self.convenient else 2


class CompareConfig(Thresholds):
    """Compatibility of the pruned encoder with an index of the dense encoder's embeddings.

    See :func:`dgmr_tp.evaluation.index_compatibility.compare_encoders`.
    """

    images: Annotated[str, DataPath()]
    """Images like those in the index: a directory, a tar file, or a directory of tar files."""
    classes: Annotated[str | None, DataPath()] = None
    """Class names to compare zero-shot decisions: a text file, a directory with ``classnames.txt``, or class embeddings
    that clip_benchmark saved (``.pt``)."""
    count: int = Field(5000, ge=MIN_IMAGES)
    """Number of images to use."""
    queries: int = Field(1000, ge=1)
    """Number of these images that are queries. The others form the index."""
    workers: int = Field(0, ge=0)
    """Number of processes that read images."""


class ComparedEncoder(NamedTuple):
    """An encoder to compare."""

    embed: Callable[[Tensor], Tensor]
    """Maps preprocessed images to embeddings."""
    preprocess: Callable[[Any], Tensor]
    """Maps a PIL image to a tensor."""


def compare_embeddings(
    old: Tensor,
    new: Tensor,
    *,
    classifier: Tensor | None = None,
    queries: int = 1000,
    thresholds: Thresholds | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two encoders by their embeddings of the same images.

    Random images become queries and the others form the index. The reference is what old queries retrieve from the old
    index. The search is faiss's exact search by cosine.

    Args:
        old, new: embeddings of the same images in the same order, ``[n, width]`` of any float dtype, n ≥ 100.
        classifier: class embeddings of the *old* text tower, float32 ``[width, classes]``, to compare zero-shot
            decisions too.
        queries: number of queries, limited to half of the images.
        thresholds: minimum scores of the verdicts.
        seed: seed of the choice of queries.

    Returns:
        - ``images``, ``queries``: their numbers.
        - ``cosine``: between old and new embeddings, ``mean`` and percentiles. ``worst``: rows with the lowest cosines.
        - ``ways``: for each search of :data:`WAYS`, ``overlap@10`` and ``overlap@100``, the share of the reference
          neighbors that it retrieves (the second is None for an index below 500), and ``recall@10``, how often the
          first reference neighbor is among the first ten.
        - ``agreement``: share of equal zero-shot decisions, None without a classifier.
        - ``score``: the minimum of the agreement and of the recall of the two mixed searches.
        - ``limits``: the thresholds. ``verdict``: one of :data:`VERDICTS`. ``place``: its index.

    Raises:
        DgmrError: the shapes differ, there are fewer than 100 images, an embedding is not finite, or the classifier has
            another width.
    """
    thresholds = thresholds or Thresholds()
    _check_shapes(old, new, classifier)
    _check_rows(old, "the old encoder")
    _check_rows(new, "the new encoder")
    cosines, agreement = _cosines_and_agreement(old, new, classifier)
    order = np.random.default_rng(seed).permutation(len(old))
    query_rows, index_rows = np.split(order, [min(queries, len(old) // 2)])
    neighbors = _search({"old": old, "new": new}, query_rows, index_rows)
    reference = neighbors["old", "old"]
    has_large_index = len(index_rows) >= MIN_INDEX_FOR_MANY
    ways: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        first = neighbors[way][:, :NEIGHBORS]
        ways[name] = {
            f"overlap@{NEIGHBORS}": _overlap(reference[:, :NEIGHBORS], first),
            f"overlap@{MANY_NEIGHBORS}": _overlap(reference, neighbors[way]) if has_large_index else None,
            f"recall@{NEIGHBORS}": float((first == reference[:, :1]).any(1).mean()),
        }
    scores = [figures[f"recall@{NEIGHBORS}"] for name, figures in ways.items() if name != REEMBEDDED]
    score = min(scores if agreement is None else [*scores, agreement])
    percentiles = {f"p{p}": float(np.percentile(cosines, p)) for p in PERCENTILES}
    return {
        "images": len(old),
        "queries": len(query_rows),
        "cosine": {"mean": float(cosines.mean()), **percentiles},
        "worst": [{"row": int(row), "cosine": float(cosines[row])} for row in cosines.argsort()[:NUM_WORST]],
        "ways": ways,
        "agreement": agreement,
        "score": score,
        "limits": {"keep": thresholds.keep, "convenient": thresholds.convenient},
        "place": thresholds.place(score),
        "verdict": VERDICTS[thresholds.place(score)],
    }


def compare_encoders(
    old: ComparedEncoder,
    new: ComparedEncoder,
    images: str | Path,
    *,
    classifier: Tensor | None = None,
    count: int = 5000,
    queries: int = 1000,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Embed the same images with both encoders and compare the embeddings.

    Args:
        old: the encoder of the index.
        new: the encoder to deploy.
        images: a directory, a tar file, or a directory of tar files, with images like those in the index.
        classifier, queries, thresholds: see :func:`compare_embeddings`.
        count: number of images, drawn at random.
        seed: seed of the choice of images and queries.
        device: device of the encoders.
        workers: number of processes that read images.

    Returns:
        The result of :func:`compare_embeddings`, in which the ``worst`` images have a ``name`` and a ``thumbnail`` (a
        data URI) instead of a row. ``left_out`` is the number of images that could not be decoded, and ``skipped``
        lines on everything that was skipped, or None.

    Raises:
        DgmrError: there are no images, or as :func:`compare_embeddings`.
    """
    sample = Images.find(images)
    if len(sample) > count:
        sample, _ = sample.split(count, seed)
    options: dict[str, Any] = {"device": device, "workers": workers}
    old_rows, places = embed_share(*old, sample, title="old embeddings", **options)
    new_rows, _ = embed_share(*new, sample, title="new embeddings", **options)
    result = compare_embeddings(
        old_rows.cpu(), new_rows.cpu(), classifier=classifier, queries=queries, thresholds=thresholds, seed=seed
    )
    result["left_out"], result["skipped"] = len(sample.broken), describe_skipped(sample.broken, sample.others)
    for worst in result["worst"]:
        record = sample.records[int(places[worst.pop("row")])]
        worst |= {"name": record.name, "thumbnail": _thumbnail(record.read())}
    return result


def _check_shapes(old: Tensor, new: Tensor, classifier: Tensor | None) -> None:
    if len(old) != len(new):
        raise DgmrError(
            f"there are {len(old)} old embeddings and {len(new)} new ones, so they are not of the same images. Embed "
            "the same images with both encoders, in the same order."
        )
    if old.shape != new.shape:
        raise DgmrError(
            f"the old embeddings are {list(old.shape)} and the new ones {list(new.shape)}, so they cannot share an "
            "index. Re-embed the images."
        )
    if len(old) < MIN_IMAGES:
        raise DgmrError(f"there are {len(old)} images, and a comparison needs at least {MIN_IMAGES}. Give more images.")
    if classifier is not None and classifier.shape[0] != old.shape[1]:
        raise DgmrError(
            f"the class embeddings are {list(classifier.shape)}, and these encoders need [{old.shape[1]}, classes]. "
            "Use the class embeddings of the old encoder's text tower."
        )


def _check_rows(embeddings: Tensor, encoder: str) -> None:
    """Raise DgmrError if an embedding is not finite or has no direction, or if all embeddings are the same."""
    constant = True
    for number, chunk in enumerate(embeddings.split(CHUNK_ROWS)):
        check_embeddings(chunk.float(), encoder)
        zeros = (chunk == 0).all(1).nonzero()
        if len(zeros):
            row = number * CHUNK_ROWS + int(zeros[0])
            raise DgmrError(
                f"the embedding of image {row} by {encoder} is all zeros, which has no direction. Leave the image out "
                "or embed it again."
            )
        constant = constant and bool((chunk == embeddings[0]).all())
    if constant:
        raise DgmrError(
            f"all embeddings of {encoder} are the same, so that no search can tell images apart. Check the encoder and "
            "the images."
        )


def _cosines_and_agreement(old: Tensor, new: Tensor, classifier: Tensor | None) -> tuple[np.ndarray, float | None]:
    """Return the cosine of each image's embeddings, and the share of equal zero-shot decisions."""
    cosines, equal = [], []
    for old_chunk, new_chunk in zip(old.split(CHUNK_ROWS), new.split(CHUNK_ROWS), strict=True):
        old_chunk, new_chunk = _unit(old_chunk), _unit(new_chunk)
        cosines.append((old_chunk * new_chunk).sum(1))
        if classifier is not None:
            equal.append((old_chunk @ classifier).argmax(1) == (new_chunk @ classifier).argmax(1))
    agreement = None if classifier is None else float(torch.cat(equal).float().mean())
    return torch.cat(cosines).numpy(), agreement


def _search(
    embeddings: dict[str, Tensor], query_rows: np.ndarray, index_rows: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """Return the neighbors of all queries in all indices, ``[queries, 100]``, by (query encoder, index encoder)."""
    neighbors = {}
    for index_encoder, rows in embeddings.items():
        index = _faiss_index(rows, index_rows)
        for query_encoder in embeddings:
            queries = _unit_rows(embeddings[query_encoder], query_rows)
            neighbors[query_encoder, index_encoder] = index.search(queries, min(MANY_NEIGHBORS, len(index_rows)))[1]
    return neighbors


def _faiss_index(embeddings: Tensor, rows: np.ndarray) -> Any:
    """Return faiss's exact cosine index of some rows. Filling it in chunks avoids a second float32 copy of all rows."""
    index = require("faiss", "eval").IndexFlatIP(embeddings.shape[1])
    for start in range(0, len(rows), CHUNK_ROWS):
        index.add(_unit_rows(embeddings, rows[start : start + CHUNK_ROWS]))
    return index


def _unit_rows(embeddings: Tensor, rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(_unit(embeddings[rows]).numpy())


def _unit(rows: Tensor) -> Tensor:
    """Return rows of length 1 in float32, scaled first, because their squares may be out of float32's range."""
    rows = rows.float()
    return F.normalize(rows / rows.abs().amax(1, keepdim=True), dim=-1)


def _overlap(reference: np.ndarray, neighbors: np.ndarray) -> float:
    """Return the mean share, per row, of the reference neighbors that are among the neighbors."""
    pairs = zip(reference.tolist(), neighbors.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs]))


def _thumbnail(image: Any) -> str:
    """Return a small JPEG of the image as a data URI."""
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
