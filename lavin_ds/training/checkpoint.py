"""Checkpoints: one file with the whole trainable parameters and their optimizer moments, at any ZeRO stage.

    RUN/checkpoints/step-00000200/state.safetensors   value/NAME, exp_avg/NAME, exp_avg_sq/NAME, fp32
    RUN/checkpoints/step-00000200/state.json          position of the run, checksums of both files

A resumed run needs nothing else: the order of samples, the learning rate and the dropout of a step are functions of
(seed, step). At 3.8M parameters the file takes 45 MB, so it is not sharded over ranks. A run can be resumed with
another number of ranks or at another ZeRO stage.

A checkpoint is written to a folder of another name, flushed to disk and renamed. If a checksum does not match, the
checkpoint is renamed to damaged-step-00000200; no code reads it, but a person can. A checkpoint that cannot be read
now, or that another version wrote, is never renamed: the run stops with an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import nn

from lavin_ds.data.shards import file_sha256
from lavin_ds.errors import UserError
from lavin_ds.files import sync, write_json
from lavin_ds.training.loss_scale import INITIAL_SCALE
from lavin_ds.weights.tensor_files import save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
FORMAT = 1  # of state.json


class DamagedCheckpoint(Exception):
    """A file of a checkpoint does not match its checksum. The message names the file."""


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    step: optimizer steps done, skipped ones included. updates: those not skipped, as AdamW's bias correction needs.
    loss_scale, loss_scale_age: see loss_scale.py. val_loss: of these parameters; None if they were not validated.
    """

    step: int
    updates: int
    loss_scale: float = INITIAL_SCALE
    loss_scale_age: int = 0
    val_loss: float | None = None


START = Position(step=0, updates=0)


@dataclass(frozen=True)
class Checkpoint:
    """tensors: fp32, on the CPU, by `value/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`."""

    at: Position
    tensors: dict[str, torch.Tensor]

    def values(self) -> dict[str, torch.Tensor]:
        """The values of the trainable parameters, by name."""
        return {k.removeprefix("value/"): t for k, t in self.tensors.items() if k.startswith("value/")}


