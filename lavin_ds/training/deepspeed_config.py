"""The DeepSpeed JSON of a run: what a user may set there, and what the recipe decides."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from lavin_ds.errors import UserError

# What the recipe decides is not decided a second time in a DeepSpeed file.
DECIDED_BY_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)


def read_deepspeed_config(name_or_file: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON by its name in ds_configs/ or by path.

    Raises:
        UserError: no such file, not JSON, or it sets what the recipe decides.
    """
    shipped = files("lavin_ds.ds_configs")
    path = Path(name_or_file)
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"The DeepSpeed configuration {path} does not exist: check the recipe's key deepspeed.")
        text = path.read_text(encoding="utf-8")
    else:
        entry = shipped / f"{name_or_file}.json"
        if not entry.is_file():
            known = sorted(f.name.removesuffix(".json") for f in shipped.iterdir() if f.name.endswith(".json"))
            raise UserError(
                f"No DeepSpeed configuration '{name_or_file}': set the recipe's key deepspeed to a .json file or "
                f"one of {', '.join(known)}."
            )
        text = entry.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"The DeepSpeed configuration {name_or_file} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"The DeepSpeed configuration {name_or_file} must be a JSON object.")
    for key in DECIDED_BY_RECIPE:
        if key in config:
            raise UserError(
                f"The DeepSpeed configuration {name_or_file} sets {key}, which the recipe decides: remove it there."
            )
    return config
