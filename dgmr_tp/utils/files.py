"""Files that appear whole or not at all, and folders that one process works in at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO

from dgmr_tp.errors import DgmrError


class Held(DgmrError):
    """Another process works there."""


def write_whole(path: Path, text: str) -> None:
    """Write aside, then rename: a reader or a kill never meets half of it."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, errors="surrogateescape")  # names of files may be no UTF-8
    os.replace(aside, path)


def files_below(source: Path) -> list[Path]:
    """All files of a folder, by name, through links to folders too; a file alone is itself."""
    if not source.is_dir():
        return [source]
    found, known = [], set()
    for folder, inside, names in os.walk(source, followlinks=True):
        if (real := os.path.realpath(folder)) in known:  # a link to what it lies in
            inside.clear()
            continue
        known.add(real)
        found += [Path(folder, name) for name in names]
    return sorted(path for path in found if path.is_file())


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hold(directory: Path, what: str) -> IO[str]:
    """Take ``directory`` for this process until the stream returned is closed.

    Raises:
        Held: another process holds it; ``what`` says what that is.
        DgmrError: its file system has no locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stream = (directory / "lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise Held(f"another {what} in {directory}; wait for it or stop it") from error
    except OSError as error:
        stream.close()
        raise DgmrError(
            f"the file system of {directory} has no locks ({error.strerror}); mount it with them (Lustre: flock), or name another directory"
        ) from error
    return stream
