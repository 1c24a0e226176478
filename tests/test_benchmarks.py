"""The benchmarks run: small shapes, whatever the machine. Their claims are not checked here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_step_is_compared_at_three_distributions_of_lengths_and_nothing_else_is_printed():
    done = run("train_step.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [case["case"] for case in result["cases"]] == ["real", "assumed", "worst"]
    for case in result["cases"]:
        assert case["times_as_fast"] > 0 and 0 < case["share_of_memory"] < 1
    assert result["environment"]["torch"] and "USDT" not in done.stderr
