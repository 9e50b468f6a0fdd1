"""Atomic files, checksums, and locks on directories."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dgmr_tp.errors import DgmrError

LOCK_NAME = "lock"
SIDE_FILES = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"})
"""Files and folders that file managers, archivers and network disks leave next to the data."""


class DirectoryLocked(DgmrError):
    """Another process holds the lock of a directory."""


def staging_path(path: Path) -> Path:
    """Return the path that a file or directory is written to before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.partial")


def atomic_write(path: Path, text: str) -> None:
    """Write ``text`` to the staging path and rename it, so that no reader sees an incomplete file."""
    staging = staging_path(path)
    staging.write_text(text, errors="surrogateescape")  # file names in it may not be UTF-8
    os.replace(staging, path)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return the JSON text of a value. Numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    atomic_write(path, to_json(value, indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def is_side_file(name: str) -> bool:
    """Return whether a file or folder of this name belongs to a tool and not to the data: hidden, or a known name."""
    return name.startswith(".") or name in SIDE_FILES


def list_files(source: Path) -> list[Path]:
    """Return all files below a directory, sorted, following links to directories. A file is returned as itself.

    Files of tools (:func:`is_side_file`) are left out. A link whose target is missing is a file that cannot be read.

    Raises:
        DgmrError: a directory cannot be listed.
    """
    if not source.is_dir():
        return [source]
    files, visited = [], set()
    for folder, subfolders, names in os.walk(source, followlinks=True, onerror=_refuse_folder):
        if (real := os.path.realpath(folder)) in visited:  # a link to a parent directory
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if not is_side_file(name)]
        files += [Path(folder, name) for name in names if not is_side_file(name)]
    return sorted(path for path in files if _is_file_or_dangling_link(path))


def _refuse_folder(error: OSError) -> None:
    raise DgmrError(
        f"cannot list the folder {error.filename}: {error.strerror}. Change its permissions, or move it elsewhere."
    ) from error


def _is_file_or_dangling_link(path: Path) -> bool:
    try:
        return path.is_file() or (path.is_symlink() and not path.exists())
    except PermissionError as error:  # a folder that can be listed, but not entered
        _refuse_folder(PermissionError(error.errno, error.strerror, str(path.parent)))
        raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def lock_directory(directory: Path, activity: str) -> Iterator[None]:
    """Hold the lock of ``directory``, which is made if it does not exist.

    Args:
        directory: the directory.
        activity: what the holder does, for the error message, such as ``dgmr-tp run is working``.

    Raises:
        DirectoryLocked: another process holds the lock.
        DgmrError: the file system has no locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DirectoryLocked(f"another {activity} in {directory}. Wait for it or stop it.") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise DgmrError(
            f"the file system of {directory} has no locks ({error.strerror}). Mount it with locks (Lustre: flock), or "
            "name another directory."
        ) from error
    try:
        yield
    finally:
        lock.release()
