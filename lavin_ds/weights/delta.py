"""Adds a weight delta, such as Vicuna v0's, to its base. The result is a Hugging Face folder.

The delta must be added in Hugging Face's layout, which orders rotary features differently from Meta's. Adding it to
Meta's files as they are gives nonsense without an error. The delta's vocabulary may be larger (v0: 32001 instead of
32000, for [PAD]). For these additional rows of the embedding and the output, the result is the delta's rows.

The merge works on one tensor at a time. It needs memory for one output file (FILE_BYTES) and one tensor.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lavin_ds.config import LlamaConfig
from lavin_ds.errors import UserError
from lavin_ds.files import sync, write_json
from lavin_ds.weights.llama import HuggingFaceLlama, MetaLlama, check_llama, llama_shapes, open_llama
from lavin_ds.weights.tensor_files import save_tensors

FILE_BYTES = 1_000_000_000
GROWING = ("tok_embeddings.weight", "output.weight")  # tensors with one row per token of the vocabulary
# Files to copy beside the weights: the delta's, or the base's if the delta has none.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Merged:
    """What merge_delta wrote."""

    out: Path
    tensors: int
    files: int
    bytes: int
    vocab_size: int
    added_rows: int  # rows of the delta's vocabulary that the base lacks; drop_added_rows leaves them out


def merge_delta(
    base: Path,
    delta: Path,
    out: Path,
    drop_added_rows: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Writes `base` (Meta's or Hugging Face's layout) plus `delta` (Hugging Face's) to the new folder `out`.

    Sums are in the delta's dtype. The folder is renamed to `out` when it is complete.
    drop_added_rows: leave out the rows of tokens that the base does not have.
    on_progress(done, total) is called after every tensor.

    Raises:
        UserError: `out` exists, or `base` or `delta` is not a LLaMA, or they do not fit together.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already: give a new folder.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}. Make it first.")
    opened = open_llama(delta)
    if isinstance(opened, MetaLlama):
        raise UserError(
            f"--delta {delta} is in Meta's layout, but a delta must be in Hugging Face's (with a config.json)."
        )
    config = _config_of(opened)
    delta_files = check_llama(delta, config)
    base_rows = open_llama(base).described()["vocab_size"]
    if base_rows is None or base_rows > config.vocab_size:
        raise UserError(
            f"--base {base} has a vocabulary of {base_rows}, and --delta {delta} one of {config.vocab_size}. A delta's "
            "vocabulary is never smaller: are base and delta swapped?"
        )
    base_config = config.model_copy(update={"vocab_size": base_rows})
    base_files = check_llama(base, base_config)

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        rows = base_rows if drop_added_rows else config.vocab_size
        writer = _Writer(temporary)
        shapes = llama_shapes(base_config)
        for done, (name, shape) in enumerate(shapes.items(), start=1):
            total = _sum(name, shape, base_files, delta_files, base_config)
            writer.add(delta_files.names[name], total[:rows].clone() if name in GROWING else total)
            if on_progress:
                on_progress(done, len(shapes))
        writer.close()
        write_json(temporary / "config.json", delta_files.params | {"vocab_size": rows})
        for companion in COMPANIONS:
            source = next((folder / companion for folder in (delta, base) if (folder / companion).is_file()), None)
            if source:
                shutil.copyfile(source, temporary / companion)
        sync(temporary)
        os.rename(temporary, out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Merged(out, len(shapes), writer.files, writer.bytes, rows, config.vocab_size - base_rows)


def _config_of(files: HuggingFaceLlama) -> LlamaConfig:
    described = files.described()
    described["rope_scaling"] = described["rope_scaling"] or None
    described = {key: value for key, value in described.items() if value is not None}
    try:
        return LlamaConfig.model_validate(described)
    except ValueError:
        missing = sorted({"dim", "n_layers", "n_heads", "ffn_dim"} - set(described))
        told = f"does not give {', '.join(missing)}" if missing else "does not describe a LLaMA"
        raise UserError(f"{files.path / 'config.json'} {told}: is it the delta's own?") from None


def _sum(
    name: str,
    shape: tuple[int, ...],
    base: MetaLlama | HuggingFaceLlama,
    delta: HuggingFaceLlama,
    config: LlamaConfig,
) -> torch.Tensor:
    """Base plus delta of one tensor, in Hugging Face's layout. `name` is the model's; `shape` is the base's."""
    theirs = delta.names[name]
    file = delta.file_of[theirs]
    source = file.tensor(theirs)
    total = source.clone()
    file.release(source)
    added = torch.empty(shape, dtype=total.dtype)
    base.copy(name, tuple(slice(0, size) for size in shape), shape, config.head_dim, added)
    if name.endswith(HuggingFaceLlama.ROTATED):
        # From Meta's neighbouring pairs to Hugging Face's halves: the inverse of HuggingFaceLlama.copy.
        added = added.view(-1, config.head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
    total[: shape[0]] += added  # rows that the base lacks keep the delta's values
    return total


class _Writer:
    """Writes model-0000N.safetensors and their index. It holds about FILE_BYTES of tensors in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files, self.bytes = 0, 0
        self._held: dict[str, torch.Tensor] = {}
        self._weight_map: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._held[name] = tensor
        if sum(t.nbytes for t in self._held.values()) >= FILE_BYTES:
            self._write()

    def close(self) -> None:
        if self._held:
            self._write()
        index = {"metadata": {"total_size": self.bytes}, "weight_map": self._weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        self.files += 1
        file = self.folder / f"model-{self.files:05d}.safetensors"
        save_tensors(self._held, file, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(self._held, file.name)
        self.bytes += sum(t.nbytes for t in self._held.values())
        self._held = {}
