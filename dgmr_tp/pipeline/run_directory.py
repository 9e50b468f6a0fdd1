"""The steps of a run directory: each is done whole or not at all, and true only while what it was made from is.

A finished step's folder has a ``manifest.json`` with what it was made from (its part of the recipe, its inputs' hashes, the package
versions) and its figures. A step works in a folder beside its own and renames it when it is done; only trainings and searches leave
something there to go on from.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import files_below, sha256, write_whole

PACKAGES = (
    "dgmr-tp",
    "torch",
    "torch-pruning",
    "numpy",
    "scipy",
    "open_clip_torch",
    "timm",
    "deepspeed",
    "clip_benchmark",
    "onnx",
    "onnxruntime",
)
JOURNAL = "search.json"
"""What AMP's search decided so far; a step that was interrupted goes on from it."""
TRAININGS = ("distill", "tune_text")
"""Stages that leave checkpoints to go on from."""


@dataclass(frozen=True)
class Step:
    """One unit of work: a stage for one size."""

    stage: str
    size: str
    section: dict[str, Any]
    """The part of the recipe that decides the outcome."""
    inputs: tuple[str, ...]
    """Keys of the steps whose results it reads."""
    work: Callable[[Path], dict[str, Any]] = field(compare=False)
    """Fills the folder and returns figures."""

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.size}"


class RunDirectory:
    """A folder per stage and, in it, one per size."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.versions = versions()

    def folder(self, key: str) -> Path:
        """Of a finished step."""
        return self.directory / key

    def figures(self, key: str) -> dict[str, Any] | None:
        """What a finished step measured; None if it has not run."""
        path = self.folder(key) / "manifest.json"
        return json.loads(path.read_text())["figures"] if path.exists() else None

    def _made_from(self, step: Step) -> dict[str, Any]:
        manifests = {key: self.folder(key) / "manifest.json" for key in step.inputs}
        inputs = {key: sha256(path) if path.exists() else None for key, path in manifests.items()}
        return json.loads(
            json.dumps({"stage": step.stage, "recipe": step.section, "inputs": inputs, "versions": self.versions})
        )

    def is_done(self, step: Step) -> bool:
        return (self.folder(step.key) / "manifest.json").exists()

    def check_still_true(self, step: Step) -> None:
        """Raises DgmrError if what is there of a step was made from something else."""
        from dgmr_tp.distillation.checkpoints import MANIFEST

        path, note = self.folder(step.key) / "manifest.json", self.aside(step) / "made_from.json"
        try:
            if path.exists():
                stored = json.loads(path.read_text())["made_from"]
            elif (
                step.stage in TRAININGS and note.exists() and any(note.parent.glob(f"checkpoints/*/{MANIFEST}"))
            ):  # worth keeping
                stored = json.loads(note.read_text())
            else:
                return
        except (ValueError, KeyError) as error:
            raise DgmrError(f"{path} is damaged; run again with --redo {step.stage}") from error
        if changed := _differences(stored, self._made_from(step)):
            raise DgmrError(
                f"{step.key} in {self.directory} was made from something else: {'; '.join(changed)}. Either redo it and what comes after "
                f"(--redo {step.stage}), or name a new directory (-o)"
            )

    def partial(self, step: Step) -> Path:
        """The folder in which a step works; what lies there from an interrupted attempt stays only if it was the same."""
        aside = self.aside(step)
        made_from = self._made_from(step)
        note = aside / "made_from.json"
        goes_on = step.stage in TRAININGS or (aside / JOURNAL).exists() or (aside / "manifest.json").exists()
        if aside.exists() and not (goes_on and note.exists() and json.loads(note.read_text()) == made_from):
            shutil.rmtree(aside)
        aside.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            write_whole(note, json.dumps(made_from, indent=1) + "\n")
        return aside

    def aside(self, step: Step) -> Path:
        """Where a step works until it is done."""
        final = self.folder(step.key)
        return final.with_name(f".{final.name}.partial")

    def do(self, step: Step) -> None:
        """Do its work and give its folder the final name."""
        folder = self.partial(step)
        manifest = folder / "manifest.json"
        if not manifest.exists():  # otherwise all was done but the rest of this
            figures = step.work(folder)
            write_whole(manifest, json.dumps({"made_from": self._made_from(step), "figures": figures}, indent=1) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(self.folder(step.key), ignore_errors=True)  # one whose manifest was taken away
        os.rename(folder, self.folder(step.key))
        (self.folder(step.key) / "made_from.json").unlink(missing_ok=True)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(source: str) -> str | None:
    """Names and sizes of the files of a local path, hashed; None for what is no path."""
    path = Path(source.removeprefix("local-dir:"))
    if not path.exists():
        return None
    return digest([(str(p.relative_to(path)), p.stat().st_size) for p in files_below(path)])


def digest(value: Any) -> str:
    """A hash of what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Every leaf that differs, as ``key: old → new``."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    if before == now:
        return []
    if path.startswith("inputs."):
        return [f"its input {path.removeprefix('inputs.')} changed"]
    if path.endswith(("files", "sha256")):
        return [f"{path}: what lies there changed"]
    return [f"{path}: {before} → {now}"]
