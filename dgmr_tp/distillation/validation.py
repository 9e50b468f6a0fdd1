"""The score of a training on images that it does not see, and the best weights so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgmr_tp.data.images import Images
from dgmr_tp.distillation.checkpoints import writing
from dgmr_tp.distillation.engine import device_here
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import all_gather_rows, broadcast_from_main, get_rank, get_world_size, is_main_process
from dgmr_tp.utils.files import sha256, write_whole
from dgmr_tp.utils.knn import QUERIES, nearest, vote

NEIGHBOURS = 20
PER_CLASS = 10
"""Images of a class, in the mean, with fewer of which neighbours tell little."""
BEST = "best.json"
"""Which file holds the best weights, and its SHA-256."""


class HeldOut:
    """Images that are not trained on, and the teacher's embeddings of them: this process's share.

    Args:
        images: all of them are used; those that do not decode do not count.
        preprocess: as for evaluation; no crop is random.
        embed: the teacher's embeddings of a batch.
        image_size: height and width of the images.
        size: images of a batch.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Callable[[Any], Tensor],
        embed: Callable[[Tensor], Tensor],
        image_size: int,
        size: int,
    ) -> None:
        rank, world = get_rank(), get_world_size()
        # All processes take the same number of batches, because parameters may be gathered for each.
        count = -(-len(images) // world)
        pictures, decoded = torch.zeros(count, 3, image_size, image_size), torch.zeros(count, dtype=torch.bool)
        for row, place in enumerate(range(rank, len(images), world)):
            if (image := images.read(place)) is not None:
                pictures[row], decoded[row] = preprocess(image), True
        self.batches = pictures.split(size)
        self.decoded = all_gather_rows(decoded.to(device_here()))
        places = [
            place if place < len(images) else 0
            for first in range(world)
            for place in range(first, first + count * world, world)
        ]
        names = [images.records[place].class_name() for place in places]
        numbers = torch.tensor(np.unique([str(name) for name in names], return_inverse=True)[1], device=device_here())
        if not self.decoded.any():
            raise DgmrError(f"none of the {len(images)} images held out can be read; repair them, or hold out more")
        self.classes = None if None in names or len(images) < PER_CLASS * len(set(names)) else numbers[self.decoded]
        self.wanted = self._embedded(embed)

    def scores(self, embed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``score``, the mean cosine of the student's embeddings to the teacher's, and ``knn`` where all images have a class, and enough
        of them the same: the share whose 20 nearest others tell it. Every process has to call it."""
        found = self._embedded(embed)
        scores = {"score": float(F.cosine_similarity(found, self.wanted).double().mean()), **self._told(found)}
        return broadcast_from_main(
            lambda: scores
        )  # processors of other kinds differ in the last bit, and all have to decide alike

    @property
    def original(self) -> dict[str, float]:
        """The teacher's own ``knn``."""
        return self._told(self.wanted)

    @torch.no_grad()
    def _embedded(self, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The embeddings of all processes' images that decode."""
        return all_gather_rows(torch.cat([embed(batch).float() for batch in self.batches]))[self.decoded]

    def _told(self, found: Tensor) -> dict[str, float]:
        if self.classes is None:
            return {}
        right = []
        for mine in torch.arange(len(found), device=found.device).split(QUERIES):
            similar, index = nearest(found, found[mine], NEIGHBOURS + 1)
            similar = similar.masked_fill(index == mine[:, None], -torch.inf)  # itself has no vote
            right.append(vote(similar, self.classes[index], int(self.classes.max()) + 1) == self.classes[mine])
        return {"knn": float(torch.cat(right).double().mean())}


class Best:
    """The weights with the highest score so far, in a file beside the checkpoints; one that is damaged does not count."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.seal = directory, directory / BEST
        self.score, self.step = broadcast_from_main(self._read)

    def _read(self) -> tuple[float, int]:
        try:
            said = json.loads(self.seal.read_text())
            if said["sha256"] == sha256(self._file(said["step"])):
                return said["score"], said["step"]
            print(
                f"  the best weights so far, of step {said['step']}, are damaged: the best of what follows is used",
                flush=True,
            )
        except OSError:  # there is none yet
            pass
        return -float("inf"), -1

    def keep(self, score: float, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Keep these weights if they are better. Every process has to call it; the first one writes."""
        if not score > self.score:
            return
        self.score, self.step = score, step
        whole = {name: value.cpu().contiguous() for name, value in weights if is_main_process()}
        with writing(self._file(step)):
            if whole:
                self.directory.mkdir(parents=True, exist_ok=True)
                save_file(whole, self._file(step))
                write_whole(self.seal, json.dumps({"score": score, "step": step, "sha256": sha256(self._file(step))}))
                for other in self.directory.glob(self._file("*").name):
                    if other != self._file(step):
                        other.unlink()

    def weights(self) -> dict[str, Tensor]:
        """What was kept."""
        return load_file(self._file(self.step))

    def _file(self, step: object) -> Path:
        return self.directory / f"best-{step}.safetensors"
