"""A run that was stopped or killed goes on to the numbers of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from lavin_ds.training.checkpoint import list_steps, load_newest

pytestmark = pytest.mark.slow

DROPOUT = ("model.llm_adapter.dropout=0.2", "model.vision_adapter.dropout=0.2")


@pytest.fixture(scope="module")
def uninterrupted(workplace):
    return workplace.train("uninterrupted", 2, *DROPOUT)


def assert_same_run(run, reference):
    assert run.metrics[-1]["step"] == 20
    assert [m["loss"] for m in run.metrics] == [m["loss"] for m in reference.metrics]
    assert run.adapters.keys() == reference.adapters.keys()
    for name, value in reference.adapters.items():
        assert torch.equal(run.adapters[name], value), name


def copy_up_to_step_14(reference, target: Path):
    """The run as it stood when its checkpoint of step 14 was the newest."""
    shutil.copytree(reference.folder, target)
    shutil.rmtree(target / "checkpoints" / "step-00000020")
    for name in ("adapter.safetensors", "adapter.safetensors.json", "summary.json"):
        (target / name).unlink()


def test_resumed_run_ends_bit_identical_with_dropout_on(workplace, uninterrupted):
    folder = workplace.folder / "runs" / "resumed"
    copy_up_to_step_14(uninterrupted, folder)
    assert list_steps(folder / "checkpoints") == [14]
    assert_same_run(workplace.train("resumed", 2, *DROPOUT, resume="auto"), uninterrupted)


def test_sigterm_saves_and_leaves_no_process_and_the_run_goes_on(workplace, uninterrupted):
    command = workplace.command("stopped", 2, *DROPOUT, "training.checkpoint_every=1000")
    metrics = workplace.folder / "runs" / "stopped" / "metrics.jsonl"
    script = Path(__file__).with_name("run_launch.py")
    # As `lavin-ds train` does: run_to_the_end in a process that gets the signal.
    parent = subprocess.Popen(
        [command[0], str(script), *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert parent.poll() is None and time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.1)
    started = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=120) == 143
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    checkpoints = workplace.folder / "runs" / "stopped" / "checkpoints"
    assert len(list_steps(checkpoints)) == 1
    assert b"go on with --resume auto" in parent.stderr.read()

    resumed = workplace.train("stopped", 2, *DROPOUT, "training.checkpoint_every=1000", resume="auto")
    assert_same_run(resumed, uninterrupted)


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted.folder / "checkpoints", folder)
    assert list_steps(folder) == [14, 20]
    state = folder / "step-00000020" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    warnings = []
    assert load_newest(folder, warnings.append).step == 14
    assert len(warnings) == 1 and "step-00000020" in warnings[0]
    state.write_bytes(content[: len(content) // 2])
    warnings.clear()
    assert load_newest(folder, warnings.append).step == 14
    assert "step-00000020" in warnings[0]
