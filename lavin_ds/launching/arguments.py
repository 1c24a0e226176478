"""The options of a training run, declared once for `lavin-ds train`, `lavin-ds validate` and launch/train.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from lavin_ds.run import Inputs


def _never_or_auto(resume: str) -> str:
    if resume not in ("never", "auto"):
        raise typer.BadParameter("give never or auto", param_hint="--resume")
    return resume


@dataclass(frozen=True)
class TrainArguments:
    """The options of a run. Each field is an option of the same name; `overrides` are the KEY=VALUE arguments."""

    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")]
    data: Annotated[Path, typer.Option(help="Shards that `lavin-ds prep` made.")]
    llama: Annotated[Path, typer.Option(help="Folder of the LLaMA, in Meta's or Hugging Face's layout.")]
    out: Annotated[Path, typer.Option(help="Run directory to make, or to resume.")]
    clip: Annotated[Path | None, typer.Option(help="CLIP weights; not for text-only recipes.")] = None
    init_adapter: Annotated[Path | None, typer.Option(help="Exported adapter to start from, instead of a new one.")] = (
        None
    )
    resume: Annotated[
        str, typer.Option(help="never, or auto: go on from the newest checkpoint in --out.", callback=_never_or_auto)
    ] = "never"
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")] = (
        None
    )

    def inputs(self) -> Inputs:
        """The input paths, absolute."""
        paths = {key: getattr(self, key) for key in Inputs.model_fields}
        return Inputs(**{key: path and path.absolute() for key, path in paths.items()})

    def words(self) -> list[str]:
        """The same options as a command line for launch/train.py."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "overrides" and value is not None:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return [*words, *(self.overrides or ())]


def takes_run_options(command: Callable, **defaults) -> Callable:
    """Makes a typer command from `command(arguments: TrainArguments, **more)`.

    Its options are the fields of TrainArguments, followed by `more`. `defaults` override the defaults of fields.
    """
    hints = get_type_hints(TrainArguments, include_extras=True)
    names = [field.name for field in fields(TrainArguments)]

    def option(field) -> inspect.Parameter:
        default = defaults.get(field.name, field.default)
        default = inspect.Parameter.empty if default is MISSING else default
        return inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )

    @wraps(command)
    def call(**given):
        own = {name: given.pop(name) for name in names}
        return command(TrainArguments(**own), **given)

    first, *more = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [option(field) for field in fields(TrainArguments)]
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in more]
    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
