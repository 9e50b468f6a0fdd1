"""Optional dependencies: a missing one is one sentence with the command that installs it."""

from __future__ import annotations

import importlib
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
        raise DgmrError(f"{(error.name or module).split('.')[0]} is not installed; run: pip install 'dgmr-tp[{extra}]'") from error
