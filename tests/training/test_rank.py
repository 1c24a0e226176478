"""Which processes a rank watches."""

from __future__ import annotations

import pytest

from lavin_ds.training.rank import is_launcher


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
