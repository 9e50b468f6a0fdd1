"""Inputs that people bring, and what each command must do with them.

A module holds the cases of one kind in ``CASES``. Adding a case is adding an entry. ``tests/test_inputs.py`` runs every
case in a folder of its own.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dgmr_tp.data.scenes import Scene


@dataclass(frozen=True)
class Case:
    """An input, the command that reads it, and the correct outcome."""

    name: str
    command: str
    """Arguments of ``dgmr-tp`` as in a shell. The working directory is the case's folder."""
    make: Callable[[Path], object] = lambda folder: None
    """Writes the input into the case's folder."""
    code: int = 2
    """Exit code. 2: the command refuses the input in one message."""
    says: str = ""
    """Part of the output, with any white space as a single space."""
    leaves: tuple[str, ...] = ()
    """Names in the case's folder that the command adds. No other name may be new."""


def all_cases() -> list[Case]:
    """Return the cases of every module in this package."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [case for name in names for case in importlib.import_module(f"{__name__}.{name}").CASES]


def picture(index: int = 0, file_format: str = "PNG") -> bytes:
    """Return an encoded image of a generated scene."""
    data = io.BytesIO()
    Image.fromarray(Scene.draw(30, index).image()).save(data, file_format)
    return data.getvalue()


def pictures(folder: Path, names: list[str]) -> None:
    """Write one generated scene per name, such as ``cat/0.png``."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(index))


def tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Write an uncompressed tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
