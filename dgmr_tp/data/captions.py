"""Images with captions: webdataset pairs, a folder with a text file beside each image, or Karpathy's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dgmr_tp.data.images import Images, Record
from dgmr_tp.errors import DgmrError

TRAINING = ("train", "restval")
"""The splits of Karpathy's files on which everybody trains."""


@dataclass
class Captioned:
    """Images and, for each, one caption or several."""

    images: Images
    captions: list[list[str]]
    without: int
    """Images that were left out because they have no caption."""

    @classmethod
    def find(cls, source: str | Path, images: str | Path | None = None) -> Captioned:
        """List the pairs of ``source``; images without a caption are left out.

        Args:
            source: a tar, a folder of tars or of images, with a ``.txt`` beside each image that holds a caption a line; or
                Karpathy's ``dataset_flickr30k.json`` or ``dataset_coco.json``, of which the training split is taken.
            images: for a JSON: the folder of its images.

        Raises:
            DgmrError: a file is missing or damaged, or there are no captions.
        """
        if Path(source).suffix == ".json":
            return cls._karpathy(Path(source), images)
        if images is not None:
            raise DgmrError(
                f"captions in {source} stand beside their images; the folder {images} goes with a .json of captions"
            )
        found = Images.find(source)
        pairs = [(record, lines) for record in found.records if (lines := record.captions())]
        if not pairs:
            raise DgmrError(
                f"{source} holds {len(found)} images and no caption; put a .txt beside each image, or give Karpathy's JSON"
            )
        without = len(found) - len(pairs)
        found.records = [record for record, _ in pairs]
        return cls(found, [lines for _, lines in pairs], without)

    @classmethod
    def _karpathy(cls, path: Path, folder: str | Path | None) -> Captioned:
        if folder is None:
            raise DgmrError(f"{path} names images; say in which folder they are (tune_text.images)")
        try:
            training = [entry for entry in json.loads(path.read_text("utf-8"))["images"] if entry["split"] in TRAINING]
            entries = [entry for entry in training if entry["sentences"]]
            files = [Path(folder) / entry.get("filepath", "") / entry["filename"] for entry in entries]
            captions = [[sentence["raw"].strip() for sentence in entry["sentences"]] for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DgmrError(f"cannot read Karpathy's captions in {path}: {type(error).__name__}: {error}") from error
        if missing := [file for file in files if not file.exists()]:
            raise DgmrError(f"{len(missing)} of {len(files)} images of {path} are missing; the first: {missing[0]}")
        if not files:
            raise DgmrError(f"{path} has no image of the split {' or '.join(TRAINING)}")
        return cls(
            Images(Path(folder), [Record(str(file), file, 0, file.stat().st_size) for file in files], 0),
            captions,
            len(training) - len(entries),
        )

    def __len__(self) -> int:
        return len(self.captions)
