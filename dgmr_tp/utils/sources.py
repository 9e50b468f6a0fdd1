"""Sources of data as a user writes them: paths with ``~`` and braces, or URLs of shards."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from dgmr_tp.errors import DgmrError

EXIF_PREFIX = "exif:"
"""Prefix of a source whose photos are turned as their EXIF orientation says."""
SHELL_PREFIX = "pipe:"
"""Prefix of a shell command that writes a shard to its standard output."""
SHELL_CHARACTERS = re.compile(r"[\s'\"`$;|<>\\]")
"""Characters that URLs do not need, and that are commands to a shell. Some versions of webdataset pass URLs to one."""


@dataclass(frozen=True)
class Source:
    """A source, with its braces expanded."""

    text: str
    """The source as it was written."""
    parts: tuple[str, ...]
    """Paths, in which ``~`` is replaced, or URLs."""
    upright: bool = False
    """Turn photos as their EXIF orientation says."""

    @classmethod
    def parse(cls, source: str | Path) -> Source:
        """Return the source that a text means.

        ``{000..099}`` and ``{a,b}`` mean several paths or URLs, and ``::`` joins them. A path that exists is taken as
        it is written.

        Raises:
            DgmrError: the text is empty.
        """
        text = str(source)
        upright = text.startswith(EXIF_PREFIX)
        location = text.removeprefix(EXIF_PREFIX)
        if not location.strip():
            raise DgmrError(
                f"the source {text!r} of images is empty. Give a folder, a .tar or URLs; a shell variable that is not "
                "set is empty."
            )
        path = os.path.expanduser(location)
        if os.path.lexists(path):
            return cls(text, (path,), upright)
        parts = [part for joined in location.split("::") for part in _expand_braces(joined)]
        parts = [part if _is_remote(part) else os.path.expanduser(part) for part in parts]
        return cls(text, tuple(dict.fromkeys(parts)), upright)

    @property
    def is_url(self) -> bool:
        """True if a part is not a path."""
        return any(_is_remote(part) for part in self.parts)

    @property
    def runs_command(self) -> bool:
        """True if reading the source runs a shell command."""
        return any(
            part.startswith(SHELL_PREFIX) or ("://" in part and SHELL_CHARACTERS.search(part)) for part in self.parts
        )

    @property
    def missing(self) -> list[str]:
        """The paths that do not exist."""
        return [part for part in self.parts if not _is_remote(part) and not os.path.exists(part)]


def is_url(source: str | Path) -> bool:
    """Return whether webdataset opens ``source``: ``https://host/{000..099}.tar`` or ``pipe:aws s3 cp s3://… -``."""
    return Source.parse(source).is_url


def _is_remote(part: str) -> bool:
    return part.startswith(SHELL_PREFIX) or "://" in part


def _expand_braces(text: str) -> list[str]:
    try:
        return list(braceexpand(text))
    except ValueError:  # braces that are not balanced
        return [text]
