"""Finds the model to ask: a run, an exported adapter or a bare base. The files are checked, but not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.data.schema import load_manifest
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.run import adapter_file, load_run
from lavin_ds.weights.adapter import read_record, record_file


@dataclass(frozen=True)
class Subject:
    """A model's recipe and files. `data`: the shards that a task reads, or that the run was trained on."""

    config: RunConfig
    llama: Path
    clip: Path | None
    adapter: Path | None
    data: Path | None

    @property
    def features_clip_sha256(self) -> str | None:
        """SHA-256 of the CLIP whose cached features the adapters were trained on; None for pixels, or if unknown."""
        known = self.adapter and record_file(self.adapter).is_file()
        return read_record(self.adapter).base.features_clip_sha256 if known else None


def subject_of_run(run: Path, llama: Path | None, clip: Path | None, data: Path | None) -> Subject:
    """The model of a finished run. A path that is not given is the one that the run used.

    Raises:
        UserError: `run` is not a run directory, or is not finished.
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
    """A base, alone or with an exported adapter. An adapter's record holds its recipe.

    Raises:
        UserError: something is missing, or recipe and adapter contradict each other.
    """
    if not (recipe or adapter) or not llama:
        raise UserError("Give --run RUN, or --llama with --recipe, --adapter or both (and --clip if it sees images).")
    if recipe:
        config = load_recipe(recipe, overrides)
    elif not adapter.is_file():
        raise UserError(f"No adapter at {adapter}.")
    elif not record_file(adapter).is_file():
        raise UserError(f"{record_file(adapter)}, the adapter's recipe, is missing: give --recipe.")
    elif overrides:
        raise UserError(f"{overrides[0]} changes a recipe: give --recipe too.")
    else:
        config = read_record(adapter).config
    learns = config.model.vision is not None or config.model.llm_adapter.kind != "none"
    if learns and not adapter:
        raise UserError(
            f"Recipe {config.name} has parameters that must be trained: give them with --adapter FILE, or give a "
            "finished run with --run. To ask a base alone, give a recipe without vision and adapters."
        )
    if adapter and not learns:
        raise UserError(f"Recipe {config.name} has no adapters: leave --adapter out or give the adapter's recipe.")
    return Subject(config, llama, clip, adapter, data)


def find_subject(
    run: Path | None,
    recipe: str | None = None,
    overrides: list[str] = (),
    llama: Path | None = None,
    clip: Path | None = None,
    adapter: Path | None = None,
    data: Path | None = None,
) -> Subject:
    """The model that a command's options name: a run, or the files themselves.

    Raises:
        UserError: too much or too little is given, or an error of subject_of_run or subject_of_files.
    """
    if not run:
        return subject_of_files(recipe, list(overrides), llama, clip, adapter, data)
    if recipe or adapter or overrides:
        raise UserError("--run has its own recipe and adapters: leave --recipe, --adapter and key=value out.")
    return subject_of_run(run, llama, clip, data)


def find_tokenizer(subject: Subject) -> Tokenizer:
    """The tokenizer that the adapters were trained with: the copy in the shards if they still exist, else the base's.

    Raises:
        UserError: neither exists.
    """
    if subject.data and subject.data.is_dir():
        entry = load_manifest(subject.data).tokenizer
        return Tokenizer(subject.data / entry.file, entry.bos, entry.eos)
    for name in ("tokenizer.model", "tokenizer.json"):
        for folder in (subject.llama, subject.llama.parent):  # Meta's download has it one folder above
            if (folder / name).is_file():
                return Tokenizer(folder / name)
    raise UserError(f"There is no tokenizer.model or tokenizer.json in {subject.llama}: copy the base's file there.")
