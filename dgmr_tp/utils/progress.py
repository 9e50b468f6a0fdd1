"""Progress of long loops: a bar on a terminal, plain lines elsewhere, nothing when the package is used as a library.

Loops call :func:`report_progress`. The command line listens with :func:`show_progress`; any other caller can listen
with :func:`listen_to_progress`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Listener = Callable[[str, int, int], None]
"""Receives a loop's title, such as ``recover``, the steps done, and the steps in total."""
LINE_INTERVAL_S = 10.0
"""Seconds between two progress lines when the output is not a terminal."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("progress listeners", default=())


def report_progress(title: str, done: int, total: int) -> None:
    """Tell every listener that ``done`` of ``total`` steps of the loop ``title`` are finished."""
    for listener in _listeners.get():
        listener(title, done, total)


@contextmanager
def listen_to_progress(listener: Listener) -> Iterator[None]:
    """Call ``listener`` at every :func:`report_progress` inside the context, after the listeners of outer contexts."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def show_progress() -> Iterator[None]:
    """Show a meter for every reported loop. Only the main process (rank 0) of a launch shows anything."""
    meters: dict[str, Meter] = {}

    def show(title: str, done: int, total: int) -> None:
        for other in meters.keys() - {title}:  # its loop ended before its last step
            meters.pop(other).__exit__(None, None, None)
        if title not in meters:
            meters[title] = Meter(title, total).__enter__()
        meters[title].step(done)
        if done == total:  # a later loop may have the same title
            meters.pop(title).__exit__(None, None, None)

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        with listen_to_progress(show):
            yield
    finally:
        for meter in meters.values():
            meter.__exit__(None, None, None)


class Meter:
    """Shows the progress of one loop: ``with Meter("distil", 300) as meter: ... meter.step(n, "loss 0.1")``.

    On a terminal it is a bar with the time left. Elsewhere it is a line every :data:`LINE_INTERVAL_S` seconds and at
    the end.

    Args:
        title: name of the loop.
        total: number of steps.
        done: steps finished before this run, for a loop that resumes.
    """

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        self.title, self.total = title, total
        self.first = done
        self.started = self.printed = time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, transient=True, console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Meter:
        if self.bar:
            self.bar.start()
        return self

    def step(self, done: int, note: str = "", details: str = "") -> None:
        """Show that ``done`` steps are finished. ``note`` follows the count, ``details`` get a line of their own."""
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done, note=f"{note}\n{details}" if details else note)
        elif now - self.printed >= LINE_INTERVAL_S or (done == self.total and now - self.started >= 1):
            self.printed = now
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            print(f"  {self.title}: {done}/{self.total} {note} {left:.0f} s left", flush=True)
            if details:
                print(f"    {details}", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
