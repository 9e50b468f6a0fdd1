"""Unlabelled images from folders and webdataset tars, each found once and read by its place.

A record is a file, an offset and a length, so that a sample inside a tar costs one seek. Files that are no images are
counted; images that do not decode are skipped, counted and named. Knows nothing of models: ``preprocess`` comes in.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import files_below

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Record:
    """One encoded image: ``length`` bytes at ``offset`` of ``file``; ``name`` is what a message calls it."""

    name: str
    file: Path
    offset: int
    length: int
    label: str | tuple[int, int] | None = None
    """Its class: the name of its folder, or offset and length of its ``.cls`` in the tar."""
    text: tuple[int, int] | None = None
    """Offset and length of its ``.txt`` in the tar."""

    def class_name(self) -> str | None:
        """Its class, if it is known."""
        return (
            self._bytes(*self.label).decode(errors="replace").strip() if isinstance(self.label, tuple) else self.label
        )

    def captions(self) -> list[str]:
        """The lines of its ``.txt`` in the tar, or of the file of its name beside it; none, if there is none.

        Raises:
            DgmrError: they are not UTF-8.
        """
        beside = self.file.with_suffix(".txt")
        try:
            if self.text is not None:
                lines = self._bytes(*self.text).decode()
            else:
                lines = beside.read_text("utf-8") if self.file.suffix != ".tar" and beside.exists() else ""
        except UnicodeDecodeError as error:
            raise DgmrError(f"the captions of {self.name} are not UTF-8: {error}; convert their .txt") from error
        return [line.strip() for line in lines.splitlines() if line.strip()]

    def read(self) -> Any:
        """Decode to an RGB PIL image. Raises OSError or another of pillow's errors if it is damaged."""
        return decoded(self._bytes(self.offset, self.length))

    def _bytes(self, offset: int, length: int) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)


def decoded(data: bytes) -> Any:
    """An encoded image as an RGB PIL image. Raises OSError or another of pillow's errors if it is damaged."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I;16"):  # pillow would cut at 255
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"its values, pillow's mode {image.mode}, have no known range")
        return image.convert("RGB")


def stacked(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Images as batches ``[batch, 3, height, width]``; the last may be smaller."""
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


@dataclass
class Images:
    """All images below a folder, or in a tar or a folder of tars, in the order of their names."""

    source: Path
    records: Sequence[Record]
    other_files: int
    """Files and tar members that are no images; captions and labels beside images in tars are not counted."""
    broken: dict[str, str] = field(default_factory=dict)
    """Name and error of every image that did not decode so far."""

    @classmethod
    def find(cls, source: str | Path) -> Images:
        """List the images of ``source``.

        Raises:
            DgmrError: it does not exist, or holds no image.
        """
        source = Path(source)
        if not source.exists():
            raise DgmrError(
                f"{source} does not exist; give a folder of images, a .tar of them, or a folder of .tar shards"
            )
        files = files_below(source)
        records: list[Record] = []
        other = 0
        for path in files:
            if path.suffix == ".tar":
                records += _tar_records(path)
            elif path.suffix.lower() in EXTENSIONS:
                label = None if path.parent in (source, path) else path.parent.name
                records.append(Record(str(path), path, 0, path.stat().st_size, label))
            else:
                other += 1
        if not records:
            raise DgmrError(
                f"{source} holds no image ({other} other files); image endings: {', '.join(EXTENSIONS)}, or .tar shards of them"
            )
        return cls(source, records, other)

    def __len__(self) -> int:
        return len(self.records)

    def classes(self) -> list[str]:
        """The class of each.

        Raises:
            DgmrError: an image has none.
        """
        names = [record.class_name() for record in self.records]
        if None in names:
            nameless = self.records[names.index(None)].name
            raise DgmrError(
                f"{nameless} has no class; give a folder for every class, or tars with .cls beside the images"
            )
        return [str(name) for name in names]

    def divided(self, count: int, seed: int) -> tuple[Images, Images]:
        """``count`` of them, chosen by ``seed``, and all others."""
        chosen = set(np.random.default_rng((seed, count)).choice(len(self), count, replace=False).tolist())
        parts = ([record for i, record in enumerate(self.records) if (i in chosen) == first] for first in (True, False))
        first, others = (replace(self, records=part, broken={}) for part in parts)
        return first, others

    def read(self, index: int) -> Any | None:
        """The image at ``index``; None, and remembered in ``broken``, if it does not decode."""
        try:
            return self.records[index].read()
        except Exception as error:  # pillow and its codecs raise many kinds for damaged files
            self.broken[self.records[index].name] = str(error) or type(error).__name__
            return None

    def sample(
        self, count: int, seed: int, preprocess: Callable[[Any], Tensor], batch_size: int = 64
    ) -> Iterator[Tensor]:
        """``count`` random images (all of them, if there are fewer) as batches ``[batch, 3, height, width]``.

        The choice depends on ``seed`` alone; a broken image is replaced by the next of the same random order.

        Raises:
            DgmrError: not one image decodes.
        """
        return stacked((image for _, image in self._chosen(count, seed, preprocess)), batch_size)

    def labelled(self, count: int, seed: int, preprocess: Callable[[Any], Tensor]) -> tuple[Tensor, list[str | None]]:
        """The images of :meth:`sample` in one batch, and their classes; None for one whose class is not known."""
        chosen = [(image, record.class_name()) for record, image in self._chosen(count, seed, preprocess)]
        return torch.stack([image for image, _ in chosen]), [label for _, label in chosen]

    def _chosen(self, count: int, seed: int, preprocess: Callable[[Any], Tensor]) -> Iterator[tuple[Record, Tensor]]:
        taken = 0
        for index in np.random.default_rng(seed).permutation(len(self.records)):
            image = self.read(int(index))
            if image is None:
                continue
            yield self.records[index], preprocess(image)
            taken += 1
            if taken == count:
                break
        if not taken:
            name, error = next(iter(self.broken.items()))
            raise DgmrError(f"none of the {len(self)} images in {self.source} can be read; the first: {name}: {error}")


def _tar_records(path: Path) -> list[Record]:
    try:
        with tarfile.open(path, "r:") as tar:  # uncompressed: members are read by their offset
            members = [member for member in tar if member.isfile()]
            # tarfile takes whatever is no header for the end; the real one is a block of zeros.
            if not _is_zero_block(path, tar.offset):
                raise tarfile.ReadError(f"it breaks off behind {len(members)} files, at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise DgmrError(
            f"cannot read the shard {path}: {error}; it must be an uncompressed tar; remove it or fetch it again"
        ) from error
    beside = {str(Path(m.name)): (m.offset_data, m.size) for m in members if m.name.endswith((".cls", ".txt"))}
    return [
        Record(
            f"{path}:{m.name}",
            path,
            m.offset_data,
            m.size,
            *(beside.get(str(Path(m.name).with_suffix(end))) for end in (".cls", ".txt")),
        )
        for m in members
        if Path(m.name).suffix.lower() in EXTENSIONS
    ]


def _is_zero_block(path: Path, offset: int) -> bool:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
