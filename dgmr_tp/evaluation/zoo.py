"""The three figures of DGMR's model zoo, and their published values.

Sources: the README of DGMR's code (arXiv 2506.08591), and AMP's paper (arXiv 2603.08100), tables 1 and 2.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from dgmr_tp.errors import DgmrError

CLASSIFICATION = ("imagenet1k", "imagenet-a", "imagenet-r", "imagenetv2", "imagenet_sketch", "objectnet")
RETRIEVAL = ("flickr30k", "mscoco_captions")
FIGURES = ("zero-shot", "retrieval", "k-NN")
PUBLISHED: dict[str, tuple[float | None, float | None, float | None]] = {
    "OpenCLIP-g": (73.0, 83.8, 81.7),
    "OpenCLIP-g, DGMR 0.48 B": (73.0, 83.8, 81.9),
    "OpenCLIP-g, DGMR 0.64 B": (73.2, 84.1, 82.1),
    "OpenCLIP-g, AMP 0.62 B": (73.1, 84.0, 81.7),
    "OpenCLIP-G": (76.2, 85.0, 82.9),
    "OpenCLIP-G, DGMR 0.80 B": (76.1, None, None),
    "OpenCLIP-G, AMP 1.17 B": (75.9, 85.0, 82.8),
    "EVA-CLIP-E": (80.9, 85.2, 85.8),
    "EVA-CLIP-E, DGMR 1.24 B": (81.0, 85.2, 85.7),
    "EVA-CLIP-E, DGMR 1.65 B": (81.1, 85.3, 85.8),
    "EVA-CLIP-E, AMP 2.50 B": (81.0, 85.3, 85.9),
    "EVA-CLIP-8B": (82.9, 85.7, 86.0),
    "EVA-CLIP-8B, DGMR 3.23 B": (82.7, None, None),
    "EVA-CLIP-8B, AMP 4.59 B": (82.9, 86.1, 86.1),
    "DINOv2-g": (None, None, 83.5),
    "DINOv2-g, DGMR 0.66 B": (None, None, 83.5),
    "DINOv2-g, AMP 0.62 B": (None, None, 83.5),
}
"""Published values in percent: mean top-1 of the six ImageNet sets, mean of the twelve recalls, k-NN on ImageNet."""


def find_zoo(root: Path) -> dict[str, tuple[str, Path]]:
    """Return clip_benchmark's name and the directory of each of the zoo's data sets, by data set.

    ``root/NAME`` contains webdataset shards (with ``test/nshards.txt``, no network needed) or clip_benchmark's own
    files.

    Raises:
        DgmrError: directories are missing. The message names all of them.
    """
    names = (*CLASSIFICATION, *RETRIEVAL)
    if missing := [name for name in names if not (root / name).is_dir()]:
        raise DgmrError(
            f"{root} lacks {', '.join(missing)}. The suite needs a directory for each of {', '.join(names)}."
        )
    return {
        name: (f"wds/{name}" if (root / name / "test" / "nshards.txt").exists() else name, root / name)
        for name in names
    }


def knn_folders(root: Path) -> tuple[Path, Path]:
    """Return the directories of ImageNet's training and test images below ``root``.

    They are ``imagenet1k/train``, and ``imagenet1k/test`` or ``imagenet1k/val``.

    Raises:
        DgmrError: one of them is missing.
    """
    imagenet = root / "imagenet1k"
    train = imagenet / "train"
    test = next((path for name in ("test", "val") if (path := imagenet / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DgmrError(f"{imagenet} lacks images for k-NN. It needs the directories train and test (or val).")
    return train, test


def zoo_figures(metrics: dict[str, dict[str, float]], knn: dict[str, float]) -> dict[str, float]:
    """Return the three figures in percent.

    Args:
        metrics: metrics by data set: ``acc1``, or recalls at 1, 5 and 10 in both directions.
        knn: k-NN accuracies, ``knn@10`` and so on. The figure is the best one, as DINOv2 reports it.
    """
    keys = [f"{side}_retrieval_recall@{k}" for side in ("text", "image") for k in (1, 5, 10)]
    recalls = [metrics[name][key] for name in RETRIEVAL for key in keys]
    top1 = [metrics[name]["acc1"] for name in CLASSIFICATION]
    return dict(zip(FIGURES, (100 * mean(top1), 100 * mean(recalls), 100 * max(knn.values())), strict=True))
