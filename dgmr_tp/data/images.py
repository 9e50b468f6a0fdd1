"""Unlabeled or labeled images from folders and uncompressed webdataset tars, with random access.

A record is a file, an offset and a length, so that reading a sample inside a tar takes one seek. Files that are not
images are counted. Images that do not decode are skipped and recorded. This module does not know models: callers pass
``preprocess``.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgmr_tp.data.decoding import EXTENSIONS, NUM_FIRST_BYTES, decode_image, is_image
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import is_side_file, list_files
from dgmr_tp.utils.sources import Source


@dataclass(frozen=True)
class Record:
    """One encoded image: ``length`` bytes at ``offset`` of ``file``."""

    name: str
    """The image in messages: a path, and for a tar also the member."""
    file: Path
    offset: int
    length: int
    label: str | None = None
    """Its class: the content of its ``.cls`` in the tar, or the name of its folder."""
    has_cls: bool = False
    """True if it has a ``.cls``."""
    text: tuple[int, int] | None = None
    """Offset and length of its ``.txt`` in the tar."""
    upright: bool = False
    """Turn it as its EXIF orientation says."""

    def class_name(self) -> str | None:
        """Return its class, or None if it has none. A class that is only white space is none."""
        return self.label or None

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
                lines = (
                    text_file.read_text("utf-8") if self.file.suffix.lower() != ".tar" and text_file.exists() else ""
                )
        except UnicodeDecodeError as error:
            raise DgmrError(f"the captions of {self.name} are not UTF-8: {error}. Convert their .txt.") from error
        return [line.strip() for line in lines.split("\n") if line.strip()]

    def read(self) -> Any:
        """Decode to an RGB PIL image.

        Raises:
            OSError: or another of pillow's errors, if the image is damaged.
        """
        return decode_image(self._read_bytes(self.offset, self.length), self.upright)

    def _read_bytes(self, offset: int, length: int) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)


def stack_batches(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Yield batches ``[batch_size, 3, height, width]``; the last one may be smaller."""
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


