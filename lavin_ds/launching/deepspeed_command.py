"""The number of ranks of a launch, and the `deepspeed` command line that starts them."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from pathlib import Path

from lavin_ds.errors import UserError
from lavin_ds.machine import gpus


def local_ranks() -> int:
    """The default number of ranks on this machine: one per GPU. Without a GPU, one per CPU core, but at most 2.

    More CPU ranks would only put more copies of the frozen model in memory.
    """
    return gpus() or min(2, len(os.sched_getaffinity(0)))


def count_ranks(ranks: int | None, hostfile: Path | None) -> int:
    """The total number of ranks of a launch: the hostfile's slots, or else `ranks`, or else local_ranks().

    Raises:
        UserError: the hostfile cannot be read.
    """
    return hostfile_ranks(hostfile) if hostfile else ranks or local_ranks()


def launch_command(name: str, ranks: int, hostfile: Path | None, port: int, arguments: list[str]) -> list[str]:
    """The `deepspeed` command line that runs launch/NAME on `ranks` ranks here, or on the slots of a hostfile.

    Raises:
        UserError: as local_devices.
    """
    script = str(files("lavin_ds.launch") / name)
    where = ["--hostfile", str(hostfile)] if hostfile else local_devices(ranks)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # At other levels it prints an error for every exit code except 0, even if a run was stopped and saved.
    return [*launcher, "--log_level", "critical", "--master_port", str(port), *where, script, *arguments]


def local_devices(ranks: int) -> list[str]:
    """The options of `deepspeed` that choose this machine's devices for `ranks` ranks.

    Raises:
        UserError: there are fewer GPUs than ranks, or CUDA_VISIBLE_DEVICES does not contain numbers.
    """
    count = gpus()
    if not count:
        return ["--num_gpus", str(ranks)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if ranks > count:
        where = f"CUDA_VISIBLE_DEVICES={visible}" if visible else "this machine"
        raise UserError(f"{ranks} ranks need one GPU each, but {where} has {count}: give --ranks {count} or fewer.")
    if not visible:
        return ["--num_gpus", str(ranks)]
    ids = [word.strip() for word in visible.split(",")][:ranks]
    if not all(id.isdigit() for id in ids):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} contains names, but DeepSpeed's launcher takes only numbers: give the "
            "numbers that `nvidia-smi -L` shows. A MIG slice has no number: `python launch/train.py` trains on it "
            "without the launcher."
        )
    # --num_gpus would ignore the variable and use the machine's first GPUs, which may be in use.
    return ["--include", f"localhost:{','.join(ids)}"]


def hostfile_ranks(hostfile: Path) -> int:
    """The total number of slots in a DeepSpeed hostfile.

    Raises:
        UserError: there is no such file, or a line is not `HOST slots=GPUS`.
    """
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(
            f"The hostfile {hostfile} cannot be read: make one with a line 'HOST slots=GPUS' for every node."
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
