"""Atomic outputs, their checks before the work, JSON of this package, checksums, and locks on directories."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.utils.interrupts import output_open

LOCK_NAME = "lock"
MAX_NAME_BYTES = 255
"""Longest file name of most file systems, where a file system states none."""
STALE_AFTER_S = 60
"""Age of a temporary file of :func:`atomic_write` at which its writer must have been killed."""
REMEDIES = {
    errno.ENOSPC: "Free disk space, or name another directory.",
    errno.EDQUOT: "Free disk space of your quota, or name another directory.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or name another directory.",
}
"""What to do about an error of writing, by number."""
V = TypeVar("V")
SIDE_FILES = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"})
"""Files and folders that file managers, archivers and network disks leave next to the data."""


class DirectoryLocked(DgmrError):
    """Another process holds the lock of a directory."""


def staging_path(path: Path) -> Path:
    """Return the path that a file or directory is written to before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.partial")


def check_output(path: Path, *, replace: bool = False) -> None:
    """Check that ``path`` can be written, before the work that it is for.

    Args:
        path: a file or directory. Missing parent directories are made later.
        replace: an existing file is replaced.

    Raises:
        DgmrError: it exists, its name is not possible, or its directory cannot be written to.
    """
    try:
        name = os.fsencode(f".{path.name}.12345678.partial")  # the longest name on the way to it
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise DgmrError(
            f"the name {str(path)!a} cannot be written in the encoding of this system. Use ASCII characters, or "
            "set LC_ALL=C.UTF-8."
        ) from error
    if path.is_symlink() and not path.exists():
        raise DgmrError(f"{path} is a link to {os.readlink(path)}, which does not exist. Name another output.")
    if path.exists() and not (replace and path.is_file()):
        raise DgmrError(f"{path} exists already. Name another output.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise DgmrError(f"{path} cannot be made, because {parent} is a file. Name another output.")
    if len(name) > (limit := _longest_name(parent)):
        longest = limit - len(name) + len(os.fsencode(path.name))
        raise DgmrError(f"the name {path.name[:40]}… is too long for {parent}. Use up to {longest} bytes.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DgmrError(f"{path} cannot be made, because {parent} cannot be written to. Name another output.")


def check_output_directory(path: Path) -> None:
    """Check that files can be written into ``path``, which need not exist. The errors are those of check_output."""
    if not path.is_dir():
        check_output(path)
    elif not os.access(path, os.W_OK | os.X_OK):
        raise DgmrError(f"{path} cannot be written to. Name another directory.")


def _longest_name(directory: Path) -> int:
    try:
        return os.pathconf(directory, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        return MAX_NAME_BYTES


def check_room(directory: Path, size: int, what: str) -> None:
    """Check that a file of ``size`` bytes fits into ``directory``: the disk, the quota and the limit on file sizes.

    Args:
        directory: an existing directory.
        size: bytes.
        what: what needs the room, for the message, such as ``the model``.

    Raises:
        DgmrError: the file does not fit.
    """
    free = shutil.disk_usage(directory).free
    if free < size:
        raise DgmrError(
            f"{what} takes up to {size / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free. Free disk space, or name "
            "another directory."
        )
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            os.posix_fallocate(probe.fileno(), 0, max(1, size))
    except OSError as error:
        if error.errno not in REMEDIES:
            return  # the file system cannot tell
        raise DgmrError(
            f"{what} takes up to {size / 1e6:,.0f} MB, which {directory} has no room for: {error.strerror}. "
            f"{REMEDIES[error.errno]}"
        ) from error


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the errors of writing ``path`` in the context into a DgmrError that names it."""
    try:
        yield
    except Exception as error:  # each library has its own class
        cause = error
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
            cause = OSError(int(match[1]), os.strerror(int(match[1])))
        is_torch_writer = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
        is_safetensors = type(error).__name__ == "SafetensorError"  # that library is not imported for every command
        if not (isinstance(cause, OSError) or is_safetensors or is_torch_writer):
            raise
        number = cause.errno if isinstance(cause, OSError) else None
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(error)
        filename = getattr(error, "filename", None)
        if filename is not None and path.name not in str(filename):
            raise  # it is about a file that is read
        remedy = REMEDIES.get(number or 0, "Name another output.")
        raise DgmrError(f"cannot write {path}: {reason}. {remedy}") from error


def atomic_write(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 to a temporary file and rename it, so that no reader sees an incomplete file.

    Several processes may write the same path at once. The last one wins.
    """
    prefix, suffix = f".{path.name}.", ".partial"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_AFTER_S and leftover.is_file():
                leftover.unlink()
    with write_errors(path), output_open(path):
        descriptor, name = tempfile.mkstemp(suffix, prefix, path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as stream:  # names may not be UTF-8
                stream.write(text)
                stream.flush()
                os.fsync(descriptor)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync(path.parent)


@contextmanager
def staging_directory(
    path: Path, activity: str = "process is writing", *, resumable: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a locked, empty directory that is renamed to ``path`` at the end of the context.

    It is removed after an error. What a killed process left is removed at the next start.

    Args:
        path: the output. Missing parent directories are made.
        activity: what the holder of the lock does, for the error of the others.
        resumable: names in the directory that stay from an interrupted attempt and after an error, such as a journal.

    Raises:
        DirectoryLocked: another process writes ``path``.
        DgmrError: see :func:`check_output`; or an error of writing, which names ``path``.
    """
    with _locked_staging(path, activity, resumable) as staging:
        yield staging
        sync_tree(staging)
        os.rename(staging, path)  # with the lock: another process must not find a staging directory without one
        sync(path.absolute().parent)
        (path / LOCK_NAME).unlink(missing_ok=True)


@contextmanager
def staging_file(
    path: Path, activity: str = "process is writing", *, resumable: Sequence[str] = (), replace: bool = False
) -> Iterator[Path]:
    """Yield a path in a locked staging directory. The file there is renamed to ``path`` at the end of the context.

    The arguments and errors are those of :func:`staging_directory`. With ``replace``, an existing file is replaced.
    """
    with _locked_staging(path, activity, resumable, replace=replace) as staging:
        yield staging / path.name
        sync(staging / path.name)
        os.replace(staging / path.name, path)
        sync(path.absolute().parent)
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked_staging(path: Path, activity: str, resumable: Sequence[str], *, replace: bool = False) -> Iterator[Path]:
    check_output(path, replace=replace)
    staging = staging_path(path)
    if staging.is_file():  # of an earlier version
        staging.unlink()
    with write_errors(path), output_open(path), lock_directory(staging, activity, required=False):
        if not staging.is_dir():
            raise DirectoryLocked(f"another {activity} in {staging}. Wait for it or stop it.")
        try:
            check_output(path, replace=replace)  # another process may have finished in between
            _empty(staging, (LOCK_NAME, *resumable))
            yield staging
        except BaseException:
            if not any((staging / name).exists() for name in resumable):
                shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def scratch_directory(path: Path, activity: str = "process is writing") -> Iterator[Path]:
    """Yield a locked, empty directory for intermediate files, ``.NAME.partial``. It is removed at the end.

    What a killed process left in it is removed at the next start. Parent directories that were made for it are removed
    with it if they are empty.

    Raises:
        DirectoryLocked: another process uses it.
    """
    directory = staging_path(path)
    made = [parent for parent in directory.absolute().parents if not parent.exists()]
    try:
        with output_open(directory), lock_directory(directory, activity, required=False):
            try:
                _empty(directory, (LOCK_NAME,))
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _empty(directory: Path, keep: Sequence[str]) -> None:
    for entry in directory.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk. File systems without this are ignored."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until all files below a directory are on the disk."""
    for entry in (*directory.rglob("*"), directory):
        sync(entry)


def read_json(path: Path, parse: Callable[[Any], V] = lambda content: content, *, remedy: str) -> V:
    """Read a JSON file of this package.

    Args:
        path: the file.
        parse: takes what is needed out of the content. Its KeyError, TypeError and the like mean a damaged file.
        remedy: sentence that says what to do about a damaged file.

    Raises:
        DgmrError: the file cannot be read or is damaged; names it.
    """
    try:
        return parse(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise DgmrError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DgmrError(f"{path} is damaged: {type(error).__name__}: {first_line(error)}. {remedy}") from error


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
def lock_directory(directory: Path, activity: str, *, required: bool = True) -> Iterator[None]:
    """Hold the lock of ``directory``, which is made if it does not exist.

    Args:
        directory: the directory.
        activity: what the holder does, for the error message, such as ``dgmr-tp run is working``.
        required: a file system without locks is an error. Otherwise the directory is used without one.

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
    except (OSError, NotImplementedError) as error:
        number = getattr(error, "errno", errno.ENOSYS)
        if number == errno.ENOENT:  # its holder has just renamed the directory
            raise DirectoryLocked(f"another {activity} in {directory}. Wait for it or stop it.") from error
        if number not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        if required:
            raise DgmrError(
                f"the file system of {directory} has no locks ({os.strerror(number)}). Mount it with locks (Lustre: "
                "flock), or name another directory."
            ) from error
    try:
        yield
    finally:
        lock.release()
