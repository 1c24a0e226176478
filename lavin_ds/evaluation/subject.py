"""The model that is evaluated: a run, an exported adapter, or a bare base. Found and checked, not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.errors import UserError
from lavin_ds.run import adapter_file, load_run
from lavin_ds.weights.adapter import read_record, record_file


@dataclass(frozen=True)
class Subject:
    """A model's recipe and files, and the data a task reads: nothing is left open."""

    config: RunConfig
    llama: Path
    clip: Path | None
    adapter: Path | None
    data: Path

    @property
    def features_clip_sha256(self) -> str | None:
        """Of the CLIP file whose cached features the adapters were trained on; None if on pixels, or unknown."""
        known = self.adapter and record_file(self.adapter).is_file()
        return read_record(self.adapter).base.features_clip_sha256 if known else None


def subject_of_run(run: Path, llama: Path | None, clip: Path | None, data: Path | None) -> Subject:
    """The model of a finished run. Where a path is not given, the run's own counts.

    Raises:
        UserError: `run` is no run directory, or is not finished.
    """
    record = load_run(run)
    return Subject(
        record.config,
        llama or record.inputs.llama,
        clip or record.inputs.clip,
        adapter_file(run),
        data or record.inputs.data,
    )


def subject_of_files(
    recipe: str | None,
    overrides: list[str],
    llama: Path | None,
    clip: Path | None,
    adapter: Path | None,
    data: Path | None,
) -> Subject:
    """A base, alone or with an exported adapter, which knows its recipe.

    Raises:
        UserError: something is missing, or recipe and adapter contradict each other.
    """
    if not (recipe or adapter) or not llama or not data:
        raise UserError(
            "Give --run RUN, or --llama and --data with --recipe, --adapter or both (and --clip if it sees images)."
        )
    if recipe:
        config = load_recipe(recipe, overrides)
    elif not adapter.is_file():
        raise UserError(f"No adapter at {adapter}.")
    elif not record_file(adapter).is_file():
        raise UserError(f"{record_file(adapter)} is missing, which holds the adapter's recipe: give --recipe.")
    elif overrides:
        raise UserError(f"{overrides[0]} changes a recipe: give --recipe too.")
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
    return Subject(config, llama, clip, adapter, data)
