"""All checks of a run that take only seconds. They run before any weight is read.

`lavin-ds validate` prints the checks. `lavin-ds train` and every rank run them first, and do not start if one fails.
All checks run, so that all problems are shown at once. A check is left out only if it needs a file that could not be
read. torch is imported only if a file needs it (a .pth does), so most mistakes are reported within a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from lavin_ds.config import RunConfig, check_world, load_recipe
from lavin_ds.data.sampler import micro_batches, total_steps
from lavin_ds.data.schema import check_manifest
from lavin_ds.data.shards import ShardReader
from lavin_ds.errors import UserError
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.launching.checks import Check, nearest_folder, refuse
from lavin_ds.launching.resume import check_same_run
from lavin_ds.run import CHECKPOINTS, LOCK, SPLIT, STOP, VALIDATION_SPLIT, check_free
from lavin_ds.training.deepspeed_config import check_deepspeed_config
from lavin_ds.weights.adapter import check_fits
from lavin_ds.weights.base import check_vision
from lavin_ds.weights.llama import check_llama


def preflight(arguments: TrainArguments, ranks: int) -> RunConfig:
    """Runs all checks and returns the configuration.

    Raises:
        UserError: everything that is wrong, and what to do about it.
    """
    config, checks = run_checks(arguments, lambda: ranks)
    refuse(checks)
    return config


def run_checks(arguments: TrainArguments, count_ranks: Callable[[], int]) -> tuple[RunConfig | None, list[Check]]:
    """Returns the configuration (None if it cannot be read), and the checks in the order in which they are shown.

    count_ranks may raise UserError. It is called only after the recipe is read, because counting GPUs takes seconds.
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
        config = load_recipe(arguments.recipe, list(arguments.overrides or ()))
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
        f"{training.global_batch} samples, {count} micro-batch{'es' * (count > 1)} per rank"
    )


def _data(arguments: TrainArguments, config: RunConfig) -> str:
    reader = ShardReader(arguments.data, SPLIT)
    disagreements = check_manifest(reader.manifest, config)
    if disagreements:
        raise UserError(f"{arguments.data} was not prepared for this recipe: " + "; ".join(disagreements) + ".")
    reader.visual_input(config.model.vision_source)  # refuses damaged features
    if not len(reader.trainable):
        raise UserError(f"{arguments.data}: no sample of split '{SPLIT}' has a label; its rejects.jsonl says why.")
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
    return f"{arguments.llama}: has all tensors, with the recipe's shapes"


def _vision(arguments: TrainArguments, config: RunConfig) -> str:
    check_vision(config, arguments.clip)
    return f"{arguments.clip}: fits the recipe" if arguments.clip else "cached features, no ViT"


def _init_adapter(arguments: TrainArguments, config: RunConfig) -> str:
    if arguments.init_adapter.suffix == ".pth":
        from lavin_ds.weights.official import read_official  # imports torch

        read_official(arguments.init_adapter, config.model)
    else:
        check_fits(arguments.init_adapter, config)
    return f"{arguments.init_adapter}: fits the recipe"


def _out(arguments: TrainArguments, config: RunConfig) -> str:
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder.")
    place = nearest_folder(out)
    if not os.access(place, os.W_OK):
        raise UserError(f"--out {out} cannot be made: {place} is not writable. Give another --out.")
    has_run = (out / "run.json").exists()
    check_free(out)
    if arguments.resume == "never" and out.exists() and any(path.name not in (LOCK, STOP) for path in out.iterdir()):
        remedy = "go on with --resume auto, or give another --out" if has_run else "give another --out"
        raise UserError(f"--out {out} is not empty: {remedy}.")
    if arguments.resume == "auto" and has_run:
        check_same_run(arguments, config)
        return f"{out}: goes on with this run"
    if any((out / CHECKPOINTS).glob("step-*")):
        raise UserError(
            f"{out} has checkpoints but no run.json, which says what configuration and data they belong to: restore "
            "run.json from a copy, or give another --out."
        )
    return f"{out}: new"
