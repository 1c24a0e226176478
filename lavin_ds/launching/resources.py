"""What a run takes of this machine, beside what is free: disk, memory, and RAM while loading."""

from __future__ import annotations

import shutil
from pathlib import Path

from lavin_ds.config import RunConfig
from lavin_ds.launching.checks import Check, nearest_folder


def disk_check(out: Path, config: RunConfig) -> Check:
    """Room for the checkpoints that are kept, the one being written and the best one; and for the adapters, twice.

    It counts on a model without memory, for which it makes a process that is in no world a world of one.
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
            f"--out {out}: it needs {said}. Free space, give another --out, or lower training.keep_checkpoints.",
            passed=False,
        )
    return Check("disk space", said, passed=True)


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:,.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.1f} MB"


def loading_check(config: RunConfig, local_ranks: int) -> Check:
    """The RAM that this machine's ranks take while they load: each fills its copy before that moves to its GPU.

    A run that has not enough is killed by the system without a word. Not for ranks.
    """
    from lavin_ds.launching.ram import free_ram
    from lavin_ds.models.counting import count_parameters

    needed = local_ranks * count_parameters(config).loaded_frozen_bytes(config.tensor_parallel)
    free = free_ram()
    said = f"{_size(needed)} of RAM for {local_ranks} rank{'s' * (local_ranks > 1)} to load, {_size(free)} free"
    if free < needed:
        said = f"Loading needs {said}. Free some, start fewer ranks (--ranks), or split the model by tensor_parallel."
    return Check("loading", said, passed=free >= needed)


def memory_check(config: RunConfig, ranks: int, local_ranks: int) -> Check:
    """The simulated peak of one rank beside the memory that it has here. Takes 2 to 30 seconds.

    A first guess: it counts tensors, not the CUDA context, workspaces, fragmentation or Python itself. Not for
    ranks: it makes this process a world of one.
    """
    import torch

    from lavin_ds.launching.ram import free_ram
    from lavin_ds.models.counting import count_parameters
    from lavin_ds.profiling.memory import simulate, worst_case

    peak = simulate(config, worst_case(config, ranks), ranks).peak_bytes
    peak = max(peak, count_parameters(config).loaded_bytes(config.tensor_parallel))
    if torch.cuda.is_available():
        has, where = torch.cuda.get_device_properties(0).total_memory, f"in {torch.cuda.get_device_name(0)}"
    else:
        has, where = free_ram() // local_ranks, "of this machine's free memory, no GPU"
    said = f"{_size(peak)} a rank at full length (simulated); a rank has {_size(has)} {where}"
    if peak <= has:
        return Check("memory", said, passed=True)
    remedy = (
        "Lower training.micro_batch or data.max_length, set training.activation_checkpointing=true, or use more or "
        "larger devices."
    )
    if not torch.cuda.is_available():
        remedy += f" If its GPUs are elsewhere: `lavin-ds profile --recipe RECIPE --gpus {ranks} --device a100-80g`."
    return Check("memory", f"Memory: {said}. {remedy}", passed=False)
