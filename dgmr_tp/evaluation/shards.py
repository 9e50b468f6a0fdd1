"""clip_benchmark's webdataset directories, read with random access and checked before anything is embedded.

clip_benchmark reads them through webdataset, which cannot divide one shard between several workers, splits names at the
first dot, and stops at a label that is not a number without naming it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dgmr_tp.data.images import Images, Record
from dgmr_tp.data.labels import CLASSNAMES_FILE, TEMPLATES_FILE, check_label_range, read_class_names, read_prompts
from dgmr_tp.errors import DgmrError

KINDS = {"classification": "zeroshot_classification", "multilabel": "zeroshot_classification"} | {
    "retrieval": "zeroshot_retrieval"
}
"""Contents of ``dataset_type.txt``, and the default task of each."""


def dataset_kind(root: Path) -> str:
    """Return the kind that ``dataset_type.txt`` states: a key of :data:`KINDS`. Without the file: classification.

    Raises:
        DgmrError: it states another kind.
    """
    path = root / "dataset_type.txt"
    if not path.exists():
        return "classification"
    kind = path.read_text("utf-8-sig", errors="replace").strip().lower()
    if kind not in KINDS:
        raise DgmrError(f"{path} states the kind {kind!r}. Write one of {', '.join(KINDS)}.")
    return kind


class Shards(Dataset):
    """One split of a webdataset directory. An item is an image and its label, or an image and its captions.

    Args:
        root: the directory. ``root/SPLIT/nshards.txt`` states the number of shards, ``0.tar`` and so on.
        split: ``test`` or ``train``.
        transform: maps a PIL image to a tensor.

    Raises:
        DgmrError: a file is missing or damaged, an image has no label or caption, or the labels do not match the class
            names.
    """

    def __init__(self, root: Path, split: str, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform
        self.records = _read_records(root / split)
        self.classes: list[str] | None = None
        self.templates: list[str] | None = None
        self.targets: list[Any]
        if dataset_kind(root) == "retrieval":
            self.targets = [_captions(record) for record in self.records]
            return
        self.targets = [_label(record) for record in self.records]
        if (root / CLASSNAMES_FILE).exists():
            self.classes = read_class_names(root / CLASSNAMES_FILE)
            check_label_range(self.targets, len(self.classes), root)
        if (root / TEMPLATES_FILE).exists():
            self.templates = read_prompts(root / TEMPLATES_FILE)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        record = self.records[index]
        try:
            image = record.read()
        except Exception as error:  # pillow and its codecs raise many exception classes for damaged files
            raise DgmrError(
                f"the image {record.name} does not decode: {error}. A benchmark needs all images: repair the shard."
            ) from error
        return self.transform(image), self.targets[index]

    def batched(self, batch_size: int) -> Batches:
        """Return the batches of the split, as clip_benchmark calls it on its own webdatasets."""
        return Batches(self, batch_size)


class Batches(Dataset):
    """A data set whose items are batches: images ``[batch, 3, height, width]``, and labels ``[batch]`` or captions."""

    def __init__(self, shards: Shards, batch_size: int) -> None:
        self.shards, self.batch_size = shards, batch_size
        self.classes, self.templates = shards.classes, shards.templates

    def __len__(self) -> int:
        return -(-len(self.shards) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if index >= len(self):
            raise IndexError(index)
        first = index * self.batch_size
        items = [self.shards[i] for i in range(first, min(first + self.batch_size, len(self.shards)))]
        targets = [target for _, target in items]
        is_labeled = isinstance(targets[0], int)
        return torch.stack([image for image, _ in items]), torch.tensor(targets) if is_labeled else targets


def _read_records(folder: Path) -> list[Record]:
    path = folder / "nshards.txt"
    try:
        count = int(path.read_text())
        if count < 1:
            raise ValueError(f"it says {count}")
    except (OSError, ValueError) as error:
        raise DgmrError(
            f"clip_benchmark cannot evaluate {folder.parent}: {path} does not contain the number of shards ({error}). "
            "Write it, and name the shards 0.tar, 1.tar and so on."
        ) from error
    return [record for number in range(count) for record in Images.find(folder / f"{number}.tar").records]


def _label(record: Record) -> int:
    text = record.class_name()
    try:
        if not (text or "").lstrip("-").isdecimal():  # int would take 1_0 for 10
            raise ValueError(text)
        return int(str(text))
    except ValueError as error:
        found = f"its .cls is {text!r}" if text else "its .cls is empty" if record.has_cls else "it has no .cls"
        raise DgmrError(
            f"the label of {record.name} is not a number: {found}. Write the number of the class, from 0, into a .cls "
            "next to each image."
        ) from error


def _captions(record: Record) -> list[str]:
    captions = record.captions()
    if not captions:
        raise DgmrError(f"the image {record.name} has no caption. Put a .txt with one caption per line next to it.")
    return captions
