"""Starts `deepspeed launch/train.py` and stays in charge of it.

DeepSpeed's launcher ends its ranks hard on a signal, and leaves them training when it is killed itself. So the
whole job is a session of its own: signals go to the ranks, which finish their step and save, and when the launcher
has ended, whatever is left of the session is ended too. Ranks of other nodes get no signal: a file in the run directory
asks them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import psutil

from lavin_ds.errors import UserError
from lavin_ds.run import STOP
from lavin_ds.training.arguments import TrainArguments
from lavin_ds.training.preflight import (
    Check,
    disk_check,
    hostfile_ranks,
    loading_check,
    memory_check,
    refuse,
    run_checks,
)
from lavin_ds.training.rank import LAUNCHER_PID

SCRIPTS = ("train.py", "features.py")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What drivers of NVIDIA (Jetson's, and WSL's dxg, too) and AMD put into /dev.
GPU_DEVICES = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")


def local_ranks() -> int:
    """Ranks that fit this machine: a rank a GPU, or a rank a CPU core where there is no GPU, at most 2.

    More CPU ranks than 2 only add copies of the frozen model to what memory has to hold.
    """
    return gpus() or min(2, len(os.sched_getaffinity(0)))


def gpus() -> int:
    """GPUs that torch may use. Where there is no driver, that is told without torch, which takes seconds to import."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_command(ranks: int, hostfile: Path | None, port: int, arguments: list[str]) -> list[str]:
    """`launch_command` of a training."""
    return launch_command("train.py", ranks, hostfile, port, arguments)


def launch_command(name: str, ranks: int, hostfile: Path | None, port: int, arguments: list[str]) -> list[str]:
    """The `deepspeed` command line that runs launch/NAME on so many ranks here, or on the slots of a hostfile.

    Raises:
        UserError: there are fewer GPUs, or CUDA_VISIBLE_DEVICES does not number them.
    """
    script = str(files("lavin_ds.launch") / name)
    where = ["--hostfile", str(hostfile)] if hostfile else _local_devices(ranks)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # Below critical it reports every end that is not 0 as an error, with the command: a stop with all saved, too.
    return [*launcher, "--log_level", "critical", "--master_port", str(port), *where, script, *arguments]


def _local_devices(ranks: int) -> list[str]:
    count = gpus()
    if not count:
        return ["--num_gpus", str(ranks)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if ranks > count:
        among = f"CUDA_VISIBLE_DEVICES={visible}" if visible else "this machine"
        raise UserError(f"{ranks} ranks need a GPU each, and {among} has {count}: give --ranks {count} or fewer.")
    if not visible:
        return ["--num_gpus", str(ranks)]
    ids = [word.strip() for word in visible.split(",")][:ranks]
    if not all(id.isdigit() for id in ids):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names GPUs, and DeepSpeed's launcher takes numbers only: give those that "
            "`nvidia-smi -L` shows. A MIG slice has none: `python launch/train.py` trains on it without the launcher."
        )
    # With --num_gpus DeepSpeed drops the variable and takes the first GPUs of the machine, whoever uses them.
    return ["--include", f"localhost:{','.join(ids)}"]


def run_to_the_end(command: list[str], stop_file: Path | None = None) -> int:
    """Runs a launch in a session of its own; returns its exit code when nothing of it is left.

    stop_file: asks ranks that no signal reaches, as they run on other nodes, to save and end.
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
            launcher.terminate()  # DeepSpeed ends them where they are, by name: other launches there, too
        elif interrupts or not ranks:  # a person who will not wait, or nothing to save
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
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # --include says it, and DeepSpeed would say that it ignores it
    else:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # or every process warns that it found no other
    return environment


def _ranks(launcher_pid: int) -> list[psutil.Process]:
    """The processes of a launch that do its work: those that run the script, not those that start it."""
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher_pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(word.endswith(SCRIPTS) for word in process.cmdline()[1:3]):
                    ranks.append(process)
    return ranks


def all_checks(arguments: TrainArguments, ranks: int | None = None, hostfile: Path | None = None) -> list[Check]:
    """What `launch` would check, and the memory estimate on any machine."""
    config, checks = run_checks(arguments, lambda: count_ranks(ranks, hostfile))
    if config:
        checks.insert(1, _device(0 if hostfile else ranks or local_ranks()))
        checks.append(disk_check(arguments, config))
        if all(check.passed for check in checks if check.name in ("ranks", "DeepSpeed")):
            total = count_ranks(ranks, hostfile)
            here = local_ranks() if hostfile else total
            if gpus():  # where there is none, it is a part of the memory that follows
                checks.append(loading_check(config, here))
            checks.append(memory_check(config, total, here))
    return checks


def count_ranks(ranks: int | None, hostfile: Path | None) -> int:
    """All ranks of a launch: the hostfile's slots, or so many here, or those that fit this machine.

    Raises:
        UserError: the hostfile cannot be read.
    """
    return hostfile_ranks(hostfile) if hostfile else ranks or local_ranks()


def _device(ranks: int) -> Check:
    if count := gpus():
        import torch

        try:
            _local_devices(ranks)
        except UserError as error:
            return Check("devices", str(error), passed=False)
        return Check("devices", f"{count} x {torch.cuda.get_device_name(0)} here", passed=True)
    return Check("devices", "no GPU is visible here: ranks of this machine run on the CPU", passed=True)


def launch(arguments: TrainArguments, ranks: int | None = None, hostfile: Path | None = None) -> int:
    """Checks a run, starts it and waits for its end; returns the exit code.

    Raises:
        UserError: everything that the preflight finds wrong.
    """
    config, checks = run_checks(arguments, lambda: count_ranks(ranks, hostfile))
    refuse(checks)
    total = count_ranks(ranks, hostfile)
    if gpus():  # elsewhere it may take longer than the runs one tries there
        here = local_ranks() if hostfile else total
        refuse([loading_check(config, here), memory_check(config, total, here)])
    before = _identity(arguments.out / "summary.json")
    command = train_command(total, hostfile, free_port(), arguments.words())
    code = run_to_the_end(command, arguments.out / STOP if hostfile else None)
    if code == 0 and _identity(arguments.out / "summary.json") == before:
        # DeepSpeed's outer launcher ends with 0 when its inner one is killed.
        print("error: the launcher ended, but the training had not: go on with --resume auto", file=sys.stderr)
        return 1
    if code > 192:  # DeepSpeed's launcher ends with minus the signal's number, modulo 256
        name = signal.Signals(256 - code).name
        guess = ", perhaps by the system for want of memory" if name == "SIGKILL" else ""
        print(f"error: a rank was ended by {name}{guess}: go on with --resume auto", file=sys.stderr)
    return code


def _identity(path: Path) -> tuple[int, int] | None:
    """Changes when a file is replaced."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None