def gather_values(engine: deepspeed.DeepSpeedEngine, trainable: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Whole fp32 values of the trainable parameters, on the CPU. Every rank must call it."""
    if engine.zero_optimization_stage() == 0:
        return {name: p.detach().float().cpu().clone() for name, p in trainable.items()}
    return {name: safe_get_full_fp32_param(p).cpu().clone() for name, p in trainable.items()}


def save(
    folder: Path,
    engine: deepspeed.DeepSpeedEngine,
    trainable: dict[str, nn.Parameter],
    at: Position,
    keep: int,
    warn: Callable[[str], None],
) -> None:
    """Writes a checkpoint, and removes all but the newest `keep` and the one with the lowest validation loss.

    Every rank must call it, at most once per step. Rank 0 writes; all ranks return when the checkpoint is on disk.
    `warn(sentence)` is called if an old checkpoint cannot be removed.

    Raises:
        UserError: on rank 0, if the checkpoint cannot be written. Earlier checkpoints are unchanged.
    """
    values = gather_values(engine, trainable)
    tensors = {f"value/{name}": value for name, value in values.items()}
    if at.updates:
        _link_moments(engine)
    for moment in MOMENTS:
        for name, parameter in trainable.items():
            # The optimizer has no moments before the first update.
            whole = _get_moment(engine, parameter, moment) if at.updates else torch.zeros_like(values[name])
            tensors[f"{moment}/{name}"] = whole.cpu().clone()
    if dist.get_rank() == 0:
        _write(folder, at, tensors)
        _prune(folder, keep, warn)
    dist.barrier()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write(folder: Path, at: Position, tensors: dict[str, torch.Tensor]) -> None:
    unfinished = folder / f".{_name(at.step)}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        state = unfinished / "state.safetensors"
        save_tensors(tensors, state)
        _write_record(unfinished, at, file_sha256(state))
        unfinished.rename(folder / _name(at.step))  # fails if it exists: a complete checkpoint is never replaced
        sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {at.step} cannot be written to {folder}: {error}. Earlier checkpoints are intact: "
            "free space and go on with --resume auto."
        ) from None


def _write_record(checkpoint: Path, at: Position, sha256: str) -> None:
    record = {"format": FORMAT, **asdict(at), "sha256": sha256}
    write_json(checkpoint / "state.json", record | {"record_sha256": _record_sha256(record)})


def _record_sha256(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def set_validation_loss(folder: Path, step: int, val_loss: float) -> None:
    """Adds a validation loss to a checkpoint that was saved without one.

    Raises:
        UserError, DamagedCheckpoint: its record cannot be read.
    """
    at, sha256 = _read_record(folder, step)
    _write_record(folder / _name(step), replace(at, val_loss=val_loss), sha256)


def _prune(folder: Path, keep: int, warn: Callable[[str], None]) -> None:
    steps = list_steps(folder)
    try:
        best = best_step(folder)
    except UserError as error:  # the checkpoint that cannot be read may be the best one
        warn(f"{error} Old checkpoints are kept until the next one is saved.")
        return
    for old in sorted(set(steps) - {*steps[-keep:], best}):
        try:
            shutil.rmtree(folder / _name(old))
        except OSError as error:  # this costs disk space, but the run can go on
            warn(f"The old checkpoint {folder / _name(old)} cannot be removed: {error}.")


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.is_dir())


def best_step(folder: Path) -> int | None:
    """Step of the checkpoint with the lowest validation loss (the first one if equal); None if none was validated.

    Raises:
        UserError: a state.json cannot be read.
    """
    losses = _validation_losses(folder)
    return min(losses, key=losses.__getitem__, default=None)


def best_loss(folder: Path) -> float | None:
    """Lowest validation loss of the checkpoints; None if none was validated. Raises UserError as best_step."""
    return min(_validation_losses(folder).values(), default=None)


def _validation_losses(folder: Path) -> dict[int, float]:
    losses = {}
    for step in list_steps(folder):
        try:
            loss = _read_record(folder, step)[0].val_loss
        except DamagedCheckpoint:
            continue
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    return losses


def _read_record(folder: Path, step: int) -> tuple[Position, str]:
    """Reads state.json: the position, and the checksum of state.safetensors.

    Raises:
        DamagedCheckpoint: the checksum of state.json does not match.
        UserError: it cannot be read now, or another version of lavin_ds wrote it.
    """
    file = folder / _name(step) / "state.json"
    try:
        record = json.loads(_read(file))
        format = record["format"]
    except (ValueError, TypeError, KeyError):
        raise DamagedCheckpoint("state.json is not a checkpoint record") from None
    if format != FORMAT:  # checked before the checksum, which another version may compute differently
        raise UserError(
            f"{file} has format {format}; this version of lavin_ds reads format {FORMAT}. Resume with the version that "
            "wrote it, or give another --out."
        )
    if record.pop("record_sha256", None) != _record_sha256(record):
        raise DamagedCheckpoint("the checksum of state.json does not match")
    keys = {field.name for field in fields(Position)} | {"format", "sha256"}
    if record.keys() != keys:
        told = [f"unknown key {key}" for key in record if key not in keys]
        told += [f"no key {key}" for key in keys if key not in record]
        raise UserError(
            f"{file} was written by another version of lavin_ds ({', '.join(sorted(told))}): resume with that version, "
            "or give another --out."
        )
    del record["format"]
    sha256 = record.pop("sha256")
    return Position(**record), sha256


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()  # not memory-mapped: on NFS the folder of a mapped file cannot be removed
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}). The checkpoint is left as it is. Check the disk and start "
            f"again, or move {file.parent} elsewhere to go on from the checkpoint before it."
        ) from None


def load(folder: Path, step: int) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        DamagedCheckpoint: a checksum does not match.
        UserError: a file cannot be read now, or another version of lavin_ds wrote it.
    """
    at, sha256 = _read_record(folder, step)
    content = _read(folder / _name(step) / "state.safetensors")
    if sha256 != hashlib.sha256(content).hexdigest():
        raise DamagedCheckpoint("the checksum of state.safetensors does not match")
    return Checkpoint(at, safetensors_torch.load(content))


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose checksums match; None if there is none.

    Newer checkpoints, which are damaged, are renamed: otherwise `save` would count them among those it keeps, and could
    not save their steps again. `warn(sentence)` is called for each.

    Raises:
        UserError: the newest one cannot be read now, or another version of lavin_ds wrote it.
    """
    for step in reversed(list_steps(folder)):
        try:
            return load(folder, step)
        except DamagedCheckpoint as error:
            damaged = folder / _name(step)
            aside = folder / f"damaged-{_name(step)}"
            shutil.rmtree(aside, ignore_errors=True)  # from an earlier start
            damaged.rename(aside)
            warn(
                f"The checkpoint {damaged} is damaged ({error}): going back to the one before it. It is renamed to "
                f"{aside.name} and not used. You can delete it."
            )
    return None


def load_newest_on_all_ranks(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Rank 0 chooses a checkpoint by `load_newest`, and every rank reads it from disk. Every rank must call it.

    Raises:
        UserError: on all ranks, as load_newest, or if a rank does not find the checkpoint that rank 0 found.
    """
    newest, found, trouble = None, None, None
    if dist.get_rank() == 0:
        try:
            newest = load_newest(folder, warn)
            found = newest and _read_record(folder, newest.at.step)
        except (UserError, DamagedCheckpoint) as error:
            trouble = str(error)
    chosen = [(found, trouble)]
    dist.broadcast_object_list(chosen, src=0)
    found, trouble = chosen[0]
    if trouble:
        raise UserError(trouble)
    if dist.get_rank() != 0:
        newest, trouble = _load_the_same(folder, found)
    troubles: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(troubles, trouble)
    others = [rank for rank, told in enumerate(troubles) if told]
    if others:
        told = f"the checkpoint of step {found[0].step}" if found else "no checkpoint"
        raise UserError(
            f"The ranks do not see the same files in {folder}. Rank 0 finds {told}; rank {', '.join(map(str, others))}:"
            f" {troubles[others[0]]} --out must be on a file system that all nodes share."
        )
    return newest


def _load_the_same(folder: Path, found: tuple[Position, str] | None) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint that rank 0 found, given its position and checksum; or why this rank cannot read it."""
    if found is None:
        steps = list_steps(folder)
        return None, f"the checkpoint of step {steps[-1]}." if steps else None
    at, sha256 = found
    if at.step not in list_steps(folder):
        return None, "no checkpoint of that step."
    try:
        if _read_record(folder, at.step)[1] != sha256:
            return None, "another checkpoint of that step."
        return load(folder, at.step), None
    except DamagedCheckpoint as error:
        return None, f"{error}."
    except UserError as error:
        return None, str(error)


def load_best(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss among those whose checksums match.

    `warn(sentence)` is called for each better one that is damaged.

    Raises:
        UserError: a checkpoint cannot be read now.
    """
    losses = _validation_losses(folder)
    for step in sorted(losses, key=losses.__getitem__):
        try:
            return load(folder, step)
        except DamagedCheckpoint as error:
            warn(
                f"The checkpoint {folder / _name(step)}, with the lowest validation loss, is damaged ({error}): using "
                "the next best."
            )
    return None


def load_optimizer(engine: deepspeed.DeepSpeedEngine, trainable: dict[str, nn.Parameter], checkpoint: Checkpoint):
    """Loads a checkpoint's moments into the engine's optimizer; each rank loads its own part.

    The parameters themselves are loaded into the model before the engine is built.
    """
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer.optimizer if stage else engine.optimizer
    for parameter in _optimized(engine):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(checkpoint.at.updates)),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
    _link_moments(engine)
    for moment in MOMENTS:
        for name, parameter in trainable.items():
            _set_moment(engine, parameter, moment, checkpoint.tensors[f"{moment}/{name}"])


