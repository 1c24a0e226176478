"""Adapter files: FILE holds the trained adapters (safetensors, fp32), and FILE.json describes them and their base.

The frozen base is not in FILE: an adapter of LaVIN-7B takes 15 MB and works only with the base that FILE.json names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lavin_ds import __version__
from lavin_ds.config import RunConfig
from lavin_ds.errors import UserError
from lavin_ds.files import write_atomically, write_json
from lavin_ds.weights.tensor_files import SafetensorsFile

if TYPE_CHECKING:  # torch takes seconds to import, and reading a record does not need it
    import torch

    from lavin_ds.models.lavin import Lavin

FORMAT = 1
SAMPLE_BYTES = 1 << 16
METADATA = {"format": "pt", "lavin_ds_adapter": str(FORMAT)}


class BaseFiles(BaseModel):
    """Identifies the files of a frozen model without hashing gigabytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    bytes_of: dict[str, int]  # size by file name
    # Of SAMPLE_BYTES from the middle of each file: sizes do not tell a fine-tuned model from its original.
    sample_sha256: str | None = None


class Base(BaseModel):
    """The frozen models that the adapters were trained on. `clip` is None if no ViT ran in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    llama: BaseFiles
    clip: BaseFiles | None = None
    features_clip_sha256: str | None = None  # of the CLIP file that made the cached features, if they were used


class AdapterRecord(BaseModel):
    """The content of FILE.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    layout: Literal["safetensors", "official"] = "safetensors"
    lavin_ds: str  # version
    recipe: str
    base: Base
    trainable_parameters: int
    bytes: int  # of FILE
    tensors: dict[str, list[int]]  # shape by name
    config: RunConfig


