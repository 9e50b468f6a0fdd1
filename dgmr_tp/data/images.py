"""Unlabeled or labeled images from folders and uncompressed webdataset tars, with random access.

A record is a file, an offset and a length, so that reading a sample inside a tar takes one seek. Files that are not
images are counted. Images that do not decode are skipped and recorded. This module does not know models: callers pass
``preprocess``.
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
from dgmr_tp.utils.files import list_files

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
"""Extensions of image files."""


@dataclass(frozen=True)
class Record:
    """One encoded image: ``length`` bytes at ``offset`` of ``file``."""

    name: str
    """The image in messages: a path, and for a tar also the member."""
    file: Path
    offset: int
    length: int
    label: str | tuple[int, int] | None = None
    """Its class: the name of its folder, or offset and length of its ``.cls`` in the tar."""
    text: tuple[int, int] | None = None
    """Offset and length of its ``.txt`` in the tar."""

    def class_name(self) -> str | None:
        """Return its class, or None if it has none."""
        if isinstance(self.label, tuple):
            return self._read_bytes(*self.label).decode(errors="replace").strip()
        return self.label

    def captions(self) -> list[str]:
        """Return the lines of its ``.txt``: the tar member, or the file of the same name next to the image.

        Raises:
            DgmrError: the text is not UTF-8.
        """
        text_file = self.file.with_suffix(".txt")
        try:
            if self.text is not None:
                lines = self._read_bytes(*self.text).decode()
            else:
                lines = text_file.read_text("utf-8") if self.file.suffix != ".tar" and text_file.exists() else ""
        except UnicodeDecodeError as error:
            raise DgmrError(f"the captions of {self.name} are not UTF-8: {error}. Convert their .txt.") from error
        return [line.strip() for line in lines.splitlines() if line.strip()]

    def read(self) -> Any:
        """Decode to an RGB PIL image.

        Raises:
            OSError: or another of pillow's errors, if the image is damaged.
        """
        return decode_image(self._read_bytes(self.offset, self.length))

    def _read_bytes(self, offset: int, length: int) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)


def decode_image(data: bytes) -> Any:
    """Decode an image to an RGB PIL image.

    Raises:
        OSError: or another of pillow's errors, if the image is damaged.
        ValueError: its pixel values have no known range.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I;16"):  # pillow would clip at 255
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"its values, pillow's mode {image.mode}, have no known range")
        return image.convert("RGB")


def stack_batches(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Yield batches ``[batch_size, 3, height, width]``; the last one may be smaller."""
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


@dataclass
class Images:
    """All images below a folder, or in a tar or a folder of tars, in the order of their names."""

    source: Path
    records: Sequence[Record]
    other_files: int
    """Number of files that are not images. Members of tars are not counted."""
    broken: dict[str, str] = field(default_factory=dict)
    """Name and error of every image that did not decode so far."""

    @classmethod
    def find(cls, source: str | Path) -> Images:
        """List the images of ``source``.

        Raises:
            DgmrError: it does not exist, contains no image, or a tar is damaged.
        """
        source = Path(source)
        if not source.exists():
            raise DgmrError(
                f"{source} does not exist. Give a folder of images, a .tar of images, or a folder of .tar shards."
            )
        records: list[Record] = []
        other_files = 0
        for path in list_files(source):
            if path.suffix == ".tar":
                records += _tar_records(path)
            elif path.suffix.lower() in EXTENSIONS:
                label = None if path.parent in (source, path) else path.parent.name
                records.append(Record(str(path), path, 0, path.stat().st_size, label))
            else:
                other_files += 1
        if not records:
            raise DgmrError(
                f"{source} contains no image ({other_files} other files). Image files end in {', '.join(EXTENSIONS)}; "
                "shards of images end in .tar."
            )
        return cls(source, records, other_files)

    def __len__(self) -> int:
        return len(self.records)

    def classes(self) -> list[str]:
        """Return the class of each image.

        Raises:
            DgmrError: an image has no class.
        """
        names = [record.class_name() for record in self.records]
        if None in names:
            unlabeled = self.records[names.index(None)].name
            raise DgmrError(
                f"{unlabeled} has no class. Put each class in a separate folder, or give tars with .cls next to the "
                "images."
            )
        return [str(name) for name in names]

    def split(self, count: int, seed: int) -> tuple[Images, Images]:
        """Return ``count`` images, drawn by ``seed``, and all others."""
        drawn = set(np.random.default_rng((seed, count)).choice(len(self), count, replace=False).tolist())
        first = [record for i, record in enumerate(self.records) if i in drawn]
        others = [record for i, record in enumerate(self.records) if i not in drawn]
        return replace(self, records=first, broken={}), replace(self, records=others, broken={})

    def read(self, index: int) -> Any | None:
        """Return the image at ``index``, or None if it does not decode; then its error is recorded in ``broken``."""
        try:
            return self.records[index].read()
        except Exception as error:  # pillow and its codecs raise many exception classes for damaged files
            self.broken[self.records[index].name] = str(error) or type(error).__name__
            return None

    def sample(
        self, count: int, seed: int, preprocess: Callable[[Any], Tensor], batch_size: int = 64
    ) -> Iterator[Tensor]:
        """Yield ``count`` random images (all, if there are fewer) as batches ``[batch, 3, height, width]``.

        The selection depends only on ``seed``. A broken image is replaced by the next one of the same random order.

        Raises:
            DgmrError: no image decodes.
        """
        return stack_batches((image for _, image in self._draw(count, seed, preprocess)), batch_size)

    def sample_labeled(
        self, count: int, seed: int, preprocess: Callable[[Any], Tensor]
    ) -> tuple[Tensor, list[str | None]]:
        """Return the images of :meth:`sample` in one batch, and their classes; None for an image without a class."""
        drawn = [(image, record.class_name()) for record, image in self._draw(count, seed, preprocess)]
        return torch.stack([image for image, _ in drawn]), [label for _, label in drawn]

    def _draw(self, count: int, seed: int, preprocess: Callable[[Any], Tensor]) -> Iterator[tuple[Record, Tensor]]:
        done = 0
        for index in np.random.default_rng(seed).permutation(len(self.records)):
            image = self.read(int(index))
            if image is None:
                continue
            yield self.records[index], preprocess(image)
            done += 1
            if done == count:
                break
        if not done:
            name, error = next(iter(self.broken.items()))
            raise DgmrError(
                f"none of the {len(self)} images in {self.source} can be read; the first: {name}: {error}. "
                "Check the files."
            )


def _tar_records(path: Path) -> list[Record]:
    try:
        with tarfile.open(path, "r:") as tar:  # uncompressed, so that members can be read by their offset
            members = [member for member in tar if member.isfile()]
            # tarfile takes a damaged header for the end of the archive. The real end is a block of zeros.
            if not _is_zero_block(path, tar.offset):
                raise tarfile.ReadError(f"it breaks off after {len(members)} files, at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise DgmrError(
            f"cannot read the shard {path}: {error}. It must be an uncompressed tar; remove it or fetch it again."
        ) from error
    metadata = {str(Path(m.name)): (m.offset_data, m.size) for m in members if m.name.endswith((".cls", ".txt"))}
    records = []
    for member in members:
        name = Path(member.name)
        if name.suffix.lower() in EXTENSIONS:
            label, text = (metadata.get(str(name.with_suffix(suffix))) for suffix in (".cls", ".txt"))
            records.append(Record(f"{path}:{member.name}", path, member.offset_data, member.size, label, text))
    return records


def _is_zero_block(path: Path, offset: int) -> bool:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
