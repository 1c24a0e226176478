"""Checks that memory does not grow during a run: watches the resident set of a training process for an hour.

    python benchmarks/soak.py [--minutes 60] [--folder DIR] [--json]

Trains the shipped tiny base on one rank, as `lavin-ds train` does, with validation and a checkpoint every 50 steps, and
reads the process's resident set twice per second. glibc is set to return freed memory at once. By default it keeps the
most memory that it ever needed. Rows have ever new lengths, so this grows in steps for an hour (once by 4 MiB at minute
33, constant to 0.1 MiB for 14 minutes before and 26 after). Such steps could hide a leak or look like one.

After a warm-up (a third of the time), a line is fitted to the means of twenty equal stretches of time. Its slope is
printed with twice its standard error. The exit code is 0 if slope + error is at most 2 MiB per hour, 1 if slope - error
is above that, and 3 otherwise: give more --minutes then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

from harness import MALLOC_THAT_RETURNS, show

import numpy as np
import psutil
import typer
from rich.table import Table

import lavin_ds
from lavin_ds.config import load_recipe
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.run import read_metrics

ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"
LIMIT = 2.0  # MiB per hour
MIB = 2**20
STRETCHES = 20
STOPPED = 143  # exit code of a run that saved its state and stopped on request
EXIT_CODES = {"does not grow": 0, "grows": 1, "unclear": 3}
SETTINGS = (
    "training.epochs=100000",  # more than any run reaches
    "training.peak_lr=1e-3",
    "training.checkpoint_every=50",
    "training.keep_checkpoints=2",
    "training.validate_every=50",
    "training.validation_samples=64",
)


def make_data(folder: Path) -> Path:
    generate(folder / "scienceqa", seed=0, train=640, val=70, test=0)
    tokenizer = ASSETS / "llama" / "tokenizer.model"
    prepare(ScienceQA(folder / "scienceqa", splits="train,val"), tokenizer, folder / "shards", load_recipe("tiny"))
    return folder / "shards"


def soak(folder: Path, seconds: float, every: float) -> dict:
    arguments = TrainArguments(
        recipe="tiny",
        data=make_data(folder),
        llama=ASSETS / "llama",
        clip=ASSETS / "vit.safetensors",
        out=folder / "run",
        overrides=SETTINGS,
    )
    script = Path(lavin_ds.__file__).parents[1] / "launch" / "train.py"
    with open(folder / "log.txt", "w") as log:
        rank = subprocess.Popen([sys.executable, script, *arguments.words()], stderr=log, stdout=log, env=environment())
    metrics = folder / "run" / "metrics.jsonl"
    times, sizes = [], []
    try:
        while not metrics.exists() or metrics.stat().st_size == 0:
            alive(rank, folder)
            time.sleep(0.2)
        began = time.monotonic()
        process = psutil.Process(rank.pid)
        with open(folder / "rss.jsonl", "w", buffering=1) as record:
            while time.monotonic() - began < seconds:
                alive(rank, folder)
                times.append(time.monotonic() - began)
                sizes.append(process.memory_info().rss)
                record.write(json.dumps({"seconds": round(times[-1], 2), "rss": sizes[-1]}) + "\n")
                time.sleep(every)
        rank.send_signal(signal.SIGTERM)
        code = rank.wait(timeout=120)
    finally:
        rank.kill()
    steps = read_metrics(metrics)
    slope, error = fit(np.array(times), np.array(sizes))
    return {
        "minutes": seconds / 60,
        "steps": len(steps),
        "validations": sum("val_loss" in m for m in steps),
        "samples_of_memory": len(sizes),
        "first_mib": sizes[0] / MIB,
        "after_warmup_mib": sizes[len(sizes) // 3] / MIB,
        "last_mib": sizes[-1] / MIB,
        "peak_mib": max(sizes) / MIB,
        "slope_mib_per_hour": slope,
        "slope_error_mib_per_hour": error,
        "limit_mib_per_hour": LIMIT,
        "verdict": "grows" if slope - error > LIMIT else "does not grow" if slope + error <= LIMIT else "unclear",
        "exit_code": code,
    }


def environment() -> dict[str, str]:
    cpu = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | MALLOC_THAT_RETURNS | cpu


def alive(rank: subprocess.Popen, folder: Path) -> None:
    if rank.poll() is not None:
        sys.exit(f"the run ended with code {rank.returncode}:\n{(folder / 'log.txt').read_text()[-3000:]}")


def fit(seconds: np.ndarray, bytes: np.ndarray) -> tuple[float, float]:
    """Slope and twice its standard error, in MiB per hour, of a line through the means of equal stretches of time.

    Neighbouring readings are nearly equal, so fitting single readings would give too small an error.
    """
    settled = seconds > seconds[-1] / 3
    x = np.array([part.mean() for part in np.array_split(seconds[settled] / 3600, STRETCHES)])
    y = np.array([part.mean() for part in np.array_split(bytes[settled] / MIB, STRETCHES)])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(2 * covariance[0, 0] ** 0.5)


def main(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 60,
    every: Annotated[float, typer.Option(help="Seconds between readings.")] = 0.5,
    folder: Annotated[Path | None, typer.Option(help="Where to work; default: a temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how the memory of a training process grows."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(folder, minutes * 60, every)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            result = soak(Path(temporary), minutes * 60, every)
    show(result, as_json, results_table(result))
    if result["exit_code"] != STOPPED:
        sys.exit(f"the run did not stop as requested: its exit code is {result['exit_code']}, not {STOPPED}")
    raise typer.Exit(EXIT_CODES[result["verdict"]])


def results_table(result: dict) -> Table:
    table = Table(title=f"{result['minutes']:.0f} minutes of training", title_justify="left", show_header=False)
    rows = [
        ("optimizer steps", f"{result['steps']:,}, {result['validations']:,} validations and checkpoints"),
        ("resident after a third of the time", f"{result['after_warmup_mib']:,.1f} MiB"),
        ("at the end", f"{result['last_mib']:,.1f} MiB"),
        ("growth", f"{result['slope_mib_per_hour']:+.2f} +- {result['slope_error_mib_per_hour']:.2f} MiB per hour"),
        ("verdict", f"{result['verdict']} (limit: {LIMIT:.0f} MiB per hour)"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    typer.run(main)
