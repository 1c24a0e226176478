"""Which processes a rank watches, and what it does when one is gone."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest

from lavin_ds.launching.rank import is_launcher
from lavin_ds.machine import free_port

STUCK = """
import ctypes, os, sys, time
from lavin_ds.launching.rank import end, watch_launchers
from lavin_ds.training.stop import StopSignal
watch_launchers(StopSignal())
if os.environ["RANK"] == "1":
    time.sleep(1)
    print("what really happened", file=sys.stderr)
    end(3)
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
lock(mutex)
"""


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("/usr/bin/python3 /usr/bin/deepspeed --num_gpus 2 launch/train.py", True),
        ("python -m deepspeed.launcher.runner --quiet", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x", True),
        ("python /site-packages/deepspeed/launcher/launch.py", True),
        ("-bash", False),
        ("vim notes-on-deepspeed.md", False),
        ("/home/me/deepspeed/bin/tmux new", False),
        ("python launch/train.py deepspeed=zero3", False),
    ],
)
def test_only_deepspeeds_own_launchers_are_watched(command, is_one):
    assert is_launcher(command.split()) is is_one


def test_a_shell_that_was_told_to_start_one_is_not():
    assert not is_launcher(["bash", "-c", "cd /runs; deepspeed launch/train.py"])


@pytest.mark.slow
def test_a_rank_that_waits_for_a_failed_one_in_c_code_ends_in_seconds(tmp_path):
    # As in an NCCL collective, where no Python handler runs; the launcher would wait 30 seconds for each such rank.
    (tmp_path / "stuck.py").write_text(STUCK)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1, 2]}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--log_level=critical"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", str(tmp_path / "stuck.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert done.returncode == 3
    assert "what really happened" in done.stderr
