"""The command line. Every command is one call into the library; a user error is one message and exit code 2."""

from __future__ import annotations

import atexit
import signal
import sys
from typing import Any

from dgmr_tp.utils.interrupts import CODE, handle_interrupts


def main() -> None:
    """Run ``dgmr-tp``. The commands are imported inside, so that an interrupt of their import has no traceback."""
    with handle_interrupts():
        try:
            from dgmr_tp.cli.commands import run_command

            run_command()
        except KeyboardInterrupt:
            sys.exit(CODE)
        finally:
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the command has ended


def __getattr__(name: str) -> Any:
    if name == "app":
        from dgmr_tp.cli.commands import app

        return app
    raise AttributeError(f"module 'dgmr_tp.cli' has no attribute {name!r}")
