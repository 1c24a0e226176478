"""One rank's life around the training: it dies with those who started it, and what failed first is read first.

Nothing here imports torch at once, so that a rank is watching, and has told what is wrong, before that slow import.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress

import psutil

from lavin_ds.errors import UserError
from lavin_ds.training.arguments import TrainArguments
from lavin_ds.training.preflight import preflight

LAUNCHER_PID = "LAVIN_DS_LAUNCHER_PID"  # set by lavin_ds.training.launcher
LAUNCHER = re.compile(r"(^|/)deepspeed$|^deepspeed\.launcher\.\w+$|/deepspeed/launcher/\w+\.py$")
WATCH_SECONDS = 0.5
GRACE_SECONDS = 5  # for the launcher to end the ranks that a failed one leaves behind
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "tcpstore")


class StopSignal:
    """Turns SIGTERM, SIGINT and Slurm's SIGUSR1 into a wish to stop after the current step."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.received = number


def run(arguments: TrainArguments) -> int:
    """Trains on this rank; returns its exit code. A failure is told on stderr, the first one before its consequences:
    a rank that only lost its peer waits for the launcher to end it."""
    rank = os.environ.get("RANK", "0")
    stop = StopSignal()  # before the slow imports: a signal that comes now counts too
    try:
        config = preflight(arguments, int(os.environ.get("WORLD_SIZE", "1")))
        from lavin_ds.training.job import train

        return train(arguments, config, stop)
    except UserError as error:
        if rank != "0":
            _wait(stop)  # rank 0 says the same, unless it is this node's trouble alone
        print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            where = error.filename or arguments.out
            print(f"error: {where}: {error.strerror}. Free space and go on with --resume auto.", file=sys.stderr)
            return 2
        if any(words in str(error).lower() for words in LOST_PEER):
            _wait(stop)
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return 1


def _wait(stop: StopSignal) -> None:
    """Ends this rank silently when the launcher ends it; returns if nobody does."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        if stop.received:
            end(1)
        time.sleep(0.1)


def end(code: int) -> None:
    """Ends the process at once: after a failure, taking process groups down in order may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch_launchers() -> None:
    """Starts a thread that kills this process when one of those that started it is gone: DeepSpeed's two launchers and
    `lavin-ds train`. Killed themselves, they cannot end it, and it would train on unseen.

    A thread that looks, not PR_SET_PDEATHSIG: that tells of the parent alone, and only on Linux.
    """
    launchers = _launchers()
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), name="watch", daemon=True).start()


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is one of DeepSpeed's launchers; a shell or editor that names it is not."""
    return any(LAUNCHER.search(word) for word in command[:5])


def _launchers() -> list[psutil.Process]:
    found = []
    for ancestor in psutil.Process().parents():
        with suppress(psutil.Error):
            if not is_launcher(ancestor.cmdline()):
                break
            found.append(ancestor)
    if LAUNCHER_PID in os.environ:
        try:
            found.append(psutil.Process(int(os.environ[LAUNCHER_PID])))
        except psutil.NoSuchProcess:
            os.kill(os.getpid(), signal.SIGKILL)
    return found


def _watch(launchers: list[psutil.Process]) -> None:
    while all(_is_alive(process) for process in launchers):
        time.sleep(WATCH_SECONDS)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: the process that started this training is gone: ending it", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
