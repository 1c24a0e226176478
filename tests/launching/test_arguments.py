"""The options of a run: declared once, and passed on to the ranks as they were given."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from lavin_ds.launching.arguments import TrainArguments, takes_run_options

GIVEN = TrainArguments(
    recipe="tiny",
    data=Path("shards"),
    llama=Path("llama"),
    out=Path("runs/a b"),
    clip=Path("vit.safetensors"),
    init_adapter=Path("first.safetensors"),
    resume="auto",
    overrides=["training.epochs=2", "model.llm_adapter.dim=4"],
)


def read(words: list[str]):
    seen = []

    def command(arguments: TrainArguments) -> None:
        seen.append(arguments)

    app = typer.Typer()
    app.command()(takes_run_options(command))
    return CliRunner().invoke(app, words), seen


def test_the_words_that_ranks_are_started_with_say_what_was_given():
    done, seen = read(GIVEN.words())
    assert done.exit_code == 0 and seen == [GIVEN]


def test_inputs_are_absolute_so_that_a_run_can_be_started_again_from_elsewhere():
    assert all(path.is_absolute() for path in GIVEN.inputs().model_dump().values())


def test_resume_takes_two_words():
    done, seen = read([*GIVEN.words(), "--resume", "always"])
    assert done.exit_code == 2 and not seen
