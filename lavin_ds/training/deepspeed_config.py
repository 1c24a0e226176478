"""Reads the DeepSpeed JSON of a run, and refuses keys that the recipe sets or that cannot work."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from lavin_ds.errors import UserError

# The recipe sets these, so a DeepSpeed file may not.
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
# Monitors that need a package: the package, and how to install it.
MONITOR_PACKAGES = {
    "tensorboard": ("tensorboard", "pip install 'lavin_ds[metrics]'"),
    "wandb": ("wandb", "pip install 'lavin_ds[wandb]'"),
    "comet": ("comet_ml", "pip install comet_ml"),
}


def zero_stage(config: dict[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def check_deepspeed_config(name_or_file: str) -> str:
    """Reads a DeepSpeed JSON and returns a summary of it.

    Raises:
        UserError: as read_deepspeed_config; or DeepSpeed would fail minutes later, or ignore a part of the file.
    """
    config = read_deepspeed_config(name_or_file)
    zero = config.get("zero_optimization", {})
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"The DeepSpeed configuration {name_or_file} sets ZeRO stage {stage}: give 0, 1, 2 or 3.")
    said = f"{name_or_file}: ZeRO stage {stage}"
    for part, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = zero.get(part, {}).get("device", "none")
        if device == "none":
            continue
        if stage not in stages:
            raise UserError(
                f"The DeepSpeed configuration {name_or_file} sets {part}, which works at ZeRO stage "
                f"{' and '.join(map(str, stages))}, not {stage}: remove it from that file, or change the stage."
            )
        said += f", {part} to {device}"
    for monitor, (package, remedy) in MONITOR_PACKAGES.items():
        if config.get(monitor, {}).get("enabled"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"The DeepSpeed configuration {name_or_file} enables {monitor}, but the package {package} is not "
                    f"installed: {remedy}, or remove that section."
                )
            said += f", {monitor}"
    return said


def read_deepspeed_config(name_or_file: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON, given its name in ds_configs/ or its path.

    Raises:
        UserError: there is no such file, or it is not JSON, or it sets a key that the recipe sets.
    """
    shipped = files("lavin_ds.ds_configs")
    path = Path(name_or_file)
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"The DeepSpeed configuration {path} does not exist: correct the recipe's key deepspeed.")
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
                f"The DeepSpeed configuration {name_or_file} sets {key}, which the recipe decides: remove it from that "
                "file."
            )
    return config
