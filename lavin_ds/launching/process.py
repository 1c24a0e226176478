"""Runs `deepspeed SCRIPT` and makes sure that all of its processes end.

DeepSpeed's launcher kills its ranks when it gets a signal, and leaves them running when it is killed. Therefore a
launch runs in a new session. Signals are forwarded to the ranks, which finish their step and save. When the launcher
has ended, all remaining processes of the session are killed. Ranks on other nodes get no signal: a file in the run
directory asks them to stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from lavin_ds.launching.rank import LAUNCHER_PID
from lavin_ds.machine import gpus

SCRIPTS = ("train.py", "features.py")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run_to_the_end(command: list[str], stop_file: Path | None = None) -> int:
    """Runs a launch in a new session, and returns its exit code when all of its processes have ended.

    stop_file: created to ask ranks on other nodes, which get no signal, to save and end.
    """
    if stop_file:
        stop_file.unlink(missing_ok=True)
    launcher = subprocess.Popen(command, start_new_session=True, env=_environment())
    interrupts = 0

    def forward(number, _frame):
        nonlocal interrupts
        ranks = _ranks(launcher.pid)
        if stop_file and not ranks and not interrupts:
            stop_file.parent.mkdir(parents=True, exist_ok=True)
            stop_file.touch()
        elif stop_file and not ranks and interrupts == 1:
            launcher.terminate()  # DeepSpeed then kills the ranks on other nodes by name, also those of other runs
        elif interrupts or not ranks:  # a second Ctrl-C, or there is nothing to save yet
            os.killpg(launcher.pid, signal.SIGKILL)
        interrupts += number == signal.SIGINT
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return launcher.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1", LAUNCHER_PID: str(os.getpid())}
    if gpus():
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # --include replaces it, and DeepSpeed would warn about it
    else:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every process warns that it found no GPU
    return environment


def _ranks(launcher_pid: int) -> list[psutil.Process]:
    """The processes of a launch that run its script. The other processes only start and watch them."""
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher_pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(word.endswith(SCRIPTS) for word in process.cmdline()[1:3]):
                    ranks.append(process)
    return ranks
