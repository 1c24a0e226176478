"""Requests to stop the run, by a signal or a file. The loop checks for them at every step."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path


class StopSignal:
    """Turns SIGTERM, SIGINT, Slurm's SIGUSR1 and the file RUN/.stop into a request to stop after the current step.

    received: the signal's number; 0 if none came. heeded: the training has begun to check for requests, so there is
    state to save. over: the training has ended and the process is about to exit.
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
        """Whether to stop. The training calls it at every step and after every batch of a validation."""
        self.heeded = True
        return bool(self.received) or (self.file is not None and self.file.exists())

    def sleep(self, seconds: float) -> None:
        """Sleeps until the time is over or a signal comes. It is for a second thread: while the main thread waits in a
        collective, Python runs no signal handlers, so this thread records the signal instead."""
        if select.select([self._arrivals], [], [], seconds)[0]:
            self.received = os.read(self._arrivals, 1)[0]

    def end(self) -> None:
        """Marks the training as ended, and removes the file that requests a stop."""
        self.over = True
        if self.file:
            self.file.unlink(missing_ok=True)
