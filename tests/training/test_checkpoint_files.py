"""Which checkpoints are set aside, and which stop the run because they may be good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lavin_ds.errors import UserError
from lavin_ds.training.checkpoint import (
    DamagedCheckpoint,
    Position,
    _prune,
    _record_sha256,
    _write,
    best_step,
    list_steps,
    load,
    load_newest,
    set_validation_loss,
)


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    for step in (7, 14):
        _write(tmp_path / "checkpoints", Position(step, step), {"value/a": torch.full((3,), float(step))})
    return tmp_path / "checkpoints"


def change_record(checkpoint: Path, **changes) -> None:
    """As another version might have written it: its checksum matches."""
    record = json.loads((checkpoint / "state.json").read_text()) | changes
    del record["record_sha256"]
    (checkpoint / "state.json").write_text(json.dumps(record | {"record_sha256": _record_sha256(record)}))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_checkpoint_that_cannot_be_read_now_stops_the_run_and_keeps_its_name(checkpoints, name):
    file = checkpoints / "step-00000014" / name
    file.rename(checkpoints / "good")
    file.symlink_to("/proc/self/mem")  # reading it is an I/O error
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Input/output error\)"):
        load_newest(checkpoints, pytest.fail)
    assert list_steps(checkpoints) == [7, 14]
    file.unlink()
    (checkpoints / "good").rename(file)
    assert load_newest(checkpoints, pytest.fail).at.step == 14


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"format": 2}, "has format 2; this version"), ({"sampler": 3}, "another version .*unknown key sampler")],
)
def test_a_checkpoint_of_another_version_is_refused_by_name_and_keeps_its_name(checkpoints, changes, said):
    change_record(checkpoints / "step-00000014", **changes)
    with pytest.raises(UserError, match=said):
        load_newest(checkpoints, pytest.fail)
    assert list_steps(checkpoints) == [7, 14]


def flip(content: bytes) -> bytes:
    return content.replace(b'"updates": 14', b'"updates": 15')


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [flip, cut, lambda _: b""], ids=["flipped", "truncated", "empty"])
def test_a_damaged_record_is_set_aside_and_the_checkpoint_before_it_is_used(checkpoints, damage):
    file = checkpoints / "step-00000014" / "state.json"
    file.write_bytes(damage(file.read_bytes()))
    warnings = []
    assert load_newest(checkpoints, warnings.append).at.step == 7
    assert len(warnings) == 1 and "state.json" in warnings[0]
    assert list_steps(checkpoints) == [7] and (checkpoints / "damaged-step-00000014").is_dir()


def test_nothing_is_removed_while_the_best_checkpoint_may_be_one_that_cannot_be_read(checkpoints):
    record = checkpoints / "step-00000007" / "state.json"
    record.unlink()
    record.symlink_to("/proc/self/mem")
    warnings = []
    _prune(checkpoints, 1, warnings.append)
    assert list_steps(checkpoints) == [7, 14] and len(warnings) == 1


def test_a_validation_loss_can_be_added_to_a_checkpoint(checkpoints):
    assert best_step(checkpoints) is None
    set_validation_loss(checkpoints, 7, 0.5)
    assert best_step(checkpoints) == 7
    at = load(checkpoints, 7).at
    assert (at.step, at.updates, at.val_loss) == (7, 7, 0.5)
    (checkpoints / "step-00000007" / "state.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint):
        load(checkpoints, 7)
