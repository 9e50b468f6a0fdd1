"""Atomic files, checksums, and locks on directories."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dgmr_tp.errors import DgmrError

LOCK_NAME = "lock"


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


def list_files(source: Path) -> list[Path]:
    """Return all files below a directory, sorted, following links to directories. A file is returned as itself."""
    if not source.is_dir():
        return [source]
    files, visited = [], set()
    for folder, subfolders, names in os.walk(source, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link to a parent directory
            subfolders.clear()
            continue
        visited.add(real)
        files += [Path(folder, name) for name in names]
    return sorted(path for path in files if path.is_file())


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
