"""Must an index of old embeddings be rebuilt? Old and new embeddings of the same images, compared by what a search returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgmr_tp.errors import DgmrError
from dgmr_tp.extras import require

PERCENTILES = (1, 5, 25, 50, 75)
NEAR, FAR = 10, 100
MANY = 500
"""Images of an index from which on its first 100 mean something."""
WORST = 8
CHUNK = 65536
"""Embeddings that are worked on at a time."""
FEWEST = 100
"""Images that a comparison needs."""
WAYS = {"new queries, old index": ("new", "old"), "old queries, new index": ("old", "new"), "new queries, new index": ("new", "new")}
VERDICTS = ("keep the index", "re-embed when convenient", "re-embed before you deploy")


@dataclass(frozen=True)
class Limits:
    """From which score on an index is kept, or may wait; between 0 and 1."""

    keep: float = 0.98
    convenient: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.convenient <= self.keep <= 1:
            raise DgmrError(f"the limits must rise from convenient to keep, between 0 and 1: {self.convenient}, {self.keep}")

    def place(self, score: float) -> int:
        """Of the verdict, in :data:`VERDICTS`."""
        return 0 if score >= self.keep else 1 if score >= self.convenient else 2


def compatibility(
    old: Tensor, new: Tensor, *, classifier: Tensor | None = None, queries: int = 1000, limits: Limits | None = None, seed: int = 0
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
        raise DgmrError(f"old embeddings are {list(old.shape)}, new ones {list(new.shape)}: these cannot share an index; re-embed")
    if len(old) < FEWEST:
        raise DgmrError(f"{len(old)} images; a comparison needs at least {FEWEST}")
    if classifier is not None and classifier.shape[0] != old.shape[1]:
        raise DgmrError(f"class embeddings are {list(classifier.shape)}; they must be [{old.shape[1]}, classes] for these encoders")
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
