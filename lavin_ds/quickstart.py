"""The quickstart: every step of the pipeline, on generated data and the small base that ships with the package.

Each step does what the command that is shown for it does. Training runs under `deepspeed` on this machine's ranks; the
rest runs in this process. All figures come from the run.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path

from lavin_ds.config import load_recipe
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.errors import UserError
from lavin_ds.evaluation import job as evaluation
from lavin_ds.files import write_json
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.launching.launcher import launch
from lavin_ds.weights.export import export_adapter

Progress = Callable[[str], AbstractContextManager]
ShowCommand = Callable[[int, int, str, list[str]], None]
STEPS = 9


class Quickstart:
    """Runs the steps into folder `out`. `on_command(number, of, meaning, words)` is called before each step."""

    def __init__(self, out: Path, seed: int, on_command: ShowCommand):
        self.out, self.seed, self.on_command = out, seed, on_command
        self.base = Path(str(files("lavin_ds"))) / "assets" / "tiny"
        self.data, self.shards = out / "scienceqa", out / "shards"
        self.step = 0

    def run(self, progress: Progress, show_profile: Callable[[Path], None]) -> dict:
        """Runs all steps. Returns the summary, which is also written to OUT/summary.json.

        show_profile: prints the report of `lavin-ds profile --run` for a run.

        Raises:
            UserError: `out` exists and is not an empty folder, or a step failed.
        """
        began = time.monotonic()
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"--out {self.out} exists and is not an empty folder: give another.")
        self._prepare(progress)
        tables = {"base": self._evaluate_base(progress)}
        tables["text_only"] = self._train_and_evaluate("tiny-text", "text-only adapters", progress)
        tables["lavin"] = self._train_and_evaluate("tiny", "LaVIN", progress)
        self._show("Compare the cost with the papers'", "profile", "--run", self._run("tiny"))
        show_profile(self._run("tiny"))
        adapter = self.out / "lavin-adapter.safetensors"
        self._show("Export the adapters", "export", "adapter", "--run", self._run("tiny"), "--out", adapter)
        export_adapter(self._run("tiny"), adapter, "safetensors")
        summary = self._summary(tables, adapter, time.monotonic() - began)
        write_json(self.out / "summary.json", summary)
        return summary

    def _show(self, meaning: str, *words) -> None:
        self.step += 1
        self.on_command(self.step, STEPS, meaning, ["lavin-ds", *map(str, words)])

    def _run(self, recipe: str) -> Path:
        return self.out / "runs" / recipe

    def _prepare(self, progress: Progress) -> None:
        self._show("Draw a small ScienceQA", "prep", "sample", "--out", self.data, "--seed", self.seed)
        generate(self.data, self.seed)
        tokenizer = self.base / "llama" / "tokenizer.model"
        words = ["--data", self.data, "--tokenizer", tokenizer, "--out", self.shards, "--recipe", "tiny"]
        self._show("Tokenise it into Arrow shards", "prep", "scienceqa", *words)
        with progress("prep scienceqa") as update:
            show = lambda stage, done, total: update(done, total)  # noqa: E731
            prepare(ScienceQA(self.data), tokenizer, self.shards, load_recipe("tiny"), on_progress=show)

    def _evaluate_base(self, progress: Progress) -> dict:
        out = self.out / "eval-base.json"
        words = ["--recipe", "tiny-base", "--llama", self.base / "llama", "--data", self.shards, "--out", out]
        self._show("Ask the frozen base", "eval", "scienceqa", *words)
        arguments = evaluation.EvalArguments(recipe="tiny-base", llama=self.base / "llama", data=self.shards, out=out)
        return self._evaluate(arguments, progress)

    def _train_and_evaluate(self, recipe: str, name: str, progress: Progress) -> dict:
        sees = load_recipe(recipe).model.vision is not None
        arguments = TrainArguments(
            recipe=recipe,
            data=self.shards,
            llama=self.base / "llama",
            clip=self.base / "vit.safetensors" if sees else None,
            out=self._run(recipe),
            overrides=[f"training.seed={self.seed}"],
        )
        self._show(f"Train {name}", "train", *arguments.words())
        code = launch(arguments)
        if code:
            raise UserError(f"Training {recipe} ended with exit code {code}: what it printed above says why.")
        self._show(f"Ask {name}", "eval", "scienceqa", "--run", self._run(recipe))
        return self._evaluate(evaluation.EvalArguments(run=self._run(recipe)), progress)

    def _evaluate(self, arguments: evaluation.EvalArguments, progress: Progress) -> dict:
        job = evaluation.prepare(arguments)
        model = evaluation.load(job)
        with progress("answering", job.task.questions) as update:
            return evaluation.run(job, model, update)["table"]

    def _summary(self, tables: dict[str, dict], adapter: Path, seconds: float) -> dict:
        trained = json.loads((self._run("tiny") / "summary.json").read_text(encoding="utf-8"))
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        paths = {
            "data": self.data,
            "shards": self.shards,
            "text_only_run": self._run("tiny-text"),
            "lavin_run": self._run("tiny"),
            "predictions": self._run("tiny") / "eval-scienceqa-test.json",
            "loss_curve": self._run("tiny") / "loss.png",
            "adapter": adapter,
            "summary": self.out / "summary.json",
        }
        return {
            "accuracy": {
                name: {column: score["accuracy"] for column, score in table.items()} for name, table in tables.items()
            },
            "chance": {column: score["chance"] for column, score in tables["lavin"].items()},
            "questions": {column: score["count"] for column, score in tables["lavin"].items()},
            "trainable_parameters": trained["trainable_parameters"],
            "adapter_bytes": adapter.stat().st_size,
            "seconds": round(seconds, 1),
            "training_seconds": round(trained["seconds"], 1),
            "peak_rss_bytes": max(here, trained["peak_rss_bytes"]),
            "seed": self.seed,
            "paths": {name: str(path) for name, path in paths.items()},
        }
