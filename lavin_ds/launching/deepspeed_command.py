"""How many ranks a launch has, and the `deepspeed` command line that starts them."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from pathlib import Path

from lavin_ds.errors import UserError
from lavin_ds.machine import gpus


def local_ranks() -> int:
    """Ranks that fit this machine: one per GPU, or, where there is no GPU, one per CPU core and at most 2.

    More CPU ranks than 2 only add copies of the frozen model to what memory has to hold.
    """
    return gpus() or min(2, len(os.sched_getaffinity(0)))


def count_ranks(ranks: int | None, hostfile: Path | None) -> int:
    """All ranks of a launch: the hostfile's slots, or `ranks` on this machine, or those that fit it.

    Raises:
        UserError: the hostfile cannot be read.
    """
    return hostfile_ranks(hostfile) if hostfile else ranks or local_ranks()


def launch_command(name: str, ranks: int, hostfile: Path | None, port: int, arguments: list[str]) -> list[str]:
    """The `deepspeed` command line that runs launch/NAME on so many ranks here, or on the slots of a hostfile.

    Raises:
        UserError: as local_devices.
    """
    script = str(files("lavin_ds.launch") / name)
    where = ["--hostfile", str(hostfile)] if hostfile else local_devices(ranks)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # At other levels it prints an error for every exit code but 0, even that of a run that was stopped and saved.
    return [*launcher, "--log_level", "critical", "--master_port", str(port), *where, script, *arguments]


def local_devices(ranks: int) -> list[str]:
    """The options of `deepspeed` that name this machine's devices for so many ranks.

    Raises:
        UserError: there are fewer GPUs, or CUDA_VISIBLE_DEVICES does not number them.
    """
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
    # --num_gpus would ignore the variable and take the machine's first GPUs, which others may be using.
    return ["--include", f"localhost:{','.join(ids)}"]


def hostfile_ranks(hostfile: Path) -> int:
    """The slots of a DeepSpeed hostfile.

    Raises:
        UserError: there is no such file, or a line does not read `HOST slots=GPUS`.
    """
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(
            f"The hostfile {hostfile} does not exist: write a line 'HOST slots=GPUS' for every node."
        ) from None
    ranks = 0
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or int(slots) < 1:
            raise UserError(f"{hostfile}, line {number}: '{line.strip()}' must read 'HOST slots=GPUS'.")
        ranks += int(slots)
    if not ranks:
        raise UserError(f"The hostfile {hostfile} names no host: write a line 'HOST slots=GPUS' for every node.")
    return ranks
