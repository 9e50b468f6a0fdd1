"""Text tuning: train a CLIP's text tower to match its pruned vision tower again (arXiv 2506.08591, fine-tuning stage).

The vision tower is frozen, so that its embeddings are computed once. The loss is CLIP's symmetric InfoNCE over the
global batch, as computed by open_clip.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from dgmr_tp.data.captions import CaptionedImages
from dgmr_tp.data.embeddings import embed_share
from dgmr_tp.data.images import Images
from dgmr_tp.distillation.checkpoints import Checkpoint
from dgmr_tp.distillation.config import TuneTextConfig
from dgmr_tp.distillation.data import Sample, check_same_files, distinct_global_batch
from dgmr_tp.distillation.engine import current_device
from dgmr_tp.distillation.loop import (
    CHECKPOINT_FOLDER,
    LossTerms,
    Task,
    check_broken_images,
    train,
    training_session,
)
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, Preempted
from dgmr_tp.pruning import ImageEncoder
from dgmr_tp.utils.distributed import broadcast_from_main, get_rank, get_world_size
from dgmr_tp.utils.lazy_imports import require
from dgmr_tp.utils.progress import listen_to_progress

MAX_LOGIT_SCALE = math.log(100)
"""Upper bound of the logarithm of the inverse temperature in CLIP's training."""


def tune_text(
    model: OpenedModel, pairs: CaptionedImages, config: TuneTextConfig, directory: Path, *, seed: int = 0
) -> dict[str, Any] | None:
    """Train the text tower and the temperature of ``model``, resuming from a checkpoint in ``directory``.

    Call it in every process that the ``deepspeed`` launcher started. See :func:`dgmr_tp.distillation.loop.train` for
    the optimizer.

    Args:
        model: a CLIP of open_clip, opened on the CPU; its text tower is trained in place.
        pairs: an image is used at most once an epoch, with its first caption or with one drawn for the epoch. Images
            that do not fill a batch at the end of an epoch are not used in it.
        config: the keys of a recipe's ``tune_text`` section.
        directory: for the image embeddings, checkpoints and curves (``log/``, CSV).
        seed: of the order of the pairs and of the captions.

    Returns:
        In rank 0 the figures of the run, for JSON. None in other ranks.

    Raises:
        DgmrError: the model has no text tower, there are fewer images than a batch needs, or an error of ``train``.
        Preempted: the training was asked to stop.
    """
    if not has_text_tower(model):
        raise DgmrError(f"{model.name} has no text tower to tune. Use a CLIP of open_clip.")
    with training_session(directory, config) as stop:
        rank, world = get_rank(), get_world_size()
        check_same_files(pairs.images)
        embeddings = ImageEmbeddings.load_or_compute(model, pairs, directory / CHECKPOINT_FOLDER, config, stop)
        broken = {pairs.images.records[i].name: _read_error(pairs.images, i) for i in embeddings.broken}
        check_broken_images(broken, len(pairs), config)
        if config.batch_size > len(embeddings.readable):
            raise DgmrError(
                f"tune_text.batch_size = {config.batch_size}, but {pairs.images.source} has {len(embeddings.readable)} "
                "images with captions, and an image may be in a batch only once. Set it to at most that number."
            )
        tower, device = TextTower(model.module), current_device()
        loss = require("open_clip", "encoders").loss.ClipLoss(
            gather_with_grad=True, cache_labels=True, rank=rank, world_size=world
        )

        def losses(engine: Callable[[Tensor], dict[str, Tensor]], sample: Sample) -> LossTerms:
            outputs = engine(sample.texts.to(device))
            return {"contrastive": loss(sample.images.to(device), outputs["text"].float(), outputs["scale"].float())}

        task = Task(
            module=tower,
            probe=model.tokenizer(["a photo"]),
            samples=lambda start: _load_samples(embeddings, pairs, model.tokenizer, config, seed, start),
            losses=losses,
            total=lambda terms: terms["contrastive"],
            count=len(embeddings.readable),
        )
        try:
            train(task, config, directory, stop)
        finally:
            tower.restore()
    model.module.to("cpu", torch.float32).requires_grad_(True).eval()
    if rank:
        return None
    settings = config.model_dump(exclude={"hostfile", "captions", "images"})
    counts = {"processes": world, "images": len(pairs), "without_caption": pairs.without}
    return {**settings, "seed": seed, **counts, "broken_images": broken}


def has_text_tower(model: OpenedModel) -> bool:
    """Return whether ``model`` can be tuned, that is, whether it is a CLIP of open_clip."""
    return hasattr(model.module, "encode_text") and hasattr(model.module, "logit_scale")


