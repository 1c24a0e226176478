"""What is written, read, kept and removed, with a real engine at every ZeRO stage and with real ranks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks

from lavin_ds.config import load_recipe
from lavin_ds.errors import UserError
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.training.checkpoint import (
    Position,
    _write,
    list_steps,
    load,
    load_newest,
    load_newest_on_all_ranks,
    load_optimizer,
    save,
)


def build(arguments: TrainArguments, stage: int, folder: Path):
    """The engine before its first step, and its trainables."""
    from lavin_ds.parallel import initialize_tensor_parallel
    from lavin_ds.training.engine import build_engine, start_distributed
    from lavin_ds.weights.base import build_model

    device = start_distributed()
    initialize_tensor_parallel(1)
    zero = folder / f"zero{stage}.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = load_recipe(arguments.recipe, [f"deepspeed={zero}"])
    model = build_model(config, arguments.llama, arguments.clip, None, device)
    return build_engine(model, config), model.trainable()


def fail(sentence: str) -> None:
    raise AssertionError(sentence)


def save_before_the_first_update(arguments, folder: Path) -> None:
    for stage in range(4):
        engine, trainable = build(arguments, stage, folder)
        checkpoints = folder / str(stage)
        save(checkpoints, engine, trainable, Position(step=1, updates=0), 9, fail)
        first = load(checkpoints, 1)
        assert not any(t.any() for name, t in first.tensors.items() if name.startswith("exp_avg"))
        load_optimizer(engine, trainable, first)
        save(checkpoints, engine, trainable, Position(step=2, updates=1), 9, fail)  # as the optimizer has it now
        second = load(checkpoints, 2)
        assert first.tensors.keys() == second.tensors.keys() and len(first.tensors) == 3 * len(trainable)
        assert all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())


def test_every_zero_stage_saves_before_its_first_update(workplace, tmp_path):
    in_ranks(1, save_before_the_first_update, workplace.arguments("none"), tmp_path)


def prune(arguments, folder: Path) -> None:
    engine, trainable = build(arguments, 0, folder)

    def save_step(step: int, warn=fail, val_loss=None) -> None:
        save(folder, engine, trainable, Position(step, 0, val_loss=val_loss), 1, warn)

    # A checkpoint that cannot be removed costs space, not the run. One moved to another disk and linked is such.
    save_step(5)
    (folder / "step-00000005").rename(folder / "moved")
    (folder / "step-00000005").symlink_to(folder / "moved")
    warnings = []
    save_step(6, warnings.append)
    assert len(warnings) == 1 and "step-00000005 cannot be removed" in warnings[0]
    (folder / "step-00000005").unlink()

    # A damaged one does not count as the newest that is kept.
    save_step(20, val_loss=0.1)
    save_step(21, val_loss=0.2)
    assert list_steps(folder) == [20, 21]
    for step in (20, 21):
        state = folder / f"step-{step:08d}" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-1])
    shutil.copytree(folder / "moved", folder / "step-00000005")
    assert load_newest(folder, warnings.append).at.step == 5
    save_step(7)
    assert list_steps(folder) == [7]

    # A whole checkpoint makes room for none of its own step.
    before = (folder / "step-00000007" / "state.safetensors").stat().st_ino
    with pytest.raises(UserError, match="checkpoint of step 7 cannot be written"):
        save_step(7)
    assert (folder / "step-00000007" / "state.safetensors").stat().st_ino == before
    assert load(folder, 7).at.step == 7

    # NFS does not let go of a file that is mapped, nor of its folder.
    loaded = load(folder, 7)
    assert loaded.tensors and str(folder) not in Path("/proc/self/maps").read_text()


def test_what_is_kept_is_whole_and_what_cannot_be_removed_is_told(workplace, tmp_path):
    in_ranks(1, prune, workplace.arguments("none"), tmp_path)


def choose(whole: Path, other: Path, none: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert load_newest_on_all_ranks(whole, fail).at.step == 14
    assert load_newest_on_all_ranks(none, fail) is None
    for folders, said in (
        ((whole, none), "step 14; rank 1: no checkpoint of that step"),
        ((none, whole), "no checkpoint; rank 1: the checkpoint of step 14"),
        ((whole, other), "step 14; rank 1: another checkpoint of that step"),
    ):
        with pytest.raises(UserError, match=said + ".*all nodes share"):
            load_newest_on_all_ranks(folders[rank], fail)
    # What rank 0 cannot read is told by all of them, and nothing is renamed.
    if rank == 0:
        (other / "step-00000014" / "state.safetensors").unlink()
        (other / "step-00000014" / "state.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"state.safetensors cannot be read \(Input/output error\)"):
        load_newest_on_all_ranks(other, fail)
    assert list_steps(other) == [14]
    dist.destroy_process_group()


def test_all_ranks_go_on_from_the_same_checkpoint_or_none_does(tmp_path):
    for name, value in (("whole", 1.0), ("other", 2.0)):
        _write(tmp_path / name, Position(14, 14, val_loss=math.nan), {"value/a": torch.full((3,), value)})
    in_ranks(2, choose, tmp_path / "whole", tmp_path / "other", tmp_path / "none")
