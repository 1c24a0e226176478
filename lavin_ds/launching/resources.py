"""Compares the disk space and memory that a run needs with what this machine has free."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from lavin_ds.config import RunConfig
from lavin_ds.devices import OVERHEAD
from lavin_ds.errors import UserError
from lavin_ds.launching.checks import Check, nearest_folder
from lavin_ds.launching.ram import free_ram
from lavin_ds.machine import gpus


def disk_check(out: Path, config: RunConfig) -> Check:
    """Checks the disk space of --out: the kept checkpoints, the one being written, the best one, and two adapter files.

    It builds the model on the meta device to count its parameters. This makes a process without process groups a world
    of one.
    """
    from lavin_ds.models.counting import count_parameters

    count = count_parameters(config)
    kept = config.training.keep_checkpoints + 1 + bool(config.training.validate_every)
    needed = kept * count.checkpoint_bytes + 2 * count.adapter_file_bytes
    free = shutil.disk_usage(nearest_folder(out)).free
    said = f"{_size(needed)} for {kept} checkpoints and the adapters, {_size(free)} free"
    if free < needed:
        return Check(
            "disk space",
            f"--out {out} needs {said}. Free space, give another --out, or lower training.keep_checkpoints.",
            passed=False,
        )
    return Check("disk space", said, passed=True)


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:,.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.1f} MB"


def memory_check(config: RunConfig, ranks: int, local_ranks: int, force: bool = False) -> Check:
    """Compares the simulated peak memory of one rank with the memory that is free for it. Takes 2 to 30 seconds.

    On a GPU, OVERHEAD is added for what the simulation does not count: CUDA context, workspaces, fragmentation. On a
    CPU the ranks share the free RAM. With `force` a run that does not fit passes with a warning. Call it only in the
    process that starts the ranks, because it makes its process a world of one.
    """
    from lavin_ds.models.counting import count_parameters
    from lavin_ds.profiling.simulation import simulate
    from lavin_ds.profiling.workload import worst_case

    needed = simulate(config, worst_case(config, ranks), ranks).peak_bytes
    needed = max(needed, count_parameters(config).loaded_bytes(config.tensor_parallel))
    on_gpu = gpus() > 0
    if on_gpu:
        needed += int(OVERHEAD)
        free = min(free_gpu_memory()[:local_ranks])
        said = (
            f"(simulated, with {_size(int(OVERHEAD))} for the CUDA context and workspaces); its GPU has {_size(free)}"
        )
    else:
        free = free_ram() // local_ranks
        said = f"(simulated); without a GPU it has {_size(free)} of this machine's RAM"
    said = f"a rank needs {_size(needed)} at full length {said} free"
    if needed <= free:
        return Check("memory", said, passed=True)
    if force:
        return Check("memory", f"{said}, and --force was given", passed=True, warning=True)
    remedy = (
        "Lower training.micro_batch or data.max_length, set training.activation_checkpointing=true, or use more or "
        "larger devices. To start anyway, give --force."
    )
    if not on_gpu:
        remedy += (
            " To simulate the GPUs of another machine: "
            f"`lavin-ds profile --recipe RECIPE --gpus {ranks} --device a100-80g`."
        )
    return Check("memory", f"Memory: {said}. {remedy}", passed=False)


def free_gpu_memory() -> list[int]:
    """Free bytes on each GPU that torch may use.

    A subprocess asks, because asking creates a CUDA context on each GPU, which stays until the process ends. The
    context, about 0.4 GB, counts as used in the answer.

    Raises:
        UserError: torch cannot use a GPU, for example because its memory is full.
    """
    program = (
        "import json, torch\n"
        "print(json.dumps([torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"The free memory of the GPUs cannot be read ({said[0]}): does another process use them?")
    return json.loads(done.stdout)
