"""`lavin-ds`: the commands, and how errors are shown."""

from __future__ import annotations

import sys

import typer
from typer.core import TyperGroup

from lavin_ds import __version__
from lavin_ds.cli import (
    chat,
    evaluate,
    export,
    generate,
    merge_delta,
    prep,
    prep_features,
    prep_inspect,
    profile,
    quickstart,
    train,
)
from lavin_ds.errors import UserError

COMMANDS = ("quickstart", "prep", "validate", "train", "eval", "generate", "chat", "profile", "export", "merge-delta")


class InOrder(TyperGroup):
    """Lists the commands in the order of use. Typer would put groups last."""

    def list_commands(self, ctx) -> list[str]:
        return sorted(super().list_commands(ctx), key=COMMANDS.index)


app = typer.Typer(
    cls=InOrder,
    help="LaVIN: a frozen LLaMA that learns to see through Mixture-of-Modality Adapters, trained with DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart.quickstart)
prep.app.command("features")(prep_features.features)
prep.app.command("inspect")(prep_inspect.inspect_shards)
app.add_typer(prep.app, name="prep")
app.command("train", no_args_is_help=True)(train.train)
app.command("validate", no_args_is_help=True)(train.validate)
app.command("eval", no_args_is_help=True)(evaluate.evaluate)
app.command("generate", no_args_is_help=True)(generate.generate)
app.command("chat", no_args_is_help=True)(chat.chat)
app.add_typer(profile.app, name="profile")
app.add_typer(export.app, name="export")
app.command("merge-delta")(merge_delta.merge_delta)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lavin-ds {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def run() -> None:
    """Entry point. A UserError is printed and ends with exit code 2, Ctrl-C ends with 130; neither has a traceback."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
