"""How long a step waits for its data, if batches are made on demand, in a thread (as in training), or in a process
(torch's DataLoader).

    python benchmarks/prefetch.py [--step-ms 50] [--steps 60] [--json]

Batches are like lavin-7b's: 32 samples per step, half of them with 224-pixel images, on one rank. The device is
simulated by sleeping, because a GPU leaves the CPU free. On a CPU, making data would slow down the step in every case.
The baseline is on demand.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Annotated

from harness import show, table

import torch
import typer

import lavin_ds
from lavin_ds.config import load_recipe
from lavin_ds.data.shards import ShardReader
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.parallel import initialize_single_process
from lavin_ds.training.feed import AHEAD, Feed, in_background

ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"
RECIPE = ["model.vision.image_size=224", "model.vision.patch_size=14", "training.micro_batch=4", "training.epochs=50"]


class Steps(torch.utils.data.IterableDataset):
    """The feed as a data set for torch's DataLoader. The worker opens it again."""

    def __init__(self, shards: Path):
        self.shards = shards

    def __iter__(self):
        initialize_single_process()
        return make_feed(self.shards).steps(0)


def make_feed(shards: Path) -> Feed:
    return Feed(load_recipe("tiny", RECIPE), ShardReader(shards, "train"), torch.device("cpu"))


def waits(items, steps: int, step_seconds: float) -> list[float]:
    """Milliseconds that each step waited for its data. The first 5 steps are left out as warm-up."""
    found = []
    for _ in range(steps + 5):
        began = time.perf_counter()
        next(items)
        found.append(1000 * (time.perf_counter() - began))
        time.sleep(step_seconds)
    return found[5:]


def measure(folder: Path, steps: int, step_seconds: float) -> dict:
    generate(folder / "scienceqa", seed=0, train=640, val=0, test=0)
    tokenizer = ASSETS / "llama" / "tokenizer.model"
    prepare(ScienceQA(folder / "scienceqa", splits="train"), tokenizer, folder / "shards", load_recipe("tiny", RECIPE))
    initialize_single_process()
    feed = make_feed(folder / "shards")
    found = {}
    for name, ahead in (("when asked for", 0), ("thread", AHEAD)):
        with in_background(feed.steps(0), ahead) as items:
            found[name] = mean(waits(items, steps, step_seconds))
    loader = torch.utils.data.DataLoader(
        Steps(folder / "shards"), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    found["process"] = mean(waits(iter(loader), steps, step_seconds))
    return {
        "step_ms": 1000 * step_seconds,
        "wait_ms": found,
        "ratio_to_when_asked_for": {name: wait / found["when asked for"] for name, wait in found.items()},
    }


def main(
    step_ms: Annotated[float, typer.Option(help="Milliseconds that a step computes.")] = 50,
    steps: Annotated[int, typer.Option(help="Number of measured steps.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how long a step waits for its data."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), steps, step_ms / 1000)
    ratios = result["ratio_to_when_asked_for"]
    rows = [[name, f"{wait:.2f} ms", f"{ratios[name]:.2f}"] for name, wait in result["wait_ms"].items()]
    show(result, as_json, table(f"Waiting for the data of a step of {step_ms:.0f} ms", ("Made", "Wait", "Ratio"), rows))


if __name__ == "__main__":
    typer.run(main)