@dataclass
class Images:
    """All images below a folder, or in a tar or a folder of tars, in the order of their names."""

    source: str | Path
    records: Sequence[Record]
    others: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are not images, by extension. Members of tars are not counted."""
    deepest: str | None = None
    """A folder with images below the first level, which gives the classes. None if there is none."""
    broken: dict[str, str] = field(default_factory=dict)
    """Name and error of every image that did not decode so far."""

    @classmethod
    def find(cls, source: str | Path) -> Images:
        """List the images of ``source``: a path, or several by braces; see :class:`~dgmr_tp.utils.sources.Source`.

        The class of an image is the first folder below the given folder, as in torchvision, or its ``.cls`` in a tar.
        In tars without a ``.cls`` it is the first folder that differs between the images. Hidden files and those that
        tools leave are not listed.

        Raises:
            DgmrError: it does not exist, contains no image, a folder cannot be listed, or a tar is damaged.
        """
        parsed = Source.parse(source)
        _check_local(parsed)
        records: list[Record] = []
        members: list[tuple[Record, tuple[str, ...]]] = []
        others: Counter[str] = Counter()
        deepest = None
        for root in map(Path, parsed.parts):
            for path in list_files(root):
                if path.suffix.lower() == ".tar":
                    members += _tar_records(path, parsed.upright, others)
                elif is_image(path.name, partial(_first_bytes, path)):
                    folders = path.relative_to(root).parts[:-1]
                    label = folders[0] if folders else None
                    deepest = "/".join(folders) if len(folders) > 1 and not deepest else deepest
                    records.append(Record(str(path), path, 0, _size(path), label, upright=parsed.upright))
                else:
                    others[path.suffix.lower() or "no extension"] += 1
        records = sorted([*records, *_classes_from_folders(members)], key=lambda record: record.file)
        if not records:
            kinds = f": {_kinds(others)}" if others else ""
            raise DgmrError(
                f"{source} contains no image ({sum(others.values())} other files){kinds}. Image files end in "
                f"{', '.join(EXTENSIONS)}; shards of images end in .tar."
            )
        return cls(source, records, others, deepest)

    @property
    def other_files(self) -> int:
        """Number of files that are not images."""
        return sum(self.others.values())

    def __len__(self) -> int:
        return len(self.records)

    def classes(self, at_least: int = 1) -> list[str]:
        """Return the class of each image.

        Raises:
            DgmrError: an image has no class, or there are fewer than ``at_least`` classes.
        """
        names = [record.class_name() for record in self.records]
        check_classes(self.source, self.records, names, at_least)
        return [str(name) for name in names]

    @property
    def notice(self) -> str | None:
        """One line on a layout in which folders are nested; None if there is none."""
        if self.deepest is None:
            return None
        count = len({record.label for record in self.records if record.label})
        return f"{self.source}: the first level of folders gives {count} classes, not the levels below ({self.deepest})"

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


def check_classes(
    source: str | Path, records: Sequence[Record], names: Sequence[str | None], at_least: int = 1
) -> None:
    """Check the classes of images before an accuracy is computed.

    Args:
        source: the images' source.
        records: the images.
        names: the class of each image.
        at_least: minimum number of different classes.

    Raises:
        DgmrError: an image has no class, or there are too few classes.
    """
    if None in names:
        unlabeled = records[names.index(None)]
        reason = ": its .cls is empty" if unlabeled.has_cls else ""
        raise DgmrError(
            f"{unlabeled.name} has no class{reason}. Put each class in a separate folder, or give tars with .cls next "
            "to the images."
        )
    if len(set(names)) < at_least:
        raise DgmrError(
            f"all {len(names)} images of {source} have one class, {names[0]}, and an accuracy needs at least "
            f"{at_least}. Give the folder whose subfolders are the classes."
        )


def describe_others(others: Mapping[str, int]) -> str:
    """Return the number of files that are not images, such as ``4 other files: .json 3, .heic 1``."""
    return f"{sum(others.values())} other files: {_kinds(others)}"


def _kinds(others: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in Counter(others).most_common(5))


def describe_skipped(broken: Mapping[str, str], others: Mapping[str, int]) -> str | None:
    """Return lines on what reading a source skipped, and why; None if nothing was."""
    if not broken and not others:
        return None
    lines = [f"skipped {len(broken)} images that do not decode and {sum(others.values())} files that are not images"]
    if broken:
        name, error = next(iter(broken.items()))
        lines.append(f"  the first image: {name}: {error}")
    if others:
        lines.append(f"  {describe_others(others)}")
    return "\n".join(lines)


def _check_local(source: Source) -> None:
    if source.is_url:
        raise DgmrError(
            f"{source.text} is a URL of shards, which are read from front to back. This needs random access: give a "
            "folder of images, a .tar, or a folder of .tar shards on disk."
        )
    if missing := source.missing:
        raise DgmrError(
            f"{missing[0]} does not exist. Give a folder of images, a .tar of images, or a folder of .tar shards."
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a link to a missing file is an image that cannot be read
        return 0


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(NUM_FIRST_BYTES)
    except OSError:
        return b""


def _tar_records(path: Path, upright: bool, others: Counter[str]) -> list[tuple[Record, tuple[str, ...]]]:
    """Return the images of a tar, and the folders of each in it. Symbolic links are counted in ``others``."""
    try:
        with tarfile.open(path, "r:") as tar:  # uncompressed, so that members can be read by their offset
            members = [member for member in tar if not member.isdir()]
            # tarfile takes a damaged header for the end of the archive. The real end is a block of zeros.
            if not _is_zero_block(path, tar.offset):
                raise tarfile.ReadError(f"it breaks off after {len(members)} files, at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise DgmrError(
            f"cannot read the shard {path}: {error}. It must be an uncompressed tar; remove it or fetch it again."
        ) from error
    regular = {member.name: member for member in members if member.isfile()}
    places: dict[str, tuple[int, int]] = {}
    names: dict[str, str] = {}
    for member in members:
        name = posixpath.normpath(member.name.lstrip("/"))
        if any(map(is_side_file, name.split("/"))):
            continue
        target = regular.get(member.linkname if member.islnk() else member.name)  # a hard link is stored once
        if target is None:
            others["link in a tar"] += 1
            continue
        places[name], names[name] = (target.offset_data, target.size), member.name
    records = []
    with path.open("rb") as stream:

        def read(place: tuple[int, int], limit: int | None = None) -> bytes:
            stream.seek(place[0])
            return stream.read(place[1] if limit is None else min(place[1], limit))

        images = [name for name, place in places.items() if is_image(name, partial(read, place, NUM_FIRST_BYTES))]
        for name in _main_images(images, places):
            stem = posixpath.splitext(name)[0]
            label = places.get(f"{stem}.cls")
            record = Record(
                f"{path}:{names[name]}",
                path,
                *places[name],
                label=None if label is None else read(label).decode(errors="surrogateescape").strip(),
                has_cls=label is not None,
                text=places.get(f"{stem}.txt"),
                upright=upright,
            )
            records.append((record, tuple(name.split("/")[:-1])))
    return records


def _main_images(images: Sequence[str], places: Mapping[str, Any]) -> list[str]:
    """Leave out images such as ``7.seg.png``, which belong to a webdataset sample with a main image, ``7.jpg``."""
    stems = {name: posixpath.splitext(name)[0] for name in images}
    samples = set(stems.values())

    def is_main(name: str) -> bool:
        folder, _, base = stems[name].rpartition("/")
        sample = posixpath.join(folder, base.partition(".")[0])
        if sample == stems[name] or sample not in samples:
            return True
        return any(f"{stems[name]}{suffix}" in places for suffix in (".cls", ".txt", ".json"))

    return [name for name in images if is_main(name)]


def _classes_from_folders(members: list[tuple[Record, tuple[str, ...]]]) -> list[Record]:
    """Take the classes from the folders in the tars if no image has a ``.cls``. Folders that all share say nothing."""
    if not members or any(record.has_cls for record, _ in members):
        return [record for record, _ in members]
    paths = [folders for _, folders in members]
    differs = [a != b for a, b in zip(min(paths), max(paths), strict=False)]
    shared = differs.index(True) if True in differs else len(differs)
    return [replace(record, label=folders[shared]) if len(folders) > shared else record for record, folders in members]


def _is_zero_block(path: Path, offset: int) -> bool:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
