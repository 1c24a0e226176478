"""Where commands write: results on stdout, everything else on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lavin_ds.errors import UserError

out = Console()
err = Console(stderr=True)


class Stopped(Exception):
    """Ctrl-C ended a text that was being streamed. `text` is the part that was printed."""

    def __init__(self, text: str):
        self.text = text


def stream(texts: Iterable[str]) -> str:
    """Prints a text as it grows: each of `texts` continues the one before. Returns the whole text.

    Raises:
        Stopped: on Ctrl-C, after the line is ended.
    """
    shown = ""
    try:
        for text in texts:
            print(text[len(shown) :], end="", flush=True, file=out.file)
            shown = text
    except KeyboardInterrupt:
        print(file=out.file)
        raise Stopped(shown) from None
    print(file=out.file)
    return shown


@contextmanager
def telling_errors() -> Iterator[None]:
    """Prints a UserError and continues, for interactive commands."""
    try:
        yield
    except UserError as error:
        err.print(f"[yellow]{escape(str(error))}[/]", highlight=False, soft_wrap=True)


PLAIN_INTERVAL = 5  # seconds between lines where there is no terminal


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """Shows a job's progress, rate and time left on stderr.

    Yields `update(done, total=None)`; a new total replaces the old one. A terminal shows a bar, which is removed at the
    end. Without a terminal a plain line is printed every PLAIN_INTERVAL seconds.
    """
    if not err.is_terminal:
        yield _plain_updater(description, total)
        return
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(description, total=total, rate="")
        started = time.monotonic()

        def update(done: int, total: int | None = None) -> None:
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:,.1f}/s")

        yield update


def _plain_updater(description: str, total: int | None) -> Callable[[int, int | None], None]:
    started = last = time.monotonic()
    known = total

    def update(done: int, total: int | None = None) -> None:
        nonlocal last, known
        known = total or known
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL:
            return
        last = now
        rate = done / (now - started)
        of = f"/{known}" if known else ""
        left = f", {max(0, known - done) / rate:.0f} s left" if known and rate else ""
        # Not through rich, because it would wrap the line although a log file has no width.
        print(f"{description}: {done}{of}, {rate:.1f}/s{left}", file=err.file, flush=True)

    return update
