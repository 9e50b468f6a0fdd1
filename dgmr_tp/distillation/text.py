"""The text tower's tuning: it learns again to match the pruned vision tower's embeddings (arXiv 2506.08591, its fine-tuning stage).

The vision tower is frozen, so its embeddings are computed once. The loss is CLIP's, symmetric InfoNCE over the whole global batch,
computed by open_clip.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from dgmr_tp.data.captions import Captioned
from dgmr_tp.data.embeddings import embedded_share
from dgmr_tp.data.images import Images
from dgmr_tp.distillation.checkpoints import Checkpoint
from dgmr_tp.distillation.config import TextSettings
from dgmr_tp.distillation.data import Sample, check_seen_alike, distinct_places
from dgmr_tp.distillation.engine import device_here
from dgmr_tp.distillation.loop import CHECKPOINTS, Task, check_broken, train, training
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, Preempted
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.distributed import broadcast_from_main, get_rank, get_world_size
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.progress import listen_to_progress

MOST_SCALE = math.log(100)
"""Where CLIP's training stops the logarithm of the inverse temperature."""


def tune_text(model: OpenedModel, pairs: Captioned, settings: TextSettings, directory: Path) -> dict[str, Any] | None:
    """Train the text tower and the temperature of ``model``, an open_clip CLIP, resuming from ``directory``.

    Run it in every process that the ``deepspeed`` launcher started. How it trains, and what it raises:
    :func:`dgmr_tp.distillation.loop.train`.

    Args:
        model: opened on the CPU; its text tower is trained in place.
        pairs: an image is met at most once an epoch, with its first caption or with one drawn for the epoch; what is left of an epoch
            when no whole batch is, is not used.
        settings: see :class:`TextSettings`.
        directory: the images' embeddings, checkpoints and the curves (``log/``, CSV) go here.

    Returns:
        On rank 0 the figures of the run, None elsewhere.

    Raises:
        DgmrError: the model has no text tower; there are fewer images than a batch has; and those of ``train``.
    """
    if not has_text_tower(model):
        raise DgmrError(f"{model.name} has no text tower to tune; it takes a CLIP of open_clip's")
    with training(directory, settings) as stop:
        rank, world = get_rank(), get_world_size()
        check_seen_alike(pairs.images)
        known = Embeddings.of(model, pairs, directory / CHECKPOINTS, settings, stop)
        broken = {pairs.images.records[i].name: _why(pairs.images, i) for i in known.broken}
        check_broken(broken, len(pairs), settings)
        if settings.batch_size > len(known.readable):
            raise DgmrError(
                f"tune_text.batch_size = {settings.batch_size}, but {pairs.images.source} has {len(known.readable)} images with captions, "
                "and none may be twice in a batch; set it to that many at most"
            )
        tower, device = TextTower(model.module), device_here()
        loss = require("open_clip", "encoders").loss.ClipLoss(
            gather_with_grad=True, cache_labels=True, rank=rank, world_size=world
        )

        def losses(engine: Callable[[Tensor], dict[str, Tensor]], sample: Sample) -> dict[str, Tensor]:
            found = engine(sample.texts.to(device))
            return {"contrastive": loss(sample.images.to(device), found["text"].float(), found["scale"].float())}

        task = Task(
            module=tower,
            probe=model.tokenizer(["a photo"]),
            samples=lambda done: _samples(known, pairs, model.tokenizer, settings, done),
            losses=losses,
            total=lambda parts: parts["contrastive"],
            count=len(known.readable),
        )
        try:
            train(task, settings, directory, stop)
        finally:
            tower.give_back()
    model.module.to("cpu", torch.float32).requires_grad_(True).eval()
    if rank:
        return None
    counts = {"processes": world, "images": len(pairs), "without_caption": pairs.without}
    return {**asdict(settings), **counts, "broken_images": broken}


def has_text_tower(model: OpenedModel) -> bool:
    """Whether ``model`` can be tuned: an open_clip CLIP."""
    return hasattr(model.module, "encode_text") and hasattr(model.module, "logit_scale")