class TextTower(nn.Module):
    """A CLIP without its vision tower, as a module from token ids to normalized embeddings and inverse temperature.

    It takes the vision tower out of ``clip`` until :meth:`restore` is called.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.vision = [clip.visual]  # in a list, so that its parameters are not this module's: not trained, not saved
        clip._modules["visual"] = None
        self.scalars = [name for name, parameter in clip.named_parameters() if parameter.ndim == 0]
        self.clip = clip
        self.max_logit_scale = max(MAX_LOGIT_SCALE, float(clip.logit_scale.detach()))
        self._reshape_scalars((1,))  # DeepSpeed cannot communicate 0-dimensional tensors

    def forward(self, texts: Tensor) -> dict[str, Tensor]:
        """Return ``text`` ``[batch, embedding]``, normalized, and ``scale``, the inverse temperature."""
        log = self.clip.logit_scale
        # Straight-through: most CLIPs start with the scale at its bound, where a plain clamp has no gradient.
        bounded = log + (log.clamp(max=self.max_logit_scale) - log).detach()
        return {"text": self.clip.encode_text(texts, normalize=True), "scale": bounded.exp()}

    def restore(self) -> None:
        """Put the vision tower back into the CLIP, and clamp its temperature."""
        [self.clip.visual] = self.vision
        self._reshape_scalars(())
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=self.max_logit_scale)

    def _reshape_scalars(self, shape: tuple[int, ...]) -> None:
        for name in self.scalars:
            setattr(self.clip, name, nn.Parameter(getattr(self.clip, name).detach().reshape(shape)))


class ImageEmbeddings:
    """Normalized embeddings of the images, in one file for each of ``n`` processes: file ``r`` has every ``n``-th row.

    Args:
        files: of all ranks, in order. The row of an image that does not decode is NaN.
    """

    def __init__(self, files: list[Path]) -> None:
        self.parts = [np.load(file, mmap_mode="r") for file in files]
        finite = [np.isfinite(part[:, 0]) for part in self.parts]
        count = sum(map(len, self.parts))
        readable = np.array([finite[i % len(files)][i // len(files)] for i in range(count)])
        self.readable, self.broken = np.flatnonzero(readable), np.flatnonzero(~readable).tolist()

    @classmethod
    def load_or_compute(
        cls,
        model: OpenedModel,
        pairs: CaptionedImages,
        directory: Path,
        config: TuneTextConfig,
        stop: Callable[[], bool],
    ) -> ImageEmbeddings:
        """Load the embeddings of an earlier start, perhaps of another world size, or compute and store them."""
        files = broadcast_from_main(lambda: _complete_files(directory))
        return cls(files or cls._compute(model, pairs, directory, config, stop))

    @staticmethod
    def _compute(
        model: OpenedModel,
        pairs: CaptionedImages,
        directory: Path,
        config: TuneTextConfig,
        stop: Callable[[], bool],
    ) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        rank, world, device = get_rank(), get_world_size(), current_device()
        vision = copy.deepcopy(ImageEncoder(model.adapter)).to(device, config.precision).eval()

        def embed(images: Tensor) -> Tensor:
            return nn.functional.normalize(vision(images.to(config.precision)).float(), dim=-1)

        def leave_if_stopped(*_: object) -> None:
            if stop():
                raise Preempted("preempted while the images were embedded. Run again to start that step again.")

        with listen_to_progress(leave_if_stopped):
            embeddings, indices = embed_share(
                embed,
                model.preprocess,
                pairs.images,
                device=device,
                workers=config.workers,
                title="embed the images",
            )
        rows = np.full((len(range(rank, len(pairs), world)), embeddings.shape[1]), np.nan, np.float32)
        rows[indices.numpy() // world] = embeddings.cpu().numpy()
        path = _rank_files(directory, world)[rank]
        staging_path = path.with_suffix(".partial")
        with staging_path.open("wb") as stream:
            np.save(stream, rows)
        os.replace(staging_path, path)
        distributed.barrier()
        return _rank_files(directory, world)

    def __getitem__(self, indices: list[int]) -> Tensor:
        """Return the rows of these images, ``[len(indices), embedding]``."""
        return torch.from_numpy(np.stack([self.parts[i % len(self.parts)][i // len(self.parts)] for i in indices]))


def _rank_files(directory: Path, world: int) -> list[Path]:
    return [directory / f"images-{rank}-of-{world}.npy" for rank in range(world)]


def _complete_files(directory: Path) -> list[Path]:
    """Return the files of a complete set of embeddings, or an empty list."""
    sets = (_rank_files(directory, world) for world in range(1, 1 + len(list(directory.glob("images-*.npy")))))
    return next((files for files in sets if all(file.exists() for file in files)), [])


def _read_error(images: Images, index: int) -> str:
    """Return why an image cannot be read. It is read again, because another process may have met the error."""
    images.read(index)
    return images.broken.get(images.records[index].name, "cannot be read")


def _load_samples(
    embeddings: ImageEmbeddings,
    pairs: CaptionedImages,
    tokenizer: Callable[[list[str]], Tensor],
    config: TuneTextConfig,
    seed: int,
    checkpoint: Checkpoint,
) -> Generator[Sample]:
    """Yield this process's share of every global batch after ``checkpoint``."""
    rank, world = get_rank(), get_world_size()
    for step in range(checkpoint.step, config.steps):
        share = distinct_global_batch(len(embeddings.readable), config.batch_size, seed, step)[rank::world]
        indices = [int(embeddings.readable[i]) for _, i in share]
        texts = []
        for index, (epoch, _) in zip(indices, share, strict=True):
            captions = pairs.captions[index]
            texts.append(captions[0] if config.first_caption else _draw_caption(captions, (seed, epoch, index)))
        names = [pairs.images.records[index].name for index in indices]
        yield Sample(embeddings[indices], names, {}, texts=tokenizer(texts))


def _draw_caption(captions: list[str], seed: tuple[int, int, int]) -> str:
    return captions[int(np.random.default_rng(seed).integers(len(captions)))]
