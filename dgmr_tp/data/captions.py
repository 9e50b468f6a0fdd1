"""Images with captions, from webdataset pairs, a folder with a text file next to each image, or a Karpathy JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dgmr_tp.data.images import Images, Record
from dgmr_tp.errors import DgmrError

TRAINING_SPLITS = ("train", "restval")
"""Splits of a Karpathy JSON that are customarily trained on."""


@dataclass
class CaptionedImages:
    """Images, each with one caption or several."""

    images: Images
    captions: list[list[str]]
    """Captions of each image, in the order of ``images``."""
    without: int
    """Number of images that were left out because they have no caption."""

    @classmethod
    def find(cls, source: str | Path, images: str | Path | None = None) -> CaptionedImages:
        """List the pairs of ``source``. Images without a caption are left out.

        Args:
            source: a tar, a folder of tars or a folder of images, with a ``.txt`` next to each image that contains one
                caption a line; or Karpathy's ``dataset_flickr30k.json`` or ``dataset_coco.json``, of which the training
                split is used.
            images: for a JSON, the folder of its images.

        Raises:
            DgmrError: a file is missing or damaged, or there are no captions.
        """
        if Path(source).suffix == ".json":
            return cls._from_karpathy(Path(source), images)
        if images is not None:
            raise DgmrError(
                f"the captions in {source} are next to their images, but a folder of images ({images}) is given too. "
                "Leave that folder out, or give a .json of captions."
            )
        listed = Images.find(source)
        pairs = [(record, lines) for record in listed.records if (lines := record.captions())]
        if not pairs:
            raise DgmrError(
                f"{source} contains {len(listed)} images and no caption. Put a .txt next to each image, or give a "
                "Karpathy JSON."
            )
        without = len(listed) - len(pairs)
        listed.records = [record for record, _ in pairs]
        return cls(listed, [lines for _, lines in pairs], without)

    @classmethod
    def _from_karpathy(cls, path: Path, folder: str | Path | None) -> CaptionedImages:
        if folder is None:
            raise DgmrError(f"{path} contains only names of images. Set tune_text.images to the folder of the images.")
        try:
            entries = json.loads(path.read_text("utf-8"))["images"]
            training = [entry for entry in entries if entry["split"] in TRAINING_SPLITS]
            captioned = [entry for entry in training if entry["sentences"]]
            files = [Path(folder) / entry.get("filepath", "") / entry["filename"] for entry in captioned]
            captions = [[sentence["raw"].strip() for sentence in entry["sentences"]] for entry in captioned]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DgmrError(
                f"cannot read Karpathy's captions in {path}: {type(error).__name__}: {error}. Use his original file."
            ) from error
        if missing := [file for file in files if not file.exists()]:
            raise DgmrError(
                f"{len(missing)} of {len(files)} images of {path} are missing; the first: {missing[0]}. "
                "Set tune_text.images to the folder that contains them."
            )
        if not files:
            raise DgmrError(
                f"{path} has no image of the split {' or '.join(TRAINING_SPLITS)}. Use a file with a training split."
            )
        records = [Record(str(file), file, 0, file.stat().st_size) for file in files]
        return cls(Images(Path(folder), records), captions, len(training) - len(captioned))

    def __len__(self) -> int:
        return len(self.captions)
