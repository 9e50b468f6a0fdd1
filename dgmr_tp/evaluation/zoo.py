"""The three figures of DGMR's model zoo, beside the published ones (arXiv 2506.08591, its README; arXiv 2603.08100 tables 1 and 2)."""

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
"""Percent: mean of the six ImageNets' top-1, mean of the twelve recalls, k-NN on ImageNet."""


def find_zoo(root: Path) -> dict[str, tuple[str, Path]]:
    """Where each of the zoo's data sets lies below ``root``: by its name, clip_benchmark's name for it and its folder.

    ``root/NAME`` is webdataset shards (with ``test/nshards.txt``; needs no network) or what clip_benchmark keeps for NAME.

    Raises:
        DgmrError: folders are missing; names all of them.
    """
    wanted = (*CLASSIFICATION, *RETRIEVAL)
    if missing := [name for name in wanted if not (root / name).is_dir()]:
        raise DgmrError(f"{root} lacks {', '.join(missing)}; the suite needs a folder for each of {', '.join(wanted)}")
    return {
        name: (f"wds/{name}" if (root / name / "test" / "nshards.txt").exists() else name, root / name)
        for name in wanted
    }


def knn_folders(root: Path) -> tuple[Path, Path]:
    """ImageNet's training images and those that are judged: ``imagenet1k/train`` and ``imagenet1k/test`` or ``imagenet1k/val``.

    Raises:
        DgmrError: one of them is not there.
    """
    train = root / "imagenet1k" / "train"
    judged = next((path for name in ("test", "val") if (path := root / "imagenet1k" / name).is_dir()), None)
    if not train.is_dir() or judged is None:
        raise DgmrError(f"{root / 'imagenet1k'} needs the folders train and test (or val) for k-NN")
    return train, judged


def zoo_figures(metrics: dict[str, dict[str, float]], knn: dict[str, float]) -> dict[str, float]:
    """The three figures, percent, from every data set's metrics and the k-NN accuracies (the best k, as DINOv2 reports it).

    Args:
        metrics: by data set: ``acc1``, or recalls at 1, 5 and 10 in both directions.
        knn: ``knn@10`` and so on.
    """
    recalls = [
        metrics[name][f"{side}_retrieval_recall@{k}"]
        for name in RETRIEVAL
        for side in ("text", "image")
        for k in (1, 5, 10)
    ]
    top1 = [metrics[name]["acc1"] for name in CLASSIFICATION]
    return dict(zip(FIGURES, (100 * mean(top1), 100 * mean(recalls), 100 * max(knn.values())), strict=True))
