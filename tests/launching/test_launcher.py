"""Which devices a launch takes, and what it passes on."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lavin_ds.errors import UserError
from lavin_ds.launching import deepspeed_command, process


@pytest.fixture
def machine(monkeypatch):
    """A machine whose GPUs CUDA_VISIBLE_DEVICES leaves so many of."""

    def have(gpus: int, visible: str | None):
        monkeypatch.setattr(deepspeed_command, "gpus", lambda: gpus)
        monkeypatch.setattr(process, "gpus", lambda: gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


@pytest.mark.parametrize(
    ("gpus", "visible", "words"),
    [
        (2, "2,3", "--include localhost:2,3"),
        (4, " 7, 5,1,0", "--include localhost:7,5"),
        (2, "4,5,-1,6", "--include localhost:4,5"),
        (8, None, "--num_gpus 2"),
        (0, "", "--num_gpus 2"),  # ranks on the CPU
    ],
)
def test_a_launch_takes_the_gpus_that_are_visible(machine, gpus, visible, words):
    machine(gpus, visible)
    assert words in " ".join(deepspeed_command.launch_command("train.py", 2, None, 29500, []))


@pytest.mark.parametrize(
    ("gpus", "visible", "said"),
    [
        (2, "GPU-8f1c,GPU-77aa", "nvidia-smi -L"),
        (2, "MIG-1,MIG-2", "python launch/train.py"),
        (1, "3", "CUDA_VISIBLE_DEVICES=3 has 1"),
        (1, None, "this machine has 1: give --ranks 1"),
    ],
)
def test_gpus_that_cannot_be_taken_are_told(machine, gpus, visible, said):
    machine(gpus, visible)
    with pytest.raises(UserError, match=said):
        deepspeed_command.launch_command("train.py", 2, None, 29500, [])


def test_deepspeed_starts_the_ranks_on_the_visible_gpus(machine, monkeypatch):
    from deepspeed.launcher import runner

    machine(2, "2,3")
    command = deepspeed_command.launch_command("train.py", 2, None, 29500, ["--recipe", "x"])
    monkeypatch.setattr(runner.os, "environ", process._environment() | {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"})
    started = []

    def start(words, env):
        started.append(words)
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=start, run=subprocess.run))
    runner.main(command[3:])
    world = next(word.split("=", 1)[1] for word in started[0] if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [2, 3]}


def test_ranks_on_other_nodes_are_asked_to_stop_then_ended_by_deepspeed(tmp_path):
    asked, stop = tmp_path / "asked", tmp_path / "run" / ".stop"
    deepspeed = ["bash", "-c", f"trap 'exit 7' TERM; touch {asked}; while :; do sleep 0.1; done"]
    code = "import sys; from pathlib import Path; from lavin_ds.launching.process import run_to_the_end as run\n"
    code += "sys.exit(run(sys.argv[2:], Path(sys.argv[1])))"
    launch = subprocess.Popen([sys.executable, "-c", code, str(stop), *deepspeed])
    for path in (asked, stop):
        wait_for(path)
        time.sleep(0.2)
        assert launch.poll() is None
        launch.send_signal(signal.SIGINT)
    assert launch.wait(timeout=20) == 7


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
