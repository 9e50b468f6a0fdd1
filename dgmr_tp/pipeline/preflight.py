"""What a recipe needs and does not have is said before its first stage runs."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from dgmr_tp.data.images import Images
from dgmr_tp.data.streams import is_url
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.recipe import Recipe
from dgmr_tp.pipeline.run_directory import TRAININGS
from dgmr_tp.utils.lazy_imports import require_installed


def check_needs(recipe: Recipe) -> None:
    """Raises DgmrError if a package, a file or a part of the model is missing that some stage needs."""
    _check_packages(recipe)
    _check_paths(recipe)
    _check_images(recipe)
    _check_model(recipe)


def _check_packages(recipe: Recipe) -> None:
    needed = {
        "distill": ["deepspeed"] if recipe.distill or recipe.tune_text else [],
        "eval": (["clip_benchmark"] if recipe.evaluate and recipe.evaluate.datasets else [])
        + (["faiss"] if recipe.compare else []),
        "export": ["onnxscript", "onnxruntime"] if recipe.export else [],
    }
    for extra, packages in needed.items():
        for package in packages:
            require_installed(package, extra)


def _check_paths(recipe: Recipe) -> None:
    paths = {"images": recipe.images}
    for stage in TRAININGS:
        for key in ("hostfile", "deepspeed", "captions", "images"):
            if path := getattr(getattr(recipe, stage), key, None):
                paths[f"{stage}.{key}"] = path
    for reads in (recipe.evaluate, recipe.compare):
        paths |= reads.paths if reads else {}
    for key, path in paths.items():
        if not path.startswith("scenes:") and not (key == "images" and is_url(path)) and not Path(path).exists():
            raise DgmrError(f"{key}: {path} does not exist")
        if key.endswith(".hostfile"):
            _check_hosts(key, path)
    if recipe.tune_text and not recipe.tune_text.captions.startswith("scenes:"):
        from dgmr_tp.data.captions import CaptionedImages

        CaptionedImages.find(recipe.tune_text.captions, recipe.tune_text.images)


def _check_hosts(key: str, hosts: str) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        machines = fetch_hostfile(hosts)
    except ValueError as error:
        raise DgmrError(f"{key}: {hosts}: {error}; it takes lines such as node1 slots=8") from error
    if len(machines) > 1 and not shutil.which("pdsh"):
        raise DgmrError(
            f"{key}: {hosts}: the deepspeed launcher reaches other machines by pdsh, which is not installed; install it, or start the "
            "processes yourself (docs/distillation.md)"
        )


def _check_images(recipe: Recipe) -> None:
    if is_url(recipe.images):
        for key, none in (("held_out", "0"), ("fixed_crops", "false"), ("keep_features", "false")):
            if getattr(recipe.distill, key, None):
                raise DgmrError(f"distill.{key}: shards behind a URL cannot be divided or numbered; set it to {none}")
        if recipe.prune.promises:
            raise DgmrError(
                "prune.min_cosine and prune.max_drop need images at hand, not behind a URL; name a folder or a local shard"
            )
    if recipe.prune.promises and not recipe.images.startswith("scenes:"):
        found, least = Images.find(recipe.images), recipe.calibration + recipe.prune.held_out
        if len(found) < least:
            raise DgmrError(
                f"images: {recipe.images} holds {len(found)}; recover.images and prune.held_out together are {least}"
            )
        if recipe.prune.max_drop is not None and any(record.label is None for record in found.records):
            raise DgmrError(
                f"prune.max_drop: not every image in {recipe.images} has a class; give sub-folders, or min_cosine"
            )


def _check_model(recipe: Recipe) -> None:
    @cache
    def shapes() -> OpenedModel:
        """The original without weights: enough to see what it has."""
        return open_model(**recipe.model.options, pretrained=recipe.model.pretrained, weights="none")

    if recipe.evaluate and recipe.evaluate.head and not recipe.evaluate.head.weights:
        from dgmr_tp.evaluation.linear_head import check_classifier

        check_classifier(shapes())
    speaking = {
        "export.text": recipe.export and recipe.export.text,
        "compare.classes": recipe.compare and recipe.compare.classes and not recipe.compare.classes.endswith(".pt"),
    }
    keys = [key for key, asked in speaking.items() if asked]
    if keys and (shapes().text is None or (shapes().library == "transformers" and shapes().tokenizer is None)):
        raise DgmrError(
            f"{keys[0]}: {recipe.model.source} has no text tower, or no tokenizer's files; leave that key out"
        )
    if not recipe.prune.promises and recipe.prune.threshold is None:
        from dgmr_tp.compression.criteria import SEEING, check_amount

        for size, amount in recipe.prune.sizes.items():
            if amount.get("budget") and recipe.prune.criterion not in SEEING:
                continue  # met or refused at once, without images
            try:
                check_amount(shapes(), **amount)
            except DgmrError as error:
                raise DgmrError(f"prune, {size}: {error}") from error
    if recipe.tune_text:
        from dgmr_tp.distillation.text import has_text_tower

        if not has_text_tower(shapes()):
            raise DgmrError(
                f"tune_text: {recipe.model.source} has no text tower that can be tuned; it takes a CLIP of open_clip's"
            )
