"""Checkpoints: the trainables and their optimizer moments, whole, in one file, whatever the ZeRO stage.

    RUN/checkpoints/step-00000200/state.safetensors   value/NAME, exp_avg/NAME, exp_avg_sq/NAME, fp32
    RUN/checkpoints/step-00000200/state.json          step, updates, validation loss, checksum

Nothing else is needed to go on: the order of samples, the learning rate and the dropout of a step are functions
of (seed, step). At 3.8M parameters the file has 45 MB, so it is not worth splitting over ranks, and a run resumes
on another number of ranks or at another ZeRO stage.

A checkpoint is put together in a folder of another name and renamed when it is complete and on disk. One that turns
out damaged is renamed to damaged-step-00000200: kept to be looked at, and in nobody's count.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from lavin_ds.training import scale
from lavin_ds.weights.tensor_files import save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
DAMAGED = (OSError, ValueError, TypeError, SafetensorError)  # what `load` raises


@dataclass(frozen=True)
class Position:
    """Where a run stands. step: optimizer steps done, skipped ones included; updates: without those, which is what
    AdamW corrects its bias by; loss_scale and its age: see scale.py; val_loss: of these parameters, None if they were
    not validated."""

    step: int
    updates: int
    loss_scale: float = scale.START
    loss_scale_age: int = 0
    val_loss: float | None = None


START = Position(step=0, updates=0)


@dataclass(frozen=True)
class Checkpoint:
    """tensors: `kind/parameter name` to fp32 tensors on the CPU."""

    at: Position
    tensors: dict[str, torch.Tensor]

    def values(self) -> dict[str, torch.Tensor]:
        """Trainable values by parameter name."""
        return {k.removeprefix("value/"): t for k, t in self.tensors.items() if k.startswith("value/")}


def gather_values(engine: deepspeed.DeepSpeedEngine, trainable: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Whole fp32 values of the trainables on the CPU. Every rank must call it."""
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
    """Writes a checkpoint and removes all but the newest `keep` and the one with the least validation loss.

    Every rank must call it, once a step; rank 0 writes, and all return when the checkpoint is on disk. `warn(sentence)`
    is told of an old checkpoint that cannot be removed.

    Raises:
        UserError: on rank 0, it cannot be written. The checkpoints before it are as they were.
    """
    values = gather_values(engine, trainable)
    tensors = {f"value/{name}": value for name, value in values.items()}
    if at.updates:
        _link_moments(engine)
    for moment in MOMENTS:
        for name, parameter in trainable.items():
            # Before the first update the optimizer has no moments yet.
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
        write_json(unfinished / "state.json", asdict(at) | {"sha256": file_sha256(state)})
        unfinished.rename(folder / _name(at.step))  # fails if it exists: a whole checkpoint makes room for none
        sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {at.step} cannot be written to {folder}: {error}. Those before it are intact: "
            "free space and go on with --resume auto."
        ) from None


def _prune(folder: Path, keep: int, warn: Callable[[str], None]) -> None:
    steps = list_steps(folder)
    for old in sorted(set(steps) - {*steps[-keep:], best_step(folder)}):
        try:
            shutil.rmtree(folder / _name(old))
        except OSError as error:  # it costs space, not the run
            warn(f"The old checkpoint {folder / _name(old)} cannot be removed: {error}.")


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.is_dir())


def best_step(folder: Path) -> int | None:
    """Step of the checkpoint with the least validation loss, the first of equals; None if none was validated."""
    losses = _validation_losses(folder)
    return min(losses, key=losses.__getitem__, default=None)


def best_loss(folder: Path) -> float | None:
    return min(_validation_losses(folder).values(), default=None)


def _validation_losses(folder: Path) -> dict[int, float]:
    losses = {step: _record(folder, step).get("val_loss") for step in list_steps(folder)}
    return {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}


