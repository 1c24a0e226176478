"""A run that was stopped, killed or moved goes on to the numbers of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from ranks import Spy, run_ranks
from safetensors.torch import load_file

from lavin_ds.training.checkpoint import list_steps, load_newest

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
    assert list_steps(target / "checkpoints") == [14]


def test_resumed_run_ends_bit_identical_with_dropout_on(workplace, uninterrupted):
    copy_up_to_step_14(uninterrupted, workplace.folder / "runs" / "resumed")
    assert_same_run(workplace.train("resumed", 2, *DROPOUT, resume="auto"), uninterrupted)


def test_adapters_replicated_over_tensor_parallel_ranks_stay_bit_identical_with_dropout_on(workplace):
    run = workplace.train("replicas", 2, *DROPOUT, "tensor_parallel=2", spy=Spy(keep_values=True))
    first, second = (load_file(run.folder / f"values-of-rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == run.adapters.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value) and torch.equal(run.adapters[name], value), name


@pytest.fixture(scope="module")
def without_dropout(workplace):  # whose numbers belong to a rank
    return workplace.train("without-dropout", 2)


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        pytest.param("on-four-ranks", 4, ("training.micro_batch=1",), marks=pytest.mark.slow),
        pytest.param("on-one-rank", 1, ("deepspeed=zero0",), marks=pytest.mark.slow),
        ("at-stage-3", 2, ("deepspeed=zero3",)),
        ("split", 2, ("tensor_parallel=2", "deepspeed=zero1")),
    ],
)
def test_a_run_goes_on_with_other_ranks_and_at_another_zero_stage(workplace, without_dropout, name, ranks, words):
    copy_up_to_step_14(without_dropout, workplace.folder / "runs" / name)
    run = workplace.train(name, ranks, *words, resume="auto")
    torch.testing.assert_close(run.losses, without_dropout.losses, rtol=1e-5, atol=0)


def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_checkpoints_before_it(workplace, without_dropout):
    copy_up_to_step_14(without_dropout, workplace.folder / "runs" / "full")
    before = checkpoint_files(workplace.folder / "runs" / "full")
    # The limit stands in for a disk: the write of the 35 kB fails in the kernel, half done.
    run = workplace.train("full", 2, resume="auto", code=2, spy=Spy(file_size_limit=20_000))
    printed = run.log.read_text()
    said = printed.split("rank 1")[0]  # which only lost its peer
    assert said.count("\nerror: ") == 1 and "Traceback" not in said
    assert "checkpoint of step 20 cannot be written" in said and "--resume auto" in said
    assert checkpoint_files(run.folder) == before


def test_a_rank_that_raises_is_read_before_those_that_lost_it(workplace):
    run = workplace.train("raises", 2, code=1, spy=Spy(fails_at=3))
    printed = run.log.read_text()
    assert "ValueError: what really happened" in printed.split("rank 1 failed:")[1].split("failed:")[0]
    assert "rank 0 failed:" in printed.split("rank 1 failed:")[1]  # nobody ended it here: it says so, and later
    assert len(run.metrics) == 3
    # Before the first step is done there is nothing to keep.
    assert not workplace.train("raises-at-once", 2, code=1, spy=Spy(fails_at=0)).folder.exists()


def checkpoint_files(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints"
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def start(command: list[str], metrics: Path, steps: int) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Starts a launch as `lavin-ds train` does, in a process that gets the signals; returns when it has written down
    `steps` steps, those of an earlier start included, with all processes below it."""
    return start_bare([command[0], str(Path(__file__).with_name("run_launch.py")), *command], metrics, steps)


def start_bare(command: list[str], metrics: Path, steps: int, **more) -> tuple[subprocess.Popen, list[psutil.Process]]:
    old = metrics.stat().st_ino if metrics.exists() else None  # a start begins with a new file
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | more
    outer = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_ino != old and len(metrics.read_text().splitlines()) >= steps):
        assert outer.poll() is None and time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.1)
    return outer, psutil.Process(outer.pid).children(recursive=True)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            return True
        time.sleep(0.1)
    return False


# Long enough not to end before the test does something to it.
ENDLESS = ("training.epochs=500", "training.checkpoint_every=10")


def test_sigterm_saves_and_leaves_no_process_and_the_run_goes_on(workplace, uninterrupted):
    words = (*DROPOUT, "training.checkpoint_every=1000")
    run = workplace.folder / "runs" / "stopped"
    outer, below = start(workplace.command("stopped", 2, *words), run / "metrics.jsonl", 3)
    outer.send_signal(signal.SIGTERM)
    assert outer.wait(timeout=120) == 143
    assert gone(below, 0.2)
    assert len(list_steps(run / "checkpoints")) == 1
    assert b"go on with --resume auto" in outer.stderr.read()
    assert_same_run(workplace.train("stopped", 2, *words, resume="auto"), uninterrupted)


