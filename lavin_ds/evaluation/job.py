"""An evaluation from its arguments to its results file, in one process: prepare, load, run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavin_ds.data.shards import file_sha256
from lavin_ds.errors import UserError
from lavin_ds.evaluation.requests import Generation, RequestSet
from lavin_ds.evaluation.tasks import find_task
from lavin_ds.evaluation.tasks.task import Result, Task
from lavin_ds.files import write_json
from lavin_ds.generation.subject import Subject, find_subject
from lavin_ds.weights.adapter import base_warning
from lavin_ds.weights.base import Progress, build_model, check_inputs

if TYPE_CHECKING:  # torch and the model take seconds to import, and `prepare` does without them
    from lavin_ds.models.lavin import Lavin


@dataclass(frozen=True)
class EvalArguments:
    """The task, and the model to evaluate: a `run`, or a `llama` with a `recipe` that trains nothing, or a `llama`
    with an exported `adapter`.

    A run records its inputs and an adapter its recipe, so these need not be given.
    """

    task: str = "scienceqa"
    run: Path | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    llama: Path | None = None
    clip: Path | None = None
    adapter: Path | None = None
    data: Path | None = None
    split: str = "test"
    batch_size: int = 64
    generation: Generation = Generation()
    limit: int | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Job:
    """An evaluation that passed all quick checks. No weight has been read yet."""

    arguments: EvalArguments
    subject: Subject
    task: Task
    asked: RequestSet
    out: Path
    warning: str | None  # if the adapters were trained on another base


def prepare(arguments: EvalArguments) -> Job:
    """Finds the model, opens the task's data, makes the requests, and checks the weights' headers.

    Raises:
        UserError: something is missing or contradictory. The error says what to do.
    """
    task_class = find_task(arguments.task)
    subject = _find_subject(arguments)
    task = task_class(subject.data, arguments.split, arguments.limit)
    asked = task.ask(subject, arguments.generation)
    check_inputs(subject.config, subject.llama, subject.clip)
    out = arguments.out or _default_out(arguments, subject.config.name, task.questions < task.rows)
    _check_out(out)
    warning = subject.adapter and base_warning(subject.adapter, subject.llama, subject.clip)
    return Job(arguments, subject, task, asked, out, warning)


def load(job: Job, on_progress: Progress | None = None) -> Lavin:
    """The model, on a GPU if there is one. `on_progress` as in weights.base.build_model.

    Raises:
        UserError: an adapter or weights that do not fit the recipe.
    """
    import torch

    from lavin_ds.parallel import initialize_single_process

    initialize_single_process()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = job.subject
    return build_model(subject.config, subject.llama, subject.clip, subject.adapter, device, on_progress)


def run(job: Job, model: Lavin, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Asks the model, writes the results file and returns what it holds. `on_progress` as in `answer`.

    Raises:
        UserError: the device has no memory for a batch.
    """
    import torch

    from lavin_ds.evaluation.answer import answer

    arguments, start = job.arguments, time.monotonic()
    try:
        answers = answer(model, job.asked, arguments.batch_size, on_progress)
    except torch.OutOfMemoryError:
        raise UserError(
            f"The GPU has no memory for {arguments.batch_size} questions at a time: give a smaller --batch-size."
        ) from None
    sampling = arguments.generation.sampling
    official = job.subject.config.compat is not None
    result = job.task.score(answers, official, sampling.seed)
    report = _report(job, result, time.monotonic() - start, next(model.parameters()).device.type)
    write_json(job.out, report)
    return report


def _find_subject(given: EvalArguments) -> Subject:
    if not given.run and not given.data:
        raise UserError("Give --run RUN; or --data with the questions, and --llama with --recipe, --adapter or both.")
    overrides = list(given.overrides)
    return find_subject(given.run, given.recipe, overrides, given.llama, given.clip, given.adapter, given.data)


def _default_out(arguments: EvalArguments, recipe: str, partial: bool) -> Path:
    """A file in the run, or in the working directory without one. A partial or sampled evaluation has its own name."""
    name = f"eval-{arguments.task}-{arguments.split}"
    if partial:
        name += f"-first-{arguments.limit}"
    if arguments.generation.sampling.temperature:
        name += f"-sampled-{arguments.generation.sampling.seed}"
    return arguments.run / f"{name}.json" if arguments.run else Path(f"{recipe}-{name}.json")


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file's name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} is in a folder that does not exist: make it first.")


def _report(job: Job, result: Result, seconds: float, device: str) -> dict[str, Any]:
    """The content of the results file. All of it but `predictions` is the summary."""
    arguments, subject, generation = job.arguments, job.subject, job.arguments.generation
    return {
        "task": job.task.name,
        "model": {
            "recipe": subject.config.name,
            "compat": subject.config.compat,
            "run": _absolute(arguments.run),
            "llama": _absolute(subject.llama),
            "clip": _absolute(subject.clip),
            "adapter": _absolute(subject.adapter),
            "adapter_sha256": file_sha256(subject.adapter) if subject.adapter else None,
        },
        "data": {
            "directory": _absolute(subject.data),
            **job.task.facts(subject),
            "split": arguments.split,
            "rows": job.task.rows,
        },
        "settings": {
            "batch_size": arguments.batch_size,
            "max_new_tokens": generation.max_new_tokens,
            "sampling": asdict(generation.sampling) if generation.sampling.temperature else None,  # None: greedy
            "device": device,
        },
        "questions": len(result.predictions),
        "outcomes": result.outcomes,
        "seconds": round(seconds, 3),
        "table": {name: asdict(column) for name, column in result.table.items()},
        "predictions": [asdict(prediction) for prediction in result.predictions],
    }


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path else None
