"""Kills `lavin-ds prep` with SIGKILL at ten random moments, and finishes it with the same command each time.

    python benchmarks/prep_kill.py --data ScienceQA --tokenizer tokenizer.model [--kills 10] [--json]

Each time, the job starts from nothing with two workers and is killed at a random moment. Then the same command runs to
its end, with one, two or three workers. The benchmark counts processes that still run a second after the kill, output
that looks finished, and files that differ from an uninterrupted run. The exit code is 1 if there are any.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from prep import write_scienceqa
from rich.console import Console
from rich.table import Table

from lavin_ds.data_prep import workspace

# Smaller files than usual, so that a job of a few seconds writes dozens of them.
COMMAND = """
from lavin_ds.cli import prep
from lavin_ds.data_prep import pipeline
pipeline.RECORDS_PER_FILE, pipeline.IMAGES_PER_FILE = 64, 32
prep.app()
"""


class Job:
    def __init__(self, work: Path, data: Path, tokenizer: Path):
        self.out = work / "shards"
        self.progress = work / ".shards.part" / "progress.jsonl"
        words = ["scienceqa", "--data", data, "--tokenizer", tokenizer, "--out", self.out, "--json"]
        self.words = [sys.executable, "-c", COMMAND, *map(str, words)]

    def start(self, workers: int) -> subprocess.Popen:
        words = [*self.words, "--workers", str(workers)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def finish(self, workers: int) -> dict:
        stdout, _ = (process := self.start(workers)).communicate()
        if process.returncode:
            raise SystemExit(f"prep ended with {process.returncode}")
        return json.loads(stdout)

    def last_task(self) -> str:
        lines = workspace._read_lines(self.progress)
        return lines[-1].get("task", "begun") if lines else "not begun"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_once(job: Job, delay: float, workers: int, expected: dict[str, bytes]) -> dict:
    process = job.start(workers=2)
    time.sleep(delay)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    process.kill()
    process.wait()
    time.sleep(1)
    left = [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    looks_finished = job.out.exists()
    reached = job.last_task()
    if looks_finished and contents(job.out) == expected:  # the job finished before the kill
        looks_finished = False
        shutil.rmtree(job.out)
    summary = job.finish(workers)
    same = contents(job.out) == expected
    shutil.rmtree(job.out)
    return {
        "killed_after_seconds": delay,
        "last_task": reached,
        "left_running": len(left),
        "looked_finished": looks_finished,
        "workers": workers,
        "files_kept": summary["resumed_files"],
        "same_bytes": same,
    }


def main(
    data: Annotated[Path, typer.Option(help="ScienceQA, or a part of it, in its official layout.")],
    tokenizer: Annotated[Path, typer.Option(help="LLaMA's tokenizer.model.")],
    kills: Annotated[int, typer.Option(min=1)] = 10,
    records: Annotated[int, typer.Option(min=128, help="Number of records; half of them have an image.")] = 1600,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Kill prep at random moments and check what is left."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = write_scienceqa(work / "data", data, records, records // 2)
        job = Job(work, made, tokenizer)
        began = time.perf_counter()
        job.finish(workers=2)
        seconds = time.perf_counter() - began
        expected = contents(job.out)
        shutil.rmtree(job.out)
        found = [kill_once(job, rng.uniform(0.5, seconds * 0.95), 1 + i % 3, expected) for i in range(kills)]
    good = [one for one in found if one["same_bytes"] and not one["left_running"] and not one["looked_finished"]]
    if as_json:
        print(json.dumps({"seconds": seconds, "files": len(expected), "kills": found}, indent=2))
    else:
        title = (
            f"{len(good)} of {kills} kills left no trace: {records:,} records, {len(expected)} files, {seconds:.1f} s"
        )
        table = Table(title=title)
        for heading in ("killed after", "last task done", "left running", "files kept", "workers after", "same bytes"):
            table.add_column(heading, justify="right", no_wrap=heading == "last task done")
        for one in found:
            cells = [f"{one['killed_after_seconds']:.1f} s", one["last_task"], str(one["left_running"])]
            cells += [str(one["files_kept"]), str(one["workers"]), "yes" if one["same_bytes"] else "NO"]
            table.add_row(*cells)
        Console().print(table)
    raise typer.Exit(0 if len(good) == kills else 1)


if __name__ == "__main__":
    typer.run(main)