def _record(folder: Path, step: int) -> dict:
    try:
        return json.loads((folder / _name(step) / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def load(folder: Path, step: int) -> Checkpoint:
    """Raises OSError, ValueError, TypeError or SafetensorError for a checkpoint that is damaged."""
    record = _record(folder, step)
    content = (folder / _name(step) / "state.safetensors").read_bytes()  # not mapped: NFS keeps a mapped file's folder
    if record.pop("sha256", None) != hashlib.sha256(content).hexdigest():
        raise ValueError("its checksum does not hold")
    return Checkpoint(Position(**record), safetensors_torch.load(content))


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose checksum holds.

    Every damaged one passed over is renamed, so that it neither takes the place of a good one that `save` would keep
    nor is in the way when its step is made anew; `warn(sentence)` is told.
    """
    for step in reversed(list_steps(folder)):
        try:
            return load(folder, step)
        except DAMAGED as error:
            damaged = folder / _name(step)
            aside = folder / f"damaged-{_name(step)}"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            damaged.rename(aside)
            warn(
                f"The checkpoint {damaged} is damaged ({error}): going back to the one before it. It is now "
                f"{aside.name}, and nothing reads it: delete it when you have seen it."
            )
    return None


def load_newest_on_all_ranks(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """`load_newest` of rank 0, loaded by every rank, each from the disk. Every rank must call it.

    Raises:
        UserError: on all ranks alike, if one of them does not see what rank 0 sees.
    """
    newest = load_newest(folder, warn) if dist.get_rank() == 0 else None
    chosen = [newest and _record(folder, newest.at.step)]
    dist.broadcast_object_list(chosen, src=0)
    trouble = None
    if dist.get_rank() != 0:
        try:
            newest = _load_the_same(folder, chosen[0])
        except DAMAGED as error:
            trouble = str(error) or repr(error)
    troubles: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(troubles, trouble)
    others = [rank for rank, told in enumerate(troubles) if told]
    if others:
        found = f"the checkpoint of step {chosen[0]['step']}" if chosen[0] else "no checkpoint"
        raise UserError(
            f"The ranks do not see the same in {folder}. Rank 0 finds {found}; rank {', '.join(map(str, others))}: "
            f"{troubles[others[0]]}. --out must be on a file system that all nodes share."
        )
    return newest


def _load_the_same(folder: Path, record: dict | None) -> Checkpoint | None:
    """What rank 0 has found, told by its state.json; raises as `load` does where it is not here."""
    if record is None:
        if steps := list_steps(folder):
            raise ValueError(f"the checkpoint of step {steps[-1]}")
        return None
    if _record(folder, record["step"]).get("sha256") not in (None, record["sha256"]):
        raise ValueError("another checkpoint of that step")
    return load(folder, record["step"])


def load_best(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint with the least validation loss of those whose checksum holds; `warn(sentence)` is told of a better
    one that is damaged."""
    losses = _validation_losses(folder)
    for step in sorted(losses, key=losses.__getitem__):
        try:
            return load(folder, step)
        except DAMAGED as error:
            warn(
                f"The checkpoint {folder / _name(step)}, of the best validation, is damaged ({error}): taking the next "
                "best."
            )
    return None


def load_optimizer(engine: deepspeed.DeepSpeedEngine, trainable: dict[str, nn.Parameter], checkpoint: Checkpoint):
    """Puts a checkpoint's moments into the engine's optimizer, each rank its own part.

    The values themselves go into the model before the engine is built.
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
    """The tensors that this rank's AdamW updates: parameters, or flat parts of them under ZeRO."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for group in engine.optimizer.param_groups for p in group["params"]]
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _link_moments(engine) -> None:
    """Tells DeepSpeed's accessors where the moments of each parameter are.

    ZeRO 1 and 2 do so by themselves in the first step, but after the first parameter group alone has moments:
    those of the second are never found (0.19). Here it may also be before the first step.
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
        # safe_set_full_optimizer_state fails if the ranks do not divide the parameter: its last part is padded.
        part = safe_get_local_optimizer_state(parameter, moment).numel()
        rank = dist.get_rank(engine.optimizer.dp_process_group)
        padded = F.pad(value.flatten(), (0, part * (rank + 1)))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, part * rank, part), moment)
    else:
        parameter.set_full_hp_param(value, moment)
