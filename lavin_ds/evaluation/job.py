"""An evaluation from its arguments to its results file, in one process: prepare, load, run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.data.schema import check_manifest, manifest_sha256
from lavin_ds.data.shards import ShardReader, file_sha256
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.files import write_json
from lavin_ds.run import adapter_file, load_run
from lavin_ds.weights.adapter import base_warning, read_record, record_file
from lavin_ds.weights.base import Progress, build_model, check_inputs

if TYPE_CHECKING:  # torch and the model take seconds to import, and `prepare` does without them
    from lavin_ds.evaluation.generate import Sampling
    from lavin_ds.evaluation.scienceqa import Result
    from lavin_ds.models.lavin import Lavin


@dataclass(frozen=True)
class EvalArguments:
    """What to evaluate: a `run`; or a `llama` with a `recipe` that trains nothing, or with an exported `adapter`.

    A run knows its inputs, and an adapter its recipe: those need not be given.
    """

    run: Path | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    llama: Path | None = None
    clip: Path | None = None
    adapter: Path | None = None
    data: Path | None = None
    split: str = "test"
    batch_size: int = 64
    max_new_tokens: int = 64
    limit: int | None = None
    sampling: Sampling | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Subject:
    """The model to evaluate and the shards to evaluate it on: the arguments with nothing left open."""

    config: RunConfig
    llama: Path
    clip: Path | None
    adapter: Path | None
    data: Path


@dataclass(frozen=True)
class Job:
    """An evaluation that passed every check that takes seconds, before any weight is read."""

    arguments: EvalArguments
    subject: Subject
    reader: ShardReader
    tokenizer: Tokenizer
    questions: int
    out: Path
    warning: str | None  # if the adapters were trained on another base


def prepare(arguments: EvalArguments) -> Job:
    """Reads the run or recipe, opens the data, and looks at the weights' headers.

    Raises:
        UserError: the first thing that is missing or contradictory, and what to do about it.
    """
    subject = _subject_of_run(arguments) if arguments.run else _subject_of_recipe(arguments)
    reader = ShardReader(subject.data, arguments.split)
    if reader.manifest.kind != "scienceqa":
        raise UserError(f"{subject.data} holds {reader.manifest.kind} data: this score is of ScienceQA's questions.")
    disagreements = check_manifest(reader.manifest, subject.config, _features_clip(subject.adapter))
    if disagreements:
        raise UserError(f"{subject.data} was not prepared for {subject.config.name}: {'; '.join(disagreements)}.")
    tokenizer = reader.tokenizer
    check_inputs(subject.config, subject.llama, subject.clip)
    questions = min(len(reader), arguments.limit or len(reader))
    out = arguments.out or _default_out(arguments, subject.config.name, questions < len(reader))
    _check_out(out)
    warning = subject.adapter and base_warning(subject.adapter, subject.llama, subject.clip)
    return Job(arguments, subject, reader, tokenizer, questions, out, warning)


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


def run(job: Job, model: Lavin, on_progress: Callable[[int, int], None] | None = None) -> dict:
    """Answers the questions, writes the results file and returns what it holds. `on_progress` as in `evaluate`.

    Raises:
        UserError: the device has no memory for a batch.
    """
    import torch

    from lavin_ds.evaluation.scienceqa import evaluate

    arguments, start = job.arguments, time.monotonic()
    try:
        result = evaluate(
            model,
            job.reader,
            job.tokenizer,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            sampling=arguments.sampling,
            limit=job.questions,
            official_reading=job.subject.config.compat is not None,
            on_progress=on_progress,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"The GPU has no memory for {arguments.batch_size} questions at a time: give a smaller --batch-size."
        ) from None
    report = _report(job, result, time.monotonic() - start, next(model.parameters()).device.type)
    write_json(job.out, report)
    return report


def _subject_of_run(arguments: EvalArguments) -> Subject:
    if arguments.recipe or arguments.adapter or arguments.overrides:
        raise UserError("--run has its own recipe and adapters: leave --recipe, --adapter and key=value out.")
    record = load_run(arguments.run)
    return Subject(
        record.config,
        arguments.llama or record.inputs.llama,
        arguments.clip or record.inputs.clip,
        adapter_file(arguments.run),
        arguments.data or record.inputs.data,
    )


def _subject_of_recipe(arguments: EvalArguments) -> Subject:
    adapter = arguments.adapter
    if not (arguments.recipe or adapter) or not arguments.llama or not arguments.data:
        raise UserError(
            "Give --run RUN, or --llama and --data with --recipe, --adapter or both (and --clip if it sees images)."
        )
    if arguments.recipe:
        config = load_recipe(arguments.recipe, list(arguments.overrides))
    elif not adapter.is_file():
        raise UserError(f"No adapter at {adapter}.")
    elif not record_file(adapter).is_file():
        raise UserError(f"{record_file(adapter)} is missing, which holds the adapter's recipe: give --recipe.")
    elif arguments.overrides:
        raise UserError(f"{arguments.overrides[0]} changes a recipe: give --recipe too.")
    else:
        config = read_record(adapter).config
    learns = config.model.vision is not None or config.model.llm_adapter.kind != "none"
    if learns and not adapter:
        raise UserError(
            f"Recipe {config.name} has parameters that must be trained: give them with --adapter FILE, or give a "
            "finished run with --run. A base alone is evaluated by a recipe without vision and adapters."
        )
    if adapter and not learns:
        raise UserError(f"Recipe {config.name} has no adapters: leave --adapter out or give the adapter's recipe.")
    return Subject(config, arguments.llama, arguments.clip, adapter, arguments.data)


def _features_clip(adapter: Path | None) -> str | None:
    """SHA-256 of the CLIP file whose cached features the adapters were trained on, if they were."""
    known = adapter and record_file(adapter).is_file()
    return read_record(adapter).base.features_clip_sha256 if known else None


def _default_out(arguments: EvalArguments, recipe: str, partial: bool) -> Path:
    """In the run, else here. What cannot be compared with a plain full evaluation gets another name."""
    name = f"eval-{arguments.split}"
    if partial:
        name += f"-first-{arguments.limit}"
    if arguments.sampling:
        name += f"-sampled-{arguments.sampling.seed}"
    return arguments.run / f"{name}.json" if arguments.run else Path(f"{recipe}-{name}.json")


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file's name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} lies in a folder that does not exist: make it first.")


def _report(job: Job, result: Result, seconds: float, device: str) -> dict:
    """The results file. Everything but `predictions` is the summary."""
    arguments, subject = job.arguments, job.subject
    return {
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
            "manifest_sha256": manifest_sha256(subject.data, subject.config.model.vision_source),
            "split": arguments.split,
            "rows": len(job.reader),
        },
        "settings": {
            "batch_size": arguments.batch_size,
            "max_new_tokens": arguments.max_new_tokens,
            "sampling": asdict(arguments.sampling) if arguments.sampling else None,  # None: greedy
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
