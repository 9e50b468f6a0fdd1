"""Import optional dependencies. A missing one is an error with the command that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from dgmr_tp.errors import DgmrError


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        module: dotted name of the module.
        extra: the extra of dgmr-tp that installs it, such as ``encoders``.

    Raises:
        DgmrError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module, extra) from error


def require_installed(module: str, extra: str) -> None:
    """Check that ``module`` is installed without importing it.

    The arguments and errors are those of :func:`require`.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # sys.modules[module] is None
        spec = None
    if spec is None:
        raise _missing(module, extra)


def _missing(module: str, extra: str) -> DgmrError:
    return DgmrError(f"{module.split('.')[0]} is not installed. Run: pip install 'dgmr-tp[{extra}]'")
