"""Ctrl-C: the process ends with 130, without a traceback, and no library swallows it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CODE = 130
"""Exit code of a process that Ctrl-C ended: 128 + SIGINT."""
SWALLOWING_PACKAGES = ("importlib", "torch_pruning")
"""Packages in whose frames KeyboardInterrupt is not raised.

Imports of many libraries are in a ``try`` whose ``except:`` would swallow it, and torch-pruning has one around a
forward pass, too.
"""
RETRY_S = 0.05
"""Seconds until a deferred interrupt is tried again."""

_open_outputs: list[str] = []


@contextmanager
def output_open(path: object) -> Iterator[None]:
    """State that an output is incomplete in the context, so that an interrupt must let its writer clean up."""
    _open_outputs.append(str(path))
    try:
        yield
    finally:
        _open_outputs.remove(str(path))


@contextmanager
def handle_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGINT, wherever it cannot be swallowed.

    Inside an import the process ends at once. If an output is incomplete, the interrupt waits for the end of the
    import instead. Nothing changes outside the main thread, and where SIGINT is ignored, as in a background job.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    process, main_thread = os.getpid(), threading.get_ident()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process or not _can_be_swallowed(frame):
            raise KeyboardInterrupt
        if not _open_outputs:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(CODE)
        timer = threading.Timer(RETRY_S, signal.pthread_kill, (main_thread, number))  # also ends a blocking call
        timer.daemon = True
        timer.start()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _can_be_swallowed(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] in SWALLOWING_PACKAGES:
            return True
        frame = frame.f_back
    return False
