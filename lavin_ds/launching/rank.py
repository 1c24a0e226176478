"""What a rank does besides training: checks, error messages, exit codes, and ending when its launcher ends.

torch is imported late, because that takes seconds. Before, the rank already watches its launcher and runs the checks.
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

from lavin_ds.config import RunConfig
from lavin_ds.errors import UserError
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.launching.checks import refuse
from lavin_ds.launching.preflight import preflight
from lavin_ds.run import STOP
from lavin_ds.training.stop import StopSignal

LAUNCHER_PID = "LAVIN_DS_LAUNCHER_PID"  # set by launching/process.py
LAUNCHER = re.compile(r"(^|/)deepspeed$|^deepspeed\.launcher\.\w+$|/deepspeed/launcher/\w+\.py$")
WATCH_SECONDS = 0.5
GRACE_SECONDS = 5  # the launcher has this long to end the other ranks after one has failed
STOP_SECONDS = 30  # a rank has this long to finish its step and save; DeepSpeed's launcher waits this long, too
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "tcpstore")


def run(arguments: TrainArguments) -> int:
    """Trains on this rank and returns its exit code.

    Errors go to stderr. A rank that only lost its peer first waits for the launcher to end it, and then prints nothing,
    so the cause is not hidden among its consequences.
    """
    rank = os.environ.get("RANK", "0")
    # Created before the slow imports, so that a signal during them is not lost.
    stop = StopSignal(arguments.out / STOP if rank == "0" else None)
    watch_launchers(stop)
    try:
        config = preflight(arguments, int(os.environ.get("WORLD_SIZE", "1")))
        return _train(arguments, config, stop)
    except UserError as error:
        if rank != "0":
            _wait(stop)  # rank 0 usually prints the same error, and then the launcher ends this rank
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


def _train(arguments: TrainArguments, config: RunConfig, stop: StopSignal) -> int:
    from lavin_ds.launching.resources import disk_check
    from lavin_ds.parallel import initialize_tensor_parallel
    from lavin_ds.training.engine import start_distributed
    from lavin_ds.training.job import train

    device = start_distributed()
    initialize_tensor_parallel(config.tensor_parallel)
    if os.environ["RANK"] == "0":
        refuse([disk_check(arguments.out, config)])
    return train(config, arguments.inputs(), arguments.out, arguments.resume == "auto", device, stop)


def _wait(stop: StopSignal) -> None:
    """Waits until the launcher ends this rank, and then exits silently. Returns if the launcher does not end it."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        if stop.received:
            end(1)
        time.sleep(0.1)


def end(code: int) -> None:
    """Ends the process at once, because destroying the process groups may hang after a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch_launchers(stop: StopSignal | None = None) -> None:
    """Starts a thread that ends this process when one of the processes that started it is gone.

    These are DeepSpeed's two launchers and `lavin-ds train`. If they are killed, they cannot end their ranks, which
    would go on training unnoticed.

    There are two special cases. `deepspeed` dies at once from the signals that stop a run. So if the launcher is gone,
    it may have been a request to stop, and the rank saves first. And a rank that gets SIGTERM because another rank
    failed is killed: it waits for that rank in a collective, and the launcher would wait 30 seconds for it.

    PR_SET_PDEATHSIG would not do: it watches only the parent, and exists only on Linux.
    """
    launchers = _launchers()
    if launchers:
        threading.Thread(target=_watch, args=(launchers, stop), name="watch", daemon=True).start()


def is_launcher(command: list[str]) -> bool:
    """Whether a command line runs one of DeepSpeed's launchers, and does not only mention it, as an editor may."""
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


def _watch(launchers: list[psutil.Process], stop: StopSignal | None) -> None:
    sleep = stop.sleep if stop else time.sleep
    while all(_is_alive(process) for process in launchers):
        sleep(WATCH_SECONDS)
        if stop and stop.received and not stop.over and _has_lost_a_rank(launchers[0]):
            time.sleep(1)  # after a saved stop, one rank may just have ended a little earlier
            if not stop.over:
                os.kill(os.getpid(), signal.SIGKILL)
    if not (stop and stop.received) and os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: the process that started this training is gone: ending it", file=sys.stderr, flush=True)
    # `lavin-ds train` forwards signals, so if it is gone and no signal came, it was killed. A bare `deepspeed` may have
    # died from a signal that it did not forward, so its ranks save before they end.
    if stop and stop.heeded and (stop.received or LAUNCHER_PID not in os.environ):
        stop.received = stop.received or signal.SIGTERM
        time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _has_lost_a_rank(launcher: psutil.Process) -> bool:
    """Whether fewer ranks of DeepSpeed's launcher are alive than it started."""
    script = psutil.Process().cmdline()[:3]  # the launcher also has other, short-lived children
    with suppress(psutil.NoSuchProcess):
        below = launcher.children(recursive=True)
        ranks = [process for process in below if _is_alive(process) and process.cmdline()[:3] == script]
        return len(ranks) < int(os.environ.get("LOCAL_SIZE", "0"))  # set by DeepSpeed's launcher
    return False


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
