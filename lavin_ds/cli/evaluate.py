"""`lavin-ds eval TASK`: scores of a run, an exported adapter or a bare base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from lavin_ds.cli import console
from lavin_ds.cli.model_options import Adapter, Clip, Llama, Recipe, Run
from lavin_ds.evaluation.tasks import TASKS


def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK", help=f"Benchmark: {', '.join(TASKS)}.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to --recipe.")] = None,
    run: Run = None,
    data: Annotated[Path | None, typer.Option(help="The task's data; default: what the run was trained on.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data.")] = "test",
    recipe: Recipe = None,
    llama: Llama = None,
    clip: Clip = None,
    adapter: Adapter = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only this many questions, from the first.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Top-p 0.75 at temperature 0.1; default: greedy.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --sample.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Results file; default: RUN/eval-TASK-SPLIT.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Ask a run, an exported adapter or a bare base a benchmark's questions, and print its score table."""
    from lavin_ds.evaluation import job as jobs
    from lavin_ds.evaluation.requests import Generation
    from lavin_ds.generation.request import GREEDY, Sampling

    arguments = jobs.EvalArguments(
        task=task,
        run=run,
        recipe=recipe,
        overrides=tuple(overrides or ()),
        llama=llama,
        clip=clip,
        adapter=adapter,
        data=data,
        split=split,
        batch_size=batch_size,
        generation=Generation(max_new_tokens, Sampling(0.1, 0.75, seed=seed) if sample else GREEDY),
        limit=limit,
        out=out,
    )
    job = jobs.prepare(arguments)
    if job.warning:
        console.err.print(f"[yellow]warning:[/] {escape(job.warning)}", highlight=False, soft_wrap=True)
    with console.progress("loading weights") as update:
        model = jobs.load(job, lambda _, done, total: update(done, total))
    with console.progress(f"answering {split}", job.task.questions) as update:
        report = jobs.run(job, model, update)
    if as_json:
        print(json.dumps(summary(report, job.out), indent=2))
        return
    console.out.print(score_table(report, job.task.figures))
    for remark in remarks(report):
        console.out.print(remark, highlight=False)
    console.out.print(f"Results: {job.out}", highlight=False, markup=False, soft_wrap=True)


def summary(report: dict, out: Path) -> dict:
    """What --json prints: the results file without the predictions, and where that file is."""
    return {**{key: value for key, value in report.items() if key != "predictions"}, "out": str(out.absolute())}


def score_table(report: dict, figures: dict[str, str]) -> Table:
    """One column per column of the report and one row per figure, the score first."""
    model, data = report["model"], report["data"]
    title = f"{model['recipe']} on {data['split']}: {report['questions']:,} questions in {report['seconds']:,.1f} s"
    # Narrow enough for a terminal of 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in report["table"]:
        table.add_column(name, justify="right")
    for row, (figure, label) in enumerate(figures.items()):
        cells = (_cell(column[figure]) for column in report["table"].values())
        table.add_row(label, *cells, style="bold" if row == 0 else None)
    return table


def remarks(report: dict) -> list[str]:
    """What the table does not show: questions without a readable answer, and settings that affect the scores."""
    outcomes, settings = report["outcomes"], report["settings"]
    counted_as = "guessed at random (compat)" if report["model"]["compat"] else "counted as wrong"
    said = []
    if report["questions"] < report["data"]["rows"]:
        said.append(f"Only the first {report['questions']:,} of {report['data']['rows']:,} questions.")
    if settings["sampling"]:
        said.append("Sampled: {}.".format(", ".join(f"{k} {v}" for k, v in settings["sampling"].items())))
    without = sum(count for outcome, count in outcomes.items() if outcome != "answered")
    said.append(f"Without a readable answer, {counted_as}: {without:,} of {report['questions']:,}.")
    if outcomes["cut"]:
        said.append(
            f"  {outcomes['cut']:,} of them were cut off before an answer: try more than "
            f"--max-new-tokens {settings['max_new_tokens']}."
        )
    if outcomes["no_room"]:
        said.append(f"  {outcomes['no_room']:,} of them have a prompt that fills data.max_length and were not asked.")
    return said


def _cell(value: float | int | None) -> str:
    """A count in full, or a score in five characters: 72.53, 100.0."""
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else f"{value:.2f}"[:5]