def _optimized(engine) -> list[torch.Tensor]:
    """The tensors that AdamW updates on this rank: parameters, or under ZeRO flat shards of them."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for group in engine.optimizer.param_groups for p in group["params"]]
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _link_moments(engine) -> None:
    """Links each parameter to its moments, for DeepSpeed's accessors.

    ZeRO 1 and 2 do that in their first step, at a moment when only the first parameter group has moments, so those of
    the second group are never found (DeepSpeed 0.19). And here the links may be needed before the first step.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _get_moment(engine, parameter: nn.Parameter, moment: str) -> torch.Tensor:
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state[parameter][moment]
    return safe_get_full_optimizer_state(parameter, moment)


def _set_moment(engine, parameter: nn.Parameter, moment: str, value: torch.Tensor) -> None:
    value = value.to(parameter.device)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.optimizer.state[parameter][moment].copy_(value)
    elif stage == 3:
        # safe_set_full_optimizer_state fails if the parameter does not divide evenly: its last shard is padded.
        part = safe_get_local_optimizer_state(parameter, moment).numel()
        rank = dist.get_rank(engine.optimizer.dp_process_group)
        padded = F.pad(value.flatten(), (0, part * (rank + 1)))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, part * rank, part), moment)
    else:
        parameter.set_full_hp_param(value, moment)
