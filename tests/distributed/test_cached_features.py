"""Cached features under the deepspeed launcher."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from lavin_ds.config import load_recipe
from lavin_ds.data.schema import load_manifest
from lavin_ds.data_prep import features
from lavin_ds.launching.deepspeed_command import launch_command
from lavin_ds.machine import free_port

pytestmark = pytest.mark.slow

FROZEN = "model.vision_adapter.kind=none"


def test_two_ranks_write_the_same_files_and_manifest_as_one(workplace, tmp_path):
    alone, launched = (shutil.copytree(workplace.folder / "shards", tmp_path / name) for name in ("one", "two"))
    clip = workplace.folder / "vit.safetensors"
    job = features.plan(alone, clip, load_recipe(str(workplace.recipe), [FROZEN]))
    features.extract(job)
    features.finish(job)
    words = ["--data", str(launched), "--clip", str(clip), "--recipe", str(workplace.recipe), FROZEN]
    done = subprocess.run(
        launch_command("features.py", 2, None, free_port(), words),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert load_manifest(launched) == load_manifest(alone) and load_manifest(alone).features.rows > 0
    for path in alone.iterdir():
        assert (launched / path.name).read_bytes() == path.read_bytes(), path.name
