"""Checks that nothing is lost if a run is killed: twenty times, at random moments and places.

    python benchmarks/kill.py [--kills 20] [--epochs 15] [--seed 0] [--json]

Trains the shipped tiny base twice on two ranks, with dropout and validation. The first run is not interrupted. The
second is killed with SIGKILL again and again: a rank, one of DeepSpeed's two launchers, or `lavin-ds train` itself, up
to three seconds after its first new step or while it starts. Each time, no process may be left running, and `--resume
auto` continues the run.

The exit code is 1 unless the final adapters and the loss of every step are bit-identical to those of the first run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed prints a warning to stdout

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import lavin_ds
from lavin_ds.config import load_recipe
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.run import read_metrics
from lavin_ds.training.checkpoint import list_steps

ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"
PLACES = ("a rank", "inner launcher", "outer launcher", "lavin-ds train")
# Words in command lines that identify processes. A launcher has other short-lived children, such as compilers.
WORDS = {
    "a rank": "launch/train.py",
    "inner launcher": "deepspeed.launcher.launch",
    "outer launcher": "deepspeed.launcher.runner",
}
INTO_STEPS = 3  # seconds after the first new step, at most
START_SHARE = 0.2  # share of kills while the run is starting
console = Console(stderr=True)


@dataclass(frozen=True)
class Kill:
    """One kill. step: the last step done; resumes_from: the step of the newest checkpoint.

    gone_after: seconds until no process ran.
    """

    place: str
    seconds_after_start: float
    step: int
    resumes_from: int
    gone_after: float | None  # None if a process still ran after 20 seconds


def make_data(folder: Path) -> Path:
    generate(folder / "scienceqa", seed=0, train=640, val=70, test=0)
    tokenizer = ASSETS / "llama" / "tokenizer.model"
    prepare(ScienceQA(folder / "scienceqa", splits="train,val"), tokenizer, folder / "shards", load_recipe("tiny"))
    return folder / "shards"


def start(shards: Path, run: Path, epochs: float) -> subprocess.Popen:
    words = ["train", "--recipe", "tiny", "--data", shards, "--llama", ASSETS / "llama", "--out", run, "--ranks", "2"]
    words += ["--clip", ASSETS / "vit.safetensors", "--resume", "auto", f"training.epochs={epochs}"]
    words += ["training.checkpoint_every=4", "training.validate_every=25", "training.validation_samples=32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(run.with_suffix(".log"), "a") as log:
        command = [Path(sys.executable).with_name("lavin-ds"), *map(str, words)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def finish(process: subprocess.Popen, run: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"a run ended with code {process.returncode}:\n{run.with_suffix('.log').read_text()[-3000:]}")


def steps_of(run: Path) -> int:
    metrics = read_metrics(run / "metrics.jsonl")
    return metrics[-1]["step"] if metrics else 0


def kill(process: subprocess.Popen, run: Path, place: str, rng: random.Random) -> Kill | None:
    """Waits for a random moment and kills. None if the run ended before."""
    began = time.monotonic()
    before = steps_of(run)
    if rng.random() < START_SHARE:
        wait(process, rng.uniform(0.5, 6))
    else:
        while process.poll() is None and steps_of(run) <= before:
            time.sleep(0.05)
        wait(process, rng.uniform(0, INTO_STEPS))
    if process.poll() is not None:
        return None
    root = psutil.Process(process.pid)
    tree = [root, *root.children(recursive=True)]
    victims = {name: outermost([one for one in tree[1:] if runs(one, word)]) for name, word in WORDS.items()}
    victims["lavin-ds train"] = [root]
    if not victims[place]:  # the process does not exist yet
        place = [name for name in reversed(PLACES) if victims[name]][-1]
    victim = rng.choice(victims[place])
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    while any(alive(p) for p in tree) and time.monotonic() - killed < 20:
        process.poll()
        time.sleep(0.05)
    left = any(alive(p) for p in tree)
    for one in filter(alive, tree):
        one.kill()
    process.wait()
    steps = list_steps(run / "checkpoints")
    gone = None if left else round(time.monotonic() - killed, 2)
    return Kill(place, round(killed - began, 2), steps_of(run), steps[-1] if steps else 0, gone)


def outermost(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes without those whose parent is one of them: before exec, a child has its parent's command line."""
    pids = {process.pid for process in processes}
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.ppid() not in pids:
                found.append(process)
    return found


def runs(process: psutil.Process, word: str) -> bool:
    """Whether the process was started to run `word`, a module or a script."""
    with suppress(psutil.NoSuchProcess):
        return any(argument.endswith(word) for argument in process.cmdline()[:4])
    return False


def wait(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def measure(folder: Path, kills: int, epochs: float, seed: int) -> dict:
    rng = random.Random(seed)
    shards = make_data(folder)
    whole, killed = folder / "whole", folder / "killed"
    with console.status("the uninterrupted run"):
        began = time.monotonic()
        finish(start(shards, whole, epochs), whole)
        seconds = time.monotonic() - began
    done: list[Kill] = []
    with console.status("the killed run") as status:
        while len(done) < kills:
            result = kill(process := start(shards, killed, epochs), killed, PLACES[len(done) % len(PLACES)], rng)
            if result is None:
                finish(process, killed)
                sys.exit(f"the run ended after {len(done)} kills: give more --epochs")
            done.append(result)
            status.update(f"the killed run: {len(done)} of {kills} kills, at step {result.step}")
        finish(start(shards, killed, epochs), killed)
    first, second = (load_file(run / "adapter.safetensors") for run in (whole, killed))
    losses = [[m["loss"] for m in read_metrics(run / "metrics.jsonl")] for run in (whole, killed)]
    identical = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return {
        "kills": [asdict(one) for one in done],
        "steps": len(losses[0]),
        "uninterrupted_seconds": round(seconds, 1),
        "steps_done_twice": sum(one.step - one.resumes_from for one in done),
        "nothing_left_running": all(one.gone_after is not None for one in done),
        "slowest_end_seconds": max((one.gone_after or 20 for one in done), default=0),
        "adapters_bit_identical": identical,
        "losses_bit_identical": losses[0] == losses[1],
    }


def show(result: dict) -> None:
    table = Table(title=f"{len(result['kills'])} kills in a run of {result['steps']} steps", title_justify="left")
    for name in ("Killed", "After", "At step", "Resumes from", "All gone after"):
        table.add_column(name, justify="left" if name == "Killed" else "right")
    for one in result["kills"]:
        gone = "NEVER" if one["gone_after"] is None else f"{one['gone_after']:.1f} s"
        after = f"{one['seconds_after_start']:.1f} s"
        table.add_row(one["place"], after, str(one["step"]), str(one["resumes_from"]), gone)
    out = Console()
    out.print(table)
    out.print(f"adapters bit-identical to the uninterrupted run's: {result['adapters_bit_identical']}")
    out.print(f"every step's loss too: {result['losses_bit_identical']}")
    out.print(
        f"steps computed twice: {result['steps_done_twice']}; nothing left running: {result['nothing_left_running']}"
    )


def main(
    kills: Annotated[int, typer.Option(help="Number of kills.")] = 20,
    epochs: Annotated[float, typer.Option(help="Epochs of 20 steps; must be enough for all kills.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of the moments and places.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Kill a run again and again and compare its result with that of an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), kills, epochs, seed)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    good = result["adapters_bit_identical"] and result["losses_bit_identical"] and result["nothing_left_running"]
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
