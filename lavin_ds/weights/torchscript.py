"""Reads the tensors of a TorchScript archive, such as OpenAI's ViT-L-14.pt, without running it.

torch.jit.load would compile the code inside, and torch.load(weights_only=True) refuses these archives. An archive is a
zip file: data.pkl is a pickled tree of modules whose classes are named `__torch__...`, and data/N are the storages.
The unpickler here builds only plain containers and descriptions of tensors, and refuses any other global. A storage is
read when its tensor is requested.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavin_ds.errors import UserError

if TYPE_CHECKING:
    import torch

STORAGE_DTYPES = {  # storage class -> name of the dtype in torch
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class TorchScriptFile:
    """The tensors of a TorchScript archive by their dotted names.

    Raises:
        UserError: it is damaged, or its pickle asks for more than modules and tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            root = next(name for name in self._archive.namelist() if name.endswith("/data.pkl"))
            self._folder = root.removesuffix("data.pkl")
            self._tensors = dict(_tensors(_Reader(self._archive, self._folder).load(), ""))
            self.shapes = {name: tuple(tensor.size) for name, tensor in self._tensors.items()}
        except UserError:
            raise
        # A damaged pickle may raise almost any exception.
        except Exception as error:
            raise UserError(f"{path} cannot be read as a TorchScript archive: {error}.") from None

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        stored = self._tensors[name]
        try:
            content = bytearray(self._archive.read(f"{self._folder}data/{stored.storage.key}"))
            flat = torch.frombuffer(content, dtype=getattr(torch, stored.storage.dtype))
            return torch.as_strided(flat, stored.size, stored.stride, stored.offset)
        except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error}): is its download complete?") from None

    def release(self, tensor: torch.Tensor) -> None:
        """Does nothing: a tensor is read, not memory-mapped."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip with TorchScript code inside."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


@dataclass(frozen=True)
class _Storage:
    """The file data/KEY of the archive, and the dtype of its elements."""

    dtype: str
    key: str


@dataclass(frozen=True)
class _Stored:
    """A tensor in a storage, as the arguments of torch.as_strided."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """Replaces instances of all `__torch__` classes. pickle fills its __dict__."""


class _Reader(pickle.Unpickler):
    """Unpickles data.pkl of one archive. It may use only the globals in ALLOWED, storages and `__torch__` classes."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: _Stored(
            storage, offset, size, stride
        ),
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("torch.jit._pickle", "build_intlist"): list,
        ("torch.jit._pickle", "build_doublelist"): list,
        ("torch.jit._pickle", "build_boollist"): list,
        ("torch.jit._pickle", "build_tensorlist"): list,
        ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
    }

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive = archive

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if (module, name) not in self.ALLOWED:
            raise UserError(
                f"{self.archive.filename} asks for {module}.{name}, which is not a tensor, so it is not opened."
            )
        return self.ALLOWED[module, name]

    def persistent_load(self, identity: tuple) -> _Storage:
        """identity is ("storage", dtype, key, device, elements)."""
        _, dtype, key, _, _ = identity
        return _Storage(dtype, key)


def _tensors(node: object, prefix: str):
    for name, value in vars(node).items() if isinstance(node, _Module) else ():
        if isinstance(value, _Stored):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")
