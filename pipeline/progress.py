"""Progress of anything that takes over a second, on standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..model.progress import Progress as Progress
from ..model.progress import no_progress as no_progress

PATIENCE_S = 1.0  # what is shorter shows no bar
LOG_EVERY_S = 15.0  # between lines where standard error is a file or a pipe


@contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """Yield a `Progress` that draws a bar on a terminal and otherwise writes a line now and then."""
    with _bar(title) if sys.stderr.isatty() else _lines(title) as progress:
        yield progress


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    bars = Bars(*columns, *times, console=Console(stderr=True), transient=True)
    started, task = time.monotonic(), bars.add_task(title)

    def progress(done: int, total: int, label: str) -> None:
        if time.monotonic() - started >= PATIENCE_S:
            bars.start()  # does nothing if it has
            bars.update(task, description=f"{title}: {label}", completed=done, total=total)

    try:
        yield progress
    finally:
        bars.stop()


@contextmanager
def _lines(title: str) -> Iterator[Progress]:
    started = last = time.monotonic()

    def progress(done: int, total: int, label: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            last = now
            print(f"{title}: {label} {done}/{total}, {now - started:.0f} s", file=sys.stderr, flush=True)

    yield progress