class TextTower(nn.Module):
    """A CLIP without its vision tower, from token ids to normalised embeddings and the inverse temperature."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.vision = [
            clip.visual
        ]  # in a list: its weights are not the module's, so they are neither trained nor saved
        clip._modules["visual"] = None
        self.scalars = [name for name, parameter in clip.named_parameters() if parameter.ndim == 0]
        self.clip = clip
        self.most = max(MOST_SCALE, float(clip.logit_scale.detach()))
        self._reshape_scalars((1,))  # DeepSpeed cannot send a number, only a vector of one

    def forward(self, texts: Tensor) -> dict[str, Tensor]:
        log = self.clip.logit_scale
        # Most CLIPs come with the scale at its bound, where a plain clamp would have no gradient.
        bounded = log + (log.clamp(max=self.most) - log).detach()
        return {"text": self.clip.encode_text(texts, normalize=True), "scale": bounded.exp()}

    def give_back(self) -> None:
        """The CLIP has its vision tower again."""
        [self.clip.visual] = self.vision
        self._reshape_scalars(())
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=self.most)

    def _reshape_scalars(self, shape: tuple[int, ...]) -> None:
        for name in self.scalars:
            setattr(self.clip, name, nn.Parameter(getattr(self.clip, name).detach().reshape(shape)))


class Embeddings:
    """The normalised embeddings of the images: of ``n`` processes, each keeps every ``n``-th row in a file of its own."""

    def __init__(self, files: list[Path]) -> None:
        self.parts = [np.load(file, mmap_mode="r") for file in files]
        readable = [np.isfinite(part[:, 0]) for part in self.parts]
        count = sum(map(len, self.parts))
        found = np.array([readable[i % len(files)][i // len(files)] for i in range(count)])
        self.readable, self.broken = np.flatnonzero(found), np.flatnonzero(~found).tolist()

    @classmethod
    def of(
        cls, model: OpenedModel, pairs: Captioned, directory: Path, settings: TextSettings, stop: Callable[[], bool]
    ) -> Embeddings:
        """Computed, or from an earlier start, then perhaps of another number of processes."""
        files = broadcast_from_main(lambda: _whole_set(directory))
        return cls(files or cls._compute(model, pairs, directory, settings, stop))

    @staticmethod
    def _compute(
        model: OpenedModel, pairs: Captioned, directory: Path, settings: TextSettings, stop: Callable[[], bool]
    ) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        rank, world, device = get_rank(), get_world_size(), device_here()
        vision = copy.deepcopy(ImageEncoder(model.adapter)).to(device, settings.precision).eval()

        def embed(images: Tensor) -> Tensor:
            return nn.functional.normalize(vision(images.to(settings.precision)).float(), dim=-1)

        def leave_if_stopped(*_: object) -> None:
            if stop():
                raise Preempted("preempted while the images were embedded; run again to begin that anew")

        with listen_to_progress(leave_if_stopped):
            found, where = embedded_share(
                embed,
                model.preprocess,
                pairs.images,
                device=device,
                workers=settings.workers,
                title="embed the images",
            )
        if not found.isfinite().all():
            raise DgmrError(
                f"some embeddings of {pairs.images.source} are not finite; check the weights and the preprocessing"
            )
        rows = np.full((len(range(rank, len(pairs), world)), found.shape[1]), np.nan, np.float32)
        rows[where.numpy() // world] = found.cpu().numpy()
        mine = _parts(directory, world)[rank]
        aside = mine.with_suffix(".partial")
        with aside.open("wb") as stream:
            np.save(stream, rows)
        os.replace(aside, mine)
        distributed.barrier()
        return _parts(directory, world)

    def __getitem__(self, places: list[int]) -> Tensor:
        """Rows ``[len(places), width]``."""
        return torch.from_numpy(np.stack([self.parts[i % len(self.parts)][i // len(self.parts)] for i in places]))


def _parts(directory: Path, world: int) -> list[Path]:
    return [directory / f"images-{rank}-of-{world}.npy" for rank in range(world)]


def _whole_set(directory: Path) -> list[Path]:
    """The files of a set that is complete, if there is one."""
    sets = (_parts(directory, world) for world in range(1, 1 + len(list(directory.glob("images-*.npy")))))
    return next((files for files in sets if all(file.exists() for file in files)), [])


def _why(images: Images, index: int) -> str:
    """Why an image cannot be read: the process that met it may have been another."""
    images.read(index)
    return images.broken.get(images.records[index].name, "cannot be read")


def _samples(
    known: Embeddings,
    pairs: Captioned,
    tokenizer: Callable[[list[str]], Tensor],
    settings: TextSettings,
    done: Checkpoint,
) -> Generator[Sample]:
    """This process's part of every global batch from ``done`` on."""
    rank, world = get_rank(), get_world_size()
    for step in range(done.step, settings.steps):
        mine = distinct_places(len(known.readable), settings.batch_size, settings.seed, step)[rank::world]
        chosen = [int(known.readable[i]) for _, i in mine]
        texts = [_caption(pairs.captions[at], settings, epoch, at) for at, (epoch, _) in zip(chosen, mine, strict=True)]
        yield Sample(known[chosen], [pairs.images.records[at].name for at in chosen], {}, texts=tokenizer(texts))


def _caption(captions: list[str], settings: TextSettings, epoch: int, place: int) -> str:
    if settings.first_caption:
        return captions[0]
    return captions[int(np.random.default_rng((settings.seed, epoch, place)).integers(len(captions)))]
