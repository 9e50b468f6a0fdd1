"""Validation of a training: its score on held-out images, and the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgmr_tp.data.images import Images
from dgmr_tp.distillation.checkpoints import report_write_errors
from dgmr_tp.distillation.data import evaluation_batches
from dgmr_tp.distillation.engine import current_device
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import check_embeddings
from dgmr_tp.utils.distributed import all_gather_rows, broadcast_from_main, get_world_size, is_main_process
from dgmr_tp.utils.files import atomic_write, read_json, sha256, to_json
from dgmr_tp.utils.knn import predict_classes

NUM_NEIGHBORS = 20
MIN_IMAGES_PER_CLASS = 10
"""Minimum mean number of held-out images a class for k-NN accuracy. With fewer, neighbors say little."""
BEST_MANIFEST = "best.json"
"""File with the score, the step and the SHA-256 of the best weights."""


class HeldOutSet:
    """Images that are not trained on, and the teacher's embeddings of them. Each process decodes its share.

    Args:
        images: all of them are used, except those that do not decode.
        preprocess: as for evaluation, without random crops.
        embed: maps a batch to the teacher's embeddings.
        image_shape: ``[channels, height, width]`` of a preprocessed image.
        batch_size: images in a batch.

    Raises:
        DgmrError: no image decodes, or an embedding is not finite.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Callable[[Any], Tensor],
        embed: Callable[[Tensor], Tensor],
        image_shape: Sequence[int],
        batch_size: int,
    ) -> None:
        world = get_world_size()
        count = -(-len(images) // world)
        self.batches, decoded = zip(*evaluation_batches(images, preprocess, image_shape, batch_size), strict=True)
        self.decoded = all_gather_rows(torch.cat(decoded).to(current_device()))
        indices = [index for first in range(world) for index in range(first, first + count * world, world)]
        names = [images.records[index if index < len(images) else 0].class_name() for index in indices]
        numbers = torch.tensor(
            np.unique([str(name) for name in names], return_inverse=True)[1], device=current_device()
        )
        if not self.decoded.any():
            raise DgmrError(
                f"none of the {len(images)} held-out images can be read. Repair them, or hold out more images."
            )
        too_few = None in names or len(set(names)) < 2 or len(images) < MIN_IMAGES_PER_CLASS * len(set(names))
        self.classes = None if too_few else numbers[self.decoded]
        self.teacher_embeddings = self._embed_all(embed)

    def scores(self, embed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return how close the student is to the teacher. Every process must call it, and all get the same.

        Args:
            embed: maps a batch to the student's embeddings.

        Returns:
            ``score``: the mean cosine of the student's embeddings to the teacher's. ``knn``: the leave-one-out accuracy
            of a 20-nearest-neighbor classifier, if all images have a class and there are enough of each.
        """
        embeddings = self._embed_all(embed)
        cosine = float(F.cosine_similarity(embeddings, self.teacher_embeddings).double().mean())
        scores = {"score": cosine, **self._knn_accuracy(embeddings)}
        # Different processors differ in the last bit, and all processes must take the same decision.
        return broadcast_from_main(lambda: scores)

    @property
    def teacher_scores(self) -> dict[str, float]:
        """The teacher's own ``knn``; empty where it is not measured."""
        return self._knn_accuracy(self.teacher_embeddings)

    @torch.no_grad()
    def _embed_all(self, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the embeddings of the images of all processes that decode."""
        embeddings = all_gather_rows(torch.cat([embed(batch).float() for batch in self.batches]))[self.decoded]
        return check_embeddings(embeddings, "the held-out images")

    def _knn_accuracy(self, embeddings: Tensor) -> dict[str, float]:
        if self.classes is None:
            return {}
        rows = torch.arange(len(embeddings), device=embeddings.device)
        [predictions] = predict_classes(embeddings, self.classes, embeddings, (NUM_NEIGHBORS,), own_rows=rows)
        return {"knn": float((predictions == self.classes).double().mean())}


def describe_fall(scores: Sequence[tuple[int, float]]) -> str | None:
    """Return a warning if the first evaluation of a training is below the score before it.

    Args:
        scores: step and score of every evaluation so far. The first one is before the training, at step 0.
    """
    if len(scores) < 2 or scores[0][0] != 0 or scores[1][1] >= scores[0][1]:
        return None
    (_, before), (step, after) = scores[:2]
    return (
        f"the held-out score fell from {before:.4f} to {after:.4f} in the first {step} steps. If it does not rise "
        "above the start again, set a lower base_lr"
    )


def describe_result(scores: Sequence[tuple[int, float]], best_step: int) -> str:
    """Return a sentence on the step whose weights are the result of a training.

    Args:
        scores: step and score of every evaluation.
        best_step: the step; 0 if the model before the training is the result.
    """
    by_step = dict(scores)
    start, best = by_step.get(0, math.nan), by_step.get(best_step, math.nan)
    if best_step == 0:
        return f"the start was kept: no step improved its score of {start:.4f} on the held-out images"
    return (
        f"step {best_step} of {max(by_step)} was kept: its held-out score is {best:.4f}, after {start:.4f} at the start"
    )


class BestWeights:
    """The weights with the highest score so far, in a file next to the checkpoints. A damaged file is ignored.

    Args:
        directory: folder of the file and of its manifest.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, directory / BEST_MANIFEST
        self.score, self.step = broadcast_from_main(self._read)

    def _read(self) -> tuple[float, int]:
        try:
            if self.manifest.exists():
                score, step, digest = read_json(
                    self.manifest,
                    lambda entry: (float(entry["score"]), int(entry["step"]), entry["sha256"]),
                    remedy="It is ignored.",
                )
                if self._file(step).exists() and digest == sha256(self._file(step)):
                    return score, step
                print(f"  the best weights so far, of step {step}, are damaged and are ignored", flush=True)
        except DgmrError as error:
            print(f"  the best weights so far are lost: {error}", flush=True)
        return -float("inf"), -1

    def update(self, score: float, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Save ``weights`` if ``score`` is higher than before. Every process must call it; rank 0 writes."""
        if not score > self.score:
            return
        self.score, self.step = score, step
        tensors = {name: value.cpu().contiguous() for name, value in weights if is_main_process()}
        with report_write_errors(self._file(step)):
            if tensors:
                self.directory.mkdir(parents=True, exist_ok=True)
                save_file(tensors, self._file(step))
                entry = {"score": score, "step": step, "sha256": sha256(self._file(step))}
                atomic_write(self.manifest, to_json(entry))
                for other in self.directory.glob(self._file("*").name):
                    if other != self._file(step):
                        other.unlink()

    def load(self) -> dict[str, Tensor]:
        """Return the best weights by parameter name."""
        return load_file(self._file(self.step))

    def _file(self, step: object) -> Path:
        return self.directory / f"best-{step}.safetensors"
