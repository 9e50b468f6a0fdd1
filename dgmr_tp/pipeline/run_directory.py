"""A run directory: a folder per stage and, in it, one per step.

A finished step's folder holds ``manifest.json``: what the step was made from (its section of the recipe, its inputs'
hashes, the package versions) and its figures. A step works in a staging directory and is renamed when it is complete.
Training stages leave checkpoints there, AMP's search a journal, and both resume from them.
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dgmr_tp.distillation.checkpoints import MANIFEST as CHECKPOINT_MANIFEST
from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import (
    list_files,
    read_json,
    sha256,
    staging_path,
    sync,
    sync_tree,
    to_json,
    write_errors,
    write_json,
)
from dgmr_tp.utils.sources import Source

MANIFEST = "manifest.json"
REQUEST = "made_from.json"
"""File in a staging directory that records the step's inputs."""
ACCEPTED = "accepted_versions.json"
"""File in a run directory that records which changes of package versions were accepted, by whom and when."""
JOURNAL = "search.json"
"""The decisions of AMP's search so far. An interrupted step resumes from it."""


@dataclass(frozen=True)
class Step:
    """One unit of work: a stage for one size."""

    stage: str
    size: str
    describe: Callable[[], dict[str, Any]] = field(compare=False)
    """Returns everything in the recipe and its files that decides the outcome. Called only when it is needed, because
    it may look at every file of a data set."""
    inputs: tuple[str, ...]
    """Keys of the steps whose results it reads."""
    work: Callable[[Path], dict[str, Any]] = field(compare=False)
    """Fills the folder and returns figures."""
    runs_first: bool = False
    """Run before all other steps, to detect errors before expensive work."""
    packages: tuple[str, ...] = ()
    """Packages whose versions decide the outcome."""
    has_checkpoints: bool = False
    """Leaves checkpoints that another start resumes from."""

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.size}"

    @cached_property
    def section(self) -> dict[str, Any]:
        """Result of :attr:`describe`, computed once."""
        return self.describe()


