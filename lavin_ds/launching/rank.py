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
GRACE_SECONDS = 5  # for the launcher to end the ranks that a failed one leaves behind
STOP_SECONDS = 30  # to finish a step and save; as long as DeepSpeed's launcher gives a rank
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "tcpstore")


def run(arguments: TrainArguments) -> int:
    """Trains on this rank; returns its exit code. A failure is told on stderr, the first one before its consequences:
    a rank that only lost its peer waits for the launcher to end it."""
    rank = os.environ.get("RANK", "0")
    # Before the slow imports: a signal that comes now counts too.
    stop = StopSignal(arguments.out / STOP if rank == "0" else None)
    watch_launchers(stop)
    try:
        config = preflight(arguments, int(os.environ.get("WORLD_SIZE", "1")))
        return _train(arguments, config, stop)
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


def watch_launchers(stop: StopSignal | None = None) -> None:
    """Starts a thread that ends this process when one of those that started it is gone: DeepSpeed's two launchers and
    `lavin-ds train`. Killed themselves, they cannot end it, and it would train on unseen.

    A rank that trains saves first where a signal may have ended the launcher: `deepspeed` dies at once of those that
    stop a run. And a rank that is told to end because another failed is killed: it waits for that one in a collective,
    and the launcher would give it 30 seconds.

    A thread that looks, not PR_SET_PDEATHSIG: that tells of the parent alone, and only on Linux.
    """
    launchers = _launchers()
    if launchers:
        threading.Thread(target=_watch, args=(launchers, stop), name="watch", daemon=True).start()


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


def _watch(launchers: list[psutil.Process], stop: StopSignal | None) -> None:
    sleep = stop.sleep if stop else time.sleep
    while all(_is_alive(process) for process in launchers):
        sleep(WATCH_SECONDS)
        if stop and stop.received and not stop.over and _has_lost_a_rank(launchers[0]):
            time.sleep(1)  # when a run was stopped and has saved, one rank may be quicker
            if not stop.over:
                os.kill(os.getpid(), signal.SIGKILL)
    if not (stop and stop.received) and os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: the process that started this training is gone: ending it", file=sys.stderr, flush=True)
    # `lavin-ds train` passes signals on, so if none came, it was killed and nobody waits. `deepspeed` may have got one.
    if stop and stop.heeded and (stop.received or LAUNCHER_PID not in os.environ):
        stop.received = stop.received or signal.SIGTERM
        time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _has_lost_a_rank(launcher: psutil.Process) -> bool:
    """Whether DeepSpeed's launcher has fewer ranks left than it started."""
    script = psutil.Process().cmdline()[:3]  # it has other children, too, for moments
    with suppress(psutil.NoSuchProcess):
        below = launcher.children(recursive=True)
        ranks = [process for process in below if _is_alive(process) and process.cmdline()[:3] == script]
        return len(ranks) < int(os.environ.get("LOCAL_SIZE", "0"))  # which DeepSpeed's launcher sets
    return False


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
