"""Progress of a long loop: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """Counts the steps of a loop: ``with Meter("distil", 300) as meter: ... meter.step(n, "loss 0.1")``.

    On a terminal a bar with the time left; elsewhere a line whenever ``every`` seconds have passed, and one at the end.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, every: float = 10.0) -> None:
        self.title, self.total, self.every = title, total, every
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

    def step(self, done: int, note: str = "", more: str = "") -> None:
        """``done`` steps are behind us; ``note`` says how it goes, ``more`` stands in a line of its own."""
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done, note=f"{note}\n{more}" if more else note)
        elif now - self.printed >= self.every or (done == self.total and now - self.started >= 1):
            self.printed = now
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            print(f"  {self.title}: {done}/{self.total} {note} {left:.0f} s left", flush=True)
            if more:
                print(f"    {more}", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()


@contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """A callback ``(title, done, total)`` that shows each title's progress with a meter of its own."""
    meters: dict[str, Meter] = {}

    def step(title: str, done: int, total: int) -> None:
        if title not in meters:
            meters[title] = Meter(title, total).__enter__()
        meters[title].step(done)
        if done == total:
            meters.pop(title).__exit__(None, None, None)  # the same title may come again

    try:
        yield step
    finally:
        for meter in meters.values():
            meter.__exit__(None, None, None)
