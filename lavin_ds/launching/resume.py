"""Which keys of its configuration may change when a run is resumed, and the check that no other has."""

from __future__ import annotations

from lavin_ds.config import RunConfig
from lavin_ds.data.schema import manifest_sha256
from lavin_ds.errors import UserError
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.run import load_run

# These change how a run is computed and looked after, not what it learns.
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
    """Compares a run that is to be resumed with what its run.json records.

    Raises:
        UserError: a key that must not change has changed, or the data, or the adapters that the run began with.
    """
    out, record = arguments.out, load_run(arguments.out)
    # With compat every micro-batch weighs the same, so how they are made is part of the objective.
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
