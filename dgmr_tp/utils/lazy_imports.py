"""Optional dependencies: a missing one is one sentence with the command that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from dgmr_tp.errors import DgmrError


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the extra ``dgmr-tp[extra]`` installs.

    Raises:
        DgmrError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module, extra) from error


def require_installed(module: str, extra: str) -> None:
    """The same without importing it, for a module that only another process needs."""
    try:
        found = importlib.util.find_spec(module)
    except ValueError:  # what find_spec says of a module that was blocked
        found = None
    if found is None:
        raise _missing(module, extra)


def _missing(module: str, extra: str) -> DgmrError:
    return DgmrError(f"{module.split('.')[0]} is not installed; run: pip install 'dgmr-tp[{extra}]'")
