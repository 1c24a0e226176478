"""The configuration keys that may change when a run is resumed, and a check that no other key has changed."""

from __future__ import annotations

from lavin_ds.config import RunConfig
from lavin_ds.data.schema import manifest_sha256
from lavin_ds.errors import UserError
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.run import load_run

# These keys change how a run is computed, saved and validated, but not what it learns.
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


def check_same_run(arguments: TrainArguments, config: RunConfig) -> None:
    """Compares the options of a resumed run with its run.json.

    Raises:
        UserError: a key that must not change has changed, or the data, or the adapters that the run started from.
    """
    out, record = arguments.out, load_run(arguments.out)
    # With compat every micro-batch has the same weight, so the split into micro-batches is part of the objective.
    free = FREE_ON_RESUME - {"training.micro_batch", "training.packing"} if config.compat else FREE_ON_RESUME
    changed = _changed_keys(record.config.model_dump(), config.model_dump(), free)
    if changed:
        raise UserError(
            f"{out} was started with another configuration ({', '.join(changed)}): resume with the same recipe and "
            "overrides, or give another --out."
        )
    if record.data_sha256 != manifest_sha256(arguments.data, config.model.vision_source):
        raise UserError(f"{out} was started on data that differ from {arguments.data}: give the same --data.")
    began_from = record.inputs.init_adapter
    if began_from != arguments.inputs().init_adapter:
        began_with = f"with --init-adapter {began_from}" if began_from else "without --init-adapter"
        raise UserError(f"{out} was started {began_with}: do the same, or give another --out.")


def _changed_keys(old: dict, new: dict, free: set[str], prefix: str = "") -> list[str]:
    changed = []
    for key in old:
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            changed += _changed_keys(old[key], new[key], free, f"{prefix}{key}.")
        elif old[key] != new[key] and f"{prefix}{key}" not in free:
            there, here = ("a section" if isinstance(side[key], dict) else side[key] for side in (old, new))
            changed.append(f"{prefix}{key}: {there} in the run, {here} now")
    return changed
