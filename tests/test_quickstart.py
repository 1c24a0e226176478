"""The embedded default does what the README promises, from the numbers of a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_that_could_not_see_learns_to_see(tmp_path):
    out = tmp_path / "quick"
    command = [Path(sys.executable).with_name("lavin-ds"), "quickstart", "--out", out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text(encoding="utf-8"))

    accuracy, chance = summary["accuracy"], summary["chance"]
    assert set(accuracy) == {"base", "text_only", "lavin"}
    columns = ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    assert all(list(scores) == columns for scores in [*accuracy.values(), chance])
    assert accuracy["lavin"]["IMG"] >= 80
    for blind in ("base", "text_only"):  # 210 questions: three standard deviations of guessing are 10 points
        assert accuracy[blind]["IMG"] <= chance["IMG"] + 10
    assert summary["adapter_bytes"] == Path(summary["paths"]["adapter"]).stat().st_size
    assert all(Path(path).exists() for path in summary["paths"].values())


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    command = [Path(sys.executable).with_name("lavin-ds"), "quickstart", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "not an empty folder" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