class RunDirectory:
    """The manifests and staging directories of a run."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)

    def folder(self, key: str) -> Path:
        """Return the output directory of a finished step."""
        return self.path / key

    def staging(self, step: Step) -> Path:
        """Return the directory in which a step works until it is finished."""
        return staging_path(self.folder(step.key))

    def figures(self, key: str) -> dict[str, Any] | None:
        """Return the figures of a finished step; None if it has not run."""
        path = self.folder(key) / MANIFEST
        if not path.exists():
            return None
        remedy = f"Run again with --redo {key.partition('/')[0]}."
        return read_json(path, lambda content: dict(content["figures"]), remedy=remedy)

    def is_done(self, step: Step) -> bool:
        """Return whether the step is finished."""
        return (self.folder(step.key) / MANIFEST).exists()

    def check_unchanged(self, step: Step, *, accept_versions: bool = False) -> None:
        """Check what a finished step, or one with checkpoints, was made from.

        Args:
            step: the step.
            accept_versions: keep the step if only versions of packages changed, and record that in :data:`ACCEPTED`.

        Raises:
            DgmrError: it was made from something else, or with versions of packages that were not accepted.
        """
        source, request = self.folder(step.key) / MANIFEST, self.staging(step) / REQUEST
        if not source.exists():
            source = request
            if not step.has_checkpoints or not any(request.parent.glob(f"checkpoints/*/{CHECKPOINT_MANIFEST}")):
                return
        stored = read_json(
            source,
            lambda content: dict(content if source == request else content["made_from"]),
            remedy=f"Run again with --redo {step.stage}.",
        )
        others, versions = self._changes(step, stored)
        if others:
            raise DgmrError(
                f"{step.key} in {self.path} was made from something else: {'; '.join(others)}. Either redo it "
                f"and what comes after it (--redo {step.stage}), or name a new directory (-o)."
            )
        if versions and not accept_versions:
            raise DgmrError(
                f"{step.key} in {self.path} was made with other versions: {'; '.join(versions)}. Redo it and what "
                f"comes after it (--redo {step.stage}), name a new directory (-o), or keep it (--accept-versions)."
            )
        if versions:
            entry = {"step": step.key, "changes": versions, "by": getpass.getuser(), "date": time.strftime("%FT%T%z")}
            write_json(self.path / ACCEPTED, [*self._accepted(), entry])

    def _changes(self, step: Step, stored: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Return what differs between a step's stored inputs and today's: versions that were not accepted, and others.

        A package that is not installed on one side was not used there.
        """
        now = self._made_from(step)
        common = stored["versions"].keys() & now["versions"].keys()
        before, after = ({name: made_from["versions"][name] for name in sorted(common)} for made_from in (stored, now))
        accepted = {change for entry in self._accepted() if entry["step"] == step.key for change in entry["changes"]}
        versions = [change for change in _differences(before, after) if change not in accepted]
        return _differences({**stored, "versions": {}}, {**now, "versions": {}}), versions

    def _accepted(self) -> list[dict[str, Any]]:
        path = self.path / ACCEPTED
        return read_json(path, list, remedy="Delete the file to accept again.") if path.exists() else []

    def prepare(self, step: Step) -> Path:
        """Return the step's staging directory, without the files of an interrupted attempt that cannot be resumed."""
        staging = self.staging(step)
        request = staging / REQUEST
        resumable = step.has_checkpoints or (staging / JOURNAL).exists() or (staging / MANIFEST).exists()
        stored = _read_json_or_none(request)
        if staging.exists() and not (resumable and stored and self._changes(step, stored) == ([], [])):
            shutil.rmtree(staging)
        staging.mkdir(parents=True, exist_ok=True)
        if not request.exists():
            write_json(request, self._made_from(step))
        return staging

    def run_step(self, step: Step) -> None:
        """Do the work of a step and give its folder the final name."""
        staging = self.prepare(step)
        manifest = staging / MANIFEST
        if not manifest.exists():  # otherwise only the rest of this method is left to do
            with write_errors(self.folder(step.key)):
                figures = step.work(staging)
            write_json(manifest, {"made_from": self._made_from(step), "figures": figures})
        sync_tree(staging)
        shutil.rmtree(staging / "checkpoints", ignore_errors=True)
        shutil.rmtree(self.folder(step.key), ignore_errors=True)  # a folder without its manifest
        os.rename(staging, self.folder(step.key))
        sync(self.folder(step.key).parent)
        (self.folder(step.key) / REQUEST).unlink(missing_ok=True)

    def _made_from(self, step: Step) -> dict[str, Any]:
        manifests = {key: self.folder(key) / MANIFEST for key in step.inputs}
        inputs = {key: sha256(path) if path.exists() else None for key, path in manifests.items()}
        made_from = {"stage": step.stage, "recipe": step.section, "inputs": inputs}
        made_from["versions"] = package_versions(step.packages)
        return json.loads(to_json(made_from))


def _read_json_or_none(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or damaged."""
    try:
        return read_json(path, remedy="It is ignored.")
    except DgmrError:
        return None


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def fingerprint(source: str) -> str | None:
    """Return a hash of the names and sizes of all files at a source; None if it is not on disk."""
    parsed = Source.parse(source.removeprefix("local-dir:"))
    if parsed.is_url or parsed.missing:
        return None
    files = [(str(file.relative_to(part)), file) for part in parsed.parts for file in list_files(Path(part))]
    return digest([(name, file.stat().st_size if file.exists() else 0) for name, file in files])


def digest(value: Any) -> str:
    """Return a hash of a value that JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Return every leaf that differs, as ``key: old → new``."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in [*before, *(key for key in now if key not in before)]:
            lines += _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return lines
    if before == now:
        return []
    if path.startswith("inputs."):
        return [f"its input {path.removeprefix('inputs.')} changed"]
    if path.endswith(("files", "sha256")):
        return [f"{path}: the files changed"]
    return [f"{path}: {before} → {now}"]