@pytest.mark.slow
def test_signals_to_a_bare_deepspeed_launch_save_too(workplace, without_dropout):
    """It dies of them at once, and the ranks are told by their terminal, or by its end."""
    run = workplace.folder / "runs" / "bare"
    words = ("training.checkpoint_every=1000",)
    stops = ((3, 1, lambda outer: outer.terminate()), (6, 2, lambda outer: os.killpg(outer.pid, signal.SIGINT)))
    for steps, ranks, stop in stops:
        command = workplace.command("bare", ranks, *words, resume="auto")
        outer, below = start_bare(command, run / "metrics.jsonl", steps)
        stop(outer)
        assert gone(below, 20)
        assert b"go on with --resume auto" in outer.communicate(timeout=10)[1]
        assert list_steps(run / "checkpoints")[-1] == len((run / "metrics.jsonl").read_text().splitlines()) < 20
    run = workplace.train("bare", 2, *words, resume="auto")
    torch.testing.assert_close(run.losses, without_dropout.losses, rtol=1e-5, atol=0)


# Nodes that are this machine, whose processes are nobody's children here.
PDSH = """
while [ "$1" != -w ]; do shift; done
hosts=${2//,/ }; shift 2
codes=$(mktemp -d) n=0 worst=0
for host in $hosts; do
    line="$*" code="$codes/$n"
    line="${line//%n/$n}; echo \\$? > $code.tmp; mv $code.tmp $code"
    (env -u LAVIN_DS_LAUNCHER_PID setsid bash -c "$line" &)
    n=$((n + 1))
done
for ((i = 0; i < n; i++)); do
    until [ -e "$codes/$i" ]; do sleep 0.1; done
    code=$(cat "$codes/$i")
    worst=$((code > worst ? code : worst))
done
exit $worst
"""


@pytest.mark.slow
def test_sigterm_saves_a_run_on_several_nodes_and_leaves_no_process(workplace, tmp_path):
    for name, body in (("pdsh", PDSH), ("ssh", "echo 127.0.0.1")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("node-1 slots=1\nnode-2 slots=1\n")
    run = workplace.folder / "runs" / "nodes"
    words = workplace.arguments("nodes", *ENDLESS, "training.checkpoint_every=1000").words()
    lavin_ds = str(Path(sys.executable).with_name("lavin-ds"))
    command = [lavin_ds, "train", "--hostfile", str(tmp_path / "hostfile"), *words]
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    outer, below = start_bare(command, run / "metrics.jsonl", 3, PATH=path)
    outer.terminate()
    assert outer.wait(timeout=60) == 143, outer.stderr.read()
    assert gone(below, 0.2)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run) in (p.info["cmdline"] or [])]
    assert list_steps(run / "checkpoints") == [len((run / "metrics.jsonl").read_text().splitlines())]
    assert not (run / ".stop").exists()


@pytest.mark.slow
def test_killed_launchers_and_ranks_leave_nothing_running(workplace):
    """One launch after another in the same folder, each killed at another place."""
    run = workplace.folder / "runs" / "killed"
    for steps, target in ((3, "outer"), (5, "inner"), (7, "rank")):  # each start goes on from a step it saved
        words = (*ENDLESS, "training.checkpoint_every=2")
        outer, below = start(workplace.command("killed", 2, *words, resume="auto"), run / "metrics.jsonl", steps)
        assert len(below) == 4  # DeepSpeed's runner and launcher, two ranks
        victim = {"outer": outer, "inner": below[1], "rank": below[-1]}[target]
        os.kill(victim.pid, signal.SIGKILL)
        assert gone(below, 10), target
        outer.wait(timeout=10)
        if target == "rank":
            assert outer.returncode != 0
            assert b"Traceback" not in outer.stderr.read()  # of the rank that lost its peer


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(uninterrupted, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted.folder / "checkpoints", folder)
    assert list_steps(folder) == [14, 20]
    state = folder / "step-00000020" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    bytes_found = state.read_bytes()
    warnings = []
    assert load_newest(folder, warnings.append).at.step == 14
    assert len(warnings) == 1 and "step-00000020 is damaged" in warnings[0] and "damaged-step-00000020" in warnings[0]
    # Otherwise `save` would count it as the newest, and remove the good ones in its favour.
    assert list_steps(folder) == [14]
    assert (folder / "damaged-step-00000020" / "state.safetensors").read_bytes() == bytes_found


def test_a_stop_behind_a_step_that_was_saved_anyway_does_not_save_it_again(workplace):
    words = ("training.checkpoint_every=1", "training.keep_checkpoints=1")
    run = workplace.train("stopped-saved", 2, *words, code=143, spy=Spy(stops_at=3))
    assert list_steps(run.folder / "checkpoints") == [run.metrics[-1]["step"]]
    assert "go on with --resume auto" in run.log.read_text()


def test_ranks_that_do_not_see_the_checkpoint_of_rank_0_end_the_run(workplace, without_dropout):
    """As with --out on disks of the nodes' own, where only rank 0's has checkpoints."""
    copy_up_to_step_14(without_dropout, workplace.folder / "runs" / "node-1")
    log = workplace.folder / "two-nodes.log"
    spy = Spy(second_out=workplace.folder / "runs" / "node-2")
    assert run_ranks(2, workplace.arguments("node-1", resume="auto"), log, spy) == [2, 2]
    printed = log.read_text()
    said = " ".join(printed.split("error (rank 1)")[0].split())
    assert "Rank 0 finds the checkpoint of step 14; rank 1: no checkpoint of that step" in said
    assert "--out must be on a file system that all nodes share" in said
    assert "Traceback" not in printed
