"""Everything about a run that can be checked in seconds, before any weight is read."""

from __future__ import annotations

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.data.sampler import micro_batches
from lavin_ds.data.schema import check_manifest, manifest_sha256
from lavin_ds.data.shards import ShardReader
from lavin_ds.errors import UserError
from lavin_ds.parallel import check_world
from lavin_ds.run import load_run
from lavin_ds.training.arguments import TrainArguments
from lavin_ds.training.deepspeed_config import read_deepspeed_config
from lavin_ds.weights.base import check_inputs

SPLIT = "train"


def preflight(arguments: TrainArguments, ranks: int | None) -> RunConfig:
    """Checks recipe, ranks, data, base weights and output folder. `ranks` None: not known here.

    Raises:
        UserError: the first thing that is wrong, and what to do about it.
    """
    config = load_recipe(arguments.recipe, list(arguments.overrides))
    if config.model.frozen_dtype == "fp16":
        raise UserError(
            "model.frozen_dtype fp16 is for evaluation only: without a loss scale, gradients underflow in it. "
            "Train with bf16."
        )
    if ranks is not None:
        check_world(ranks, config.tensor_parallel)
        training = config.training
        micro_batches(training.global_batch, ranks // config.tensor_parallel, training.micro_batch)
    read_deepspeed_config(config.deepspeed)
    reader = ShardReader(arguments.data, SPLIT)
    disagreements = check_manifest(reader.manifest, config)
    if disagreements:
        raise UserError(f"{arguments.data} was not prepared for this recipe: " + "; ".join(disagreements) + ".")
    reader.visual_input(config.model.vision_source)  # refuses features that are damaged
    if not len(reader.trainable):
        raise UserError(f"{arguments.data}: no sample of split '{SPLIT}' has a label; see rejects.jsonl there for why.")
    check_inputs(config, arguments.llama, arguments.clip)
    _check_out(arguments, config)
    return config


def _check_out(arguments: TrainArguments, config: RunConfig) -> None:
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder.")
    has_run = (out / "run.json").exists()
    if arguments.resume == "never" and out.exists() and any(out.iterdir()):
        remedy = "go on with --resume auto, or give another --out" if has_run else "give another --out"
        raise UserError(f"--out {out} is not empty: {remedy}.")
    if arguments.resume == "auto" and has_run:
        _check_same_run(arguments, config)


def _check_same_run(arguments: TrainArguments, config: RunConfig) -> None:
    out, record = arguments.out, load_run(arguments.out)
    if record.config != config:
        changed = _changed_keys(record.config.model_dump(), config.model_dump())
        raise UserError(
            f"{out} was started with another configuration ({', '.join(changed)}): resume with the same recipe "
            "and overrides, or give another --out."
        )
    if record.data_sha256 != manifest_sha256(arguments.data):
        raise UserError(f"{out} was started on other data than {arguments.data}: give the same --data.")


def _changed_keys(old: dict, new: dict, prefix: str = "") -> list[str]:
    changed = []
    for key in old:
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            changed += _changed_keys(old[key], new[key], f"{prefix}{key}.")
        elif old[key] != new[key]:
            changed.append(f"{prefix}{key}: {old[key]} there, {new[key]} here")
    return changed
