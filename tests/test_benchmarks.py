"""The benchmarks run: small shapes, whatever the machine. Their claims are not checked here."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=570, env=os.environ | environment)


def lines_of(done: subprocess.CompletedProcess) -> dict[str, list[dict]]:
    """The JSON lines of gpu.py by section, without the ones that say how long a section took."""
    sections = {}
    for line in map(json.loads, done.stdout.splitlines()):
        if line.keys() != {"section", "seconds"}:
            sections.setdefault(line["section"], []).append(line)
    return sections


def test_the_table_of_quantiles_has_the_mean_and_median_that_it_states(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from samples import real_lengths

    lengths = real_lengths(1043)
    assert abs(statistics.mean(lengths) - 303) < 1 and statistics.median(lengths) == 284 and max(lengths) == 512


def test_cases_take_turns_and_each_is_timed_every_time(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")  # the harness sets these for its process
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from harness import interleaved

    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b"] and [len(all) for all in seconds.values()] == [2, 2]


@pytest.mark.slow
def test_a_step_is_compared_at_three_distributions_of_lengths_and_nothing_else_is_printed():
    done = run("train_step.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [case["case"] for case in result["cases"]] == ["real", "assumed", "worst"]
    for case in result["cases"]:
        assert case["times_as_fast"] > 0 and 0 < case["share_of_memory"] < 1
    assert result["environment"]["torch"] and "USDT" not in done.stderr


@pytest.mark.slow
def test_the_gpu_proof_runs_on_a_cpu_at_small_shapes_and_without_deepspeed(tmp_path):
    no_deepspeed = "import sys; sys.modules['deepspeed'] = None"
    (tmp_path / "sitecustomize.py").write_text(no_deepspeed)
    done = run("gpu.py", "--json", "--budget", "500", PYTHONPATH=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    sections = lines_of(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(sections) == ["environment", "numerics", "attention", "speed", "decoding", "memory"]
    assert len(sections["memory"]) == 8 and all(abs(line["off"]) < 0.01 for line in sections["memory"])


@pytest.mark.slow
def test_a_section_that_runs_out_of_time_says_so_and_the_next_one_goes_on():
    done = run("gpu.py", "--json", "--sections", "attention,numerics", "--budget", "0.2", CUDA_VISIBLE_DEVICES="")
    sections = lines_of(done)
    assert done.returncode == 1
    for name in ("attention", "numerics"):
        assert sections[name][0]["ok"] is False and "stopped after its 0 s" in str(sections[name][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_proof_holds():
    done = run("gpu.py", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