def _identify(path: Path) -> BaseFiles:
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    files = [f for f in files if f.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt")]
    sizes = {f.name: f.stat().st_size for f in files}
    sample = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            opened.seek(max(0, sizes[file.name] - SAMPLE_BYTES) // 2)
            sample.update(opened.read(SAMPLE_BYTES))
    return BaseFiles(path=str(path.resolve()), bytes_of=sizes, sample_sha256=sample.hexdigest())


def base_warning(file: Path, llama: Path, clip: Path | None) -> str | None:
    """A warning if adapter FILE was trained on another base than these files. None if not, or if FILE has no record.

    Raises:
        UserError: FILE.json cannot be read.
    """
    if not record_file(file).is_file():
        return None
    base = read_record(file).base
    for option, trained_on, path in (("--llama", base.llama, llama), ("--clip", base.clip, clip)):
        if trained_on and path and not _same(trained_on, _identify(path)):
            return (
                f"{file.name} was trained on {trained_on.path}, but the files of {option} {path} differ from those. "
                "The adapter works as trained only if they hold the same model in another layout."
            )
    return None


def _same(first: BaseFiles, second: BaseFiles) -> bool:
    samples = {first.sample_sha256, second.sample_sha256} - {None}
    return first.bytes_of == second.bytes_of and len(samples) < 2


def record_file(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def save_adapter(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    config: RunConfig,
    llama: Path,
    clip: Path | None = None,
    features_clip_sha256: str | None = None,
) -> AdapterRecord:
    """Writes FILE.json and then FILE, each atomically: if FILE exists, both are complete.

    tensors: Lavin.trainable(), by name; under ZeRO-3 the caller gathers them.
    llama, clip: the frozen models. The record identifies them by name, size and a sample of their files.
    features_clip_sha256: the CLIP file that made the cached features, if these were used instead of the ViT.
    """
    import torch
    from safetensors.torch import save

    # A tensor that is already fp32 and contiguous is not copied. safetensors refuses views that share a storage.
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    content = save(tensors, metadata=METADATA)
    record = AdapterRecord(
        format=FORMAT,
        lavin_ds=__version__,
        recipe=config.name,
        base=Base(
            llama=_identify(llama),
            clip=_identify(clip) if clip else None,
            features_clip_sha256=features_clip_sha256,
        ),
        trainable_parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=len(content),
        tensors={name: list(tensor.shape) for name, tensor in tensors.items()},
        config=config,
    )
    write_with_record(file, content, record)
    return record


def write_with_record(file: Path, content: bytes, record: AdapterRecord) -> None:
    """Writes FILE.json and then FILE, each atomically."""
    write_json(record_file(file), record.model_dump(mode="json"))
    write_atomically(file, lambda temporary: temporary.write_bytes(content))


def read_adapter(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file, by name.

    Raises:
        UserError: the file does not exist, or save_adapter did not write it.
    """
    opened = _open(file)
    return {name: opened.tensor(name).clone() for name in opened.shapes}


def _open(file: Path) -> SafetensorsFile:
    if not file.is_file():
        raise UserError(f"No adapter at {file}.")
    opened = SafetensorsFile(file)
    if opened.metadata.get("lavin_ds_adapter") != str(FORMAT):
        raise UserError(f"{file} is not an adapter of this version: make one with `lavin-ds export adapter`.")
    return opened


def read_record(file: Path) -> AdapterRecord:
    """What FILE.json says about adapter FILE.

    Raises:
        UserError: it does not exist, or save_adapter did not write it.
    """
    path = record_file(file)
    if not path.is_file():
        raise UserError(f"{path} is missing: an adapter needs its JSON file. Copy it beside {file.name}.")
    try:
        return AdapterRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path} cannot be read: {error}. Was it made by another version?") from None


def check_fits(file: Path, config: RunConfig) -> None:
    """Compares an adapter's record with the recipe, and the header of its file with the record.

    It reads no tensor and does not import torch.

    Raises:
        UserError: the file or its record does not exist; or the model of the record differs from the recipe's; or the
            file is cut short, or does not hold the fp32 tensors that its record lists.
    """
    opened = _open(file)
    record = read_record(file)
    differ = _differences(_identity(record.config), _identity(config))
    if differ:
        raise UserError(f"{file} does not fit the recipe {config.name}: {'; '.join(differ)}.")
    wanted = {name: tuple(shape) for name, shape in record.tensors.items()}
    for name in sorted(wanted.keys() | opened.shapes.keys()):
        found = (opened.dtypes.get(name), opened.shapes.get(name))
        if found != ("F32", wanted.get(name)):
            raise UserError(
                f"{file} does not hold what {record_file(file).name} says: tensor {name} is {_tell(*found)} in the "
                f"file and {_tell('F32' if name in wanted else None, wanted.get(name))} in the record. Copy both again."
            )


def _tell(dtype: str | None, shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"{dtype} {list(shape)}"


def _identity(config: RunConfig) -> dict:
    """The part of a configuration that adapters depend on: not the storage of frozen weights, and not dropout."""
    model = config.model.model_dump(exclude={"frozen_dtype", "vision_source"})
    for adapter in ("llm_adapter", "vision_adapter"):
        del model[adapter]["dropout"]
    return {"compat": config.compat, "model": model}


def _differences(adapter: dict, recipe: dict, prefix: str = "") -> list[str]:
    found = []
    for key in adapter:
        if isinstance(adapter[key], dict) and isinstance(recipe[key], dict):
            found += _differences(adapter[key], recipe[key], f"{prefix}{key}.")
        elif adapter[key] != recipe[key]:
            found.append(f"{prefix}{key} is {adapter[key]} in the adapter and {recipe[key]} in the recipe")
    return found


def load_adapter(model: Lavin, file: Path) -> None:
    """Fills every trainable parameter of `model` from an adapter file.

    Raises:
        UserError: the file cannot be read; or a parameter is missing, unexpected, or has another shape.
    """
    fill_trainable(model, read_adapter(file), where=str(file))


def fill_trainable(model: Lavin, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Copies `tensors` into Lavin.trainable(), which must have the same names and shapes.

    where: the origin of the tensors, for the error.

    Raises:
        UserError: names or shapes differ. Then nothing is copied.
    """
    import torch

    parameters = model.trainable()
    check_trainable({name: tuple(p.shape) for name, p in parameters.items()}, tensors, where)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_trainable(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises UserError unless `tensors` has exactly the names and shapes of `wanted`."""
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    if missing or unexpected:
        told = [
            f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("lacks", missing), ("has unexpected", unexpected))
            if names
        ]
        raise UserError(f"{where} does not fit the recipe's adapters: it {' and '.join(told)}.")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(
                f"{where} does not fit the recipe: {name} has shape {list(tensors[name].shape)}, but must have "
                f"{list(shape)}."
            )
