"""Everything about a run that can be checked in seconds, before any weight is read.

`lavin-ds validate` prints the checks; `lavin-ds train` and every rank run them first and refuse what fails. All of them
run, so that a person reads every problem at once; only what cannot be read keeps the checks that need it from running.
Nothing here imports torch before a file asks for it: most of what is wrong is told within a second.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lavin_ds.config import RunConfig, check_world, load_recipe
from lavin_ds.data.sampler import micro_batches, total_steps
from lavin_ds.data.schema import check_manifest, manifest_sha256
from lavin_ds.data.shards import ShardReader
from lavin_ds.errors import UserError
from lavin_ds.run import LOCK, STOP, check_free, load_run
from lavin_ds.training.arguments import TrainArguments
from lavin_ds.training.deepspeed_config import check_deepspeed_config
from lavin_ds.weights.adapter import check_fits
from lavin_ds.weights.base import check_vision
from lavin_ds.weights.llama import check_llama

SPLIT = "train"
VALIDATION_SPLIT = "val"
MIB = 2**20
# What a resumed run may have otherwise than it began: how it is computed and looked after, not what is learnt. (In
# compat every micro-batch weighs the same, and so how they are made is part of the objective.)
FREE_ON_RESUME = {
    "name",
    "source",
    "deepspeed",
    "tensor_parallel",
    "training.micro_batch",
    "training.packing",
    "training.activation_checkpointing",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.validate_every",
    "training.validation_samples",
    "training.max_skipped_in_a_row",
}


@dataclass(frozen=True)
class Check:
    """One line of the checklist. found: what is there, or what is wrong and what to do about it."""

    name: str
    found: str
    passed: bool


def preflight(arguments: TrainArguments, ranks: int) -> RunConfig:
    """Runs all checks.

    Raises:
        UserError: everything that is wrong, and what to do about it.
    """
    config, checks = run_checks(arguments, lambda: ranks)
    refuse(checks)
    return config


def refuse(checks: list[Check]) -> None:
    """Raises UserError if a check failed: its sentence, or a list of them."""
    wrong = [check.found for check in checks if not check.passed]
    if len(wrong) == 1:
        raise UserError(wrong[0])
    if wrong:
        raise UserError(f"{len(wrong)} things are wrong:" + "".join(f"\n  {said}" for said in wrong))


def run_checks(arguments: TrainArguments, count_ranks: Callable[[], int]) -> tuple[RunConfig | None, list[Check]]:
    """The configuration, None if it cannot be read, and the checks in the order in which to read them.

    count_ranks may raise UserError; it is called once the recipe is read, as counting GPUs takes seconds.
    """
    checks: list[Check] = []

    def check(name: str, look: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, look(), passed=True))
        except UserError as error:
            checks.append(Check(name, str(error), passed=False))
        return checks[-1].passed

    config = None

    def recipe() -> str:
        nonlocal config
        config = load_recipe(arguments.recipe, list(arguments.overrides))
        return f"{config.name}: frozen weights {config.model.frozen_dtype}, adapters and optimizer fp32"

    check("recipe", recipe)
    if config is None:
        return None, checks
    check("ranks", lambda: _ranks(config, count_ranks()))
    check("DeepSpeed", lambda: check_deepspeed_config(config.deepspeed))
    if check("data", lambda: _data(arguments, config)) and config.training.validate_every:
        check("validation", lambda: _validation(arguments, config))
    check("LLaMA", lambda: _llama(arguments, config))
    if config.model.vision or arguments.clip:
        check("vision", lambda: _vision(arguments, config))
    if arguments.init_adapter:
        check("first adapters", lambda: _init_adapter(arguments, config))
    check("run directory", lambda: _out(arguments, config))
    return config, checks


def _ranks(config: RunConfig, ranks: int) -> str:
    check_world(ranks, config.tensor_parallel)
    training, replicas = config.training, ranks // config.tensor_parallel
    count = micro_batches(training.global_batch, replicas, training.micro_batch)
    return (
        f"{ranks} = {replicas} data parallel x {config.tensor_parallel} tensor parallel; a step is "
        f"{training.global_batch} samples, {count} micro-batch{'es' * (count > 1)} a rank"
    )


def _data(arguments: TrainArguments, config: RunConfig) -> str:
    reader = ShardReader(arguments.data, SPLIT)
    disagreements = check_manifest(reader.manifest, config)
    if disagreements:
        raise UserError(f"{arguments.data} was not prepared for this recipe: " + "; ".join(disagreements) + ".")
    reader.visual_input(config.model.vision_source)  # refuses features that are damaged
    if not len(reader.trainable):
        raise UserError(f"{arguments.data}: no sample of split '{SPLIT}' has a label; see rejects.jsonl there for why.")
    steps = total_steps(len(reader.trainable), config.training.epochs, config.training.global_batch)
    return f"{len(reader.trainable):,} samples, {steps:,} steps in {config.training.epochs:g} epochs"


def _validation(arguments: TrainArguments, config: RunConfig) -> str:
    every = config.training.validate_every
    splits = ShardReader(arguments.data, SPLIT).manifest.splits
    count = len(ShardReader(arguments.data, VALIDATION_SPLIT).trainable) if VALIDATION_SPLIT in splits else 0
    if not count:
        raise UserError(
            f"training.validate_every is {every}, but {arguments.data} has no sample with a label in split "
            f"'{VALIDATION_SPLIT}': prepare it with that split, or set training.validate_every=0."
        )
    return f"{min(count, config.training.validation_samples or count):,} samples every {every} steps"


def _llama(arguments: TrainArguments, config: RunConfig) -> str:
    check_llama(arguments.llama, config.model.llm)
    return f"{arguments.llama}: all tensors are there, their shapes are the recipe's"


def _vision(arguments: TrainArguments, config: RunConfig) -> str:
    check_vision(config, arguments.clip)
    return f"{arguments.clip}: fits the recipe" if arguments.clip else "cached features, no ViT"


def _init_adapter(arguments: TrainArguments, config: RunConfig) -> str:
    check_fits(arguments.init_adapter, config)
    return f"{arguments.init_adapter}: fits the recipe"


def _out(arguments: TrainArguments, config: RunConfig) -> str:
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder.")
    place = _nearest_folder(out)
    if not os.access(place, os.W_OK):
        raise UserError(f"--out {out} cannot be made: {place} may not be written to. Give another --out.")
    has_run = (out / "run.json").exists()
    check_free(out)
    if arguments.resume == "never" and out.exists() and any(path.name not in (LOCK, STOP) for path in out.iterdir()):
        remedy = "go on with --resume auto, or give another --out" if has_run else "give another --out"
        raise UserError(f"--out {out} is not empty: {remedy}.")
    if arguments.resume == "auto" and has_run:
        _same_run(arguments, config)
        return f"{out}: goes on with the run that is there"
    return f"{out}: new"


def _same_run(arguments: TrainArguments, config: RunConfig) -> None:
    out, record = arguments.out, load_run(arguments.out)
    free = FREE_ON_RESUME - {"training.micro_batch", "training.packing"} if config.compat else FREE_ON_RESUME
    changed = _changed_keys(record.config.model_dump(), config.model_dump(), free)
    if changed:
        raise UserError(
            f"{out} was started with another configuration ({', '.join(changed)}): resume with the same recipe "
            "and overrides, or give another --out."
        )
    if record.data_sha256 != manifest_sha256(arguments.data, config.model.vision_source):
        raise UserError(f"{out} was started on other data than {arguments.data}: give the same --data.")
    if record.inputs.init_adapter != arguments.inputs().init_adapter:
        raise UserError(
            f"{out} was started with --init-adapter {record.inputs.init_adapter}: give the same, or another --out."
        )


def _changed_keys(old: dict, new: dict, free: set[str], prefix: str = "") -> list[str]:
    changed = []
    for key in old:
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            changed += _changed_keys(old[key], new[key], free, f"{prefix}{key}.")
        elif old[key] != new[key] and f"{prefix}{key}" not in free:
            there, here = ("a section" if isinstance(side[key], dict) else side[key] for side in (old, new))
            changed.append(f"{prefix}{key}: {there} there, {here} here")
    return changed


def disk_check(arguments: TrainArguments, config: RunConfig) -> Check:
    """Room for the checkpoints that are kept, the one being written and the best one; and for the adapters, twice.

    It counts on a model without memory, for which it makes a process that is in no world a world of one.
    """
    from lavin_ds.models.counting import count_parameters

    count = count_parameters(config)
    kept = config.training.keep_checkpoints + 1 + bool(config.training.validate_every)
    needed = kept * count.checkpoint_bytes + 2 * count.adapter_file_bytes
    free = shutil.disk_usage(_nearest_folder(arguments.out)).free
    said = f"{_size(needed)} for {kept} checkpoints and the adapters, {_size(free)} free"
    if free < needed:
        return Check(
            "disk space",
            f"--out {arguments.out}: it needs {said}. Free space, give another --out, or lower "
            "training.keep_checkpoints.",
            passed=False,
        )
    return Check("disk space", said, passed=True)


def _nearest_folder(out: Path) -> Path:
    """The folder itself, or the one that exists above it."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:,.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.1f} MB"


def loading_check(config: RunConfig, local_ranks: int) -> Check:
    """The RAM that this machine's ranks take while they load: each fills its copy before that moves to its GPU.

    A run that has not enough is killed by the system without a word. Not for ranks.
    """
    from lavin_ds.models.counting import count_parameters
    from lavin_ds.training.ram import free_ram

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

    from lavin_ds.models.counting import count_parameters
    from lavin_ds.profiling.memory import simulate, worst_case
    from lavin_ds.training.ram import free_ram

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
