"""The wish to stop a run, from a signal or a file; the loop asks for it at every step."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path


class StopSignal:
    """Turns SIGTERM, SIGINT and Slurm's SIGUSR1 into a wish to stop after the current step; the file RUN/.stop, too.

    received: the signal's number. heeded: the training asks at every step, so there is something to save. over: the
    training has ended, and only the process's own end is left.
    """

    def __init__(self, file: Path | None = None):
        self.received, self.heeded, self.over = 0, False, False
        self.file = file
        self._arrivals, arrivals = os.pipe()
        os.set_blocking(arrivals, False)
        signal.set_wakeup_fd(arrivals, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.received = number

    def is_wanted(self) -> bool:
        """Asked once a step."""
        self.heeded = True
        return bool(self.received) or (self.file is not None and self.file.exists())

    def sleep(self, seconds: float) -> None:
        """Sleeps, or until a signal comes, which is noted even while the main thread waits in a collective: there
        Python runs no handler."""
        if select.select([self._arrivals], [], [], seconds)[0]:
            self.received = os.read(self._arrivals, 1)[0]

    def end(self) -> None:
        self.over = True
        if self.file:
            self.file.unlink(missing_ok=True)
