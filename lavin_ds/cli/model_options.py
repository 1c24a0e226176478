"""The options that name a model, shared by the commands that ask one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path | None, typer.Option(help="Finished run; it knows --recipe, --llama and --clip.")]
Recipe = Annotated[str | None, typer.Option(help="Without --run: recipe name or YAML file.")]
Llama = Annotated[Path | None, typer.Option(help="Folder of the LLaMA.")]
Clip = Annotated[Path | None, typer.Option(help="CLIP weights; not for text-only recipes.")]
Adapter = Annotated[Path | None, typer.Option(help="Without --run: exported adapter, or LaVIN's .pth.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share of the probability.")]
Seed = Annotated[int, typer.Option(min=0, help="Of what is drawn at a --temperature above 0.")]
