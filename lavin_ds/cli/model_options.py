"""The options of the commands that ask a model: `eval`, `generate` and `chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path | None, typer.Option(help="Finished run; --recipe, --llama and --clip are then known.")]
Recipe = Annotated[str | None, typer.Option(help="Without --run: recipe name or YAML file.")]
Llama = Annotated[Path | None, typer.Option(help="Folder of the LLaMA.")]
Clip = Annotated[Path | None, typer.Option(help="CLIP weights; not for text-only recipes.")]
Adapter = Annotated[Path | None, typer.Option(help="Without --run: exported adapter, or LaVIN's .pth.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share of the probability.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling at a --temperature above 0.")]
