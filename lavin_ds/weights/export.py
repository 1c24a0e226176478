"""Exports the adapters of a complete run to one file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lavin_ds.errors import UserError
from lavin_ds.run import adapter_file, load_run
from lavin_ds.weights.adapter import (
    AdapterRecord,
    check_trainable,
    read_adapter,
    read_record,
    record_file,
    write_with_record,
)

SUFFIX = {"safetensors": ".safetensors", "official": ".pth"}


def export_adapter(run: Path, out: Path, layout: Literal["safetensors", "official"]) -> AdapterRecord:
    """Writes the adapters of `run` to `out`, and out.json beside it. Each is written atomically.

    Raises:
        UserError: the run is not complete, its adapters do not fit their record, or `out` cannot be written.
    """
    load_run(run)
    source = adapter_file(run)
    _check_out(out, layout)
    record, tensors = read_record(source), read_adapter(source)
    check_trainable({name: tuple(shape) for name, shape in record.tensors.items()}, tensors, where=str(source))
    content = source.read_bytes()
    if layout == "official":
        from lavin_ds.weights.official import official_bytes, official_name  # imports torch and the model

        content = official_bytes(tensors, record.config)
        shapes = {official_name(name): shape for name, shape in record.tensors.items()}
        record = record.model_copy(update={"layout": layout, "bytes": len(content), "tensors": shapes})
    write_with_record(out, content, record)
    return record


def _check_out(out: Path, layout: str) -> None:
    if out.suffix != SUFFIX[layout]:
        raise UserError(f"--out {out}: a file of layout {layout} must end in {SUFFIX[layout]}.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}. Make it first.")
    for file in (out, record_file(out)):
        if file.is_dir():
            raise UserError(f"--out {out}: {file} is a folder. Give another name.")
