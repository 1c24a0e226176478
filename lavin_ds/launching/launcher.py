"""`lavin-ds train` and `lavin-ds validate`: checks a run, and starts it under `deepspeed`."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path

from lavin_ds.errors import UserError
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.launching.deepspeed_command import count_ranks, launch_command, local_devices, local_ranks
from lavin_ds.launching.preflight import Check, refuse, run_checks
from lavin_ds.launching.process import run_to_the_end
from lavin_ds.launching.resources import disk_check, memory_check
from lavin_ds.machine import free_port, gpus
from lavin_ds.run import STOP, remove_if_unused


def all_checks(
    arguments: TrainArguments, ranks: int | None = None, hostfile: Path | None = None, force: bool = False
) -> list[Check]:
    """The checks of `launch`, and those of devices, disk and memory, also on a machine without a GPU."""
    config, checks = run_checks(arguments, lambda: count_ranks(ranks, hostfile))
    if config:
        checks.insert(1, _device(0 if hostfile else ranks or local_ranks()))
        checks.append(disk_check(arguments.out, config))
        if all(check.passed for check in checks if check.name in ("ranks", "DeepSpeed")):
            total = count_ranks(ranks, hostfile)
            here = local_ranks() if hostfile else total
            checks.append(memory_check(config, total, here, force))
    return checks


def _device(ranks: int) -> Check:
    if count := gpus():
        import torch

        try:
            local_devices(ranks)
        except UserError as error:
            return Check("devices", str(error), passed=False)
        return Check("devices", f"{count} x {torch.cuda.get_device_name(0)} here", passed=True)
    return Check("devices", "no GPU is visible here: the ranks of this machine run on the CPU", passed=True)


def launch(
    arguments: TrainArguments, ranks: int | None = None, hostfile: Path | None = None, force: bool = False
) -> int:
    """Checks a run, starts it and waits until it ends. Returns the exit code. force: see memory_check.

    Raises:
        UserError: everything that the checks find wrong.
    """
    config, checks = run_checks(arguments, lambda: count_ranks(ranks, hostfile))
    refuse(checks)
    total = count_ranks(ranks, hostfile)
    if gpus():  # on a CPU the check may take longer than the small runs that people try there
        check = memory_check(config, total, local_ranks() if hostfile else total, force)
        refuse([check])
        if check.warning:
            print(f"warning: {check.found}", file=sys.stderr)
    existed, before = arguments.out.exists(), _identity(arguments.out / "summary.json")
    command = launch_command("train.py", total, hostfile, free_port(), arguments.words())
    code = run_to_the_end(command, arguments.out / STOP if hostfile else None)
    if code and not existed:  # a rank that was killed could not remove the run directory
        remove_if_unused(arguments.out)
    if code == 0 and _identity(arguments.out / "summary.json") == before:
        # DeepSpeed's outer launcher exits with 0 if its inner launcher is killed.
        print("error: the launcher ended before the training was complete: go on with --resume auto", file=sys.stderr)
        return 1
    if code > 192:  # DeepSpeed's launcher exits with minus the signal's number, modulo 256
        name = signal.Signals(256 - code).name
        guess = ", perhaps by the system because memory ran out" if name == "SIGKILL" else ""
        print(f"error: a rank was ended by {name}{guess}: go on with --resume auto", file=sys.stderr)
    return code


def _identity(path: Path) -> tuple[int, int] | None:
    """A value that changes if the file is replaced; None if there is no file."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None
