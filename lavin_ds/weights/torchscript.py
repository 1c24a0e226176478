"""Reads the tensors of a TorchScript archive, such as OpenAI's ViT-L-14.pt, without running it.

torch.jit.load would compile the code inside, and torch.load(weights_only=True) refuses these archives. One is a
zip: data.pkl is a pickled tree of modules whose classes are named `__torch__...`, and data/N are the storages.
Here the pickle may build only plain containers and tensors: any other global ends the reading.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from lavin_ds.errors import UserError

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class TorchScriptFile:
    """The tensors of a TorchScript archive by their dotted names.

    Raises:
        UserError: it is damaged, or its pickle asks for more than modules and tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                self._tensors = dict(_tensors(_Reader(archive, root.removesuffix("data.pkl")).load(), ""))
        except UserError:
            raise
        # A damaged pickle raises nearly anything.
        except Exception as error:
            raise UserError(f"{path} cannot be read as a TorchScript archive: {error}.") from None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def release(self, tensor: torch.Tensor) -> None:
        """Nothing to give back: such an archive is read whole."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip with compiled code inside."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


class _Module:
    """Stands for an instance of any `__torch__` class; pickle fills its __dict__."""


class _Reader(pickle.Unpickler):
    """The pickle of one archive, with every global that it may name."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: torch.as_strided(
            storage, size, stride, offset
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
        self.archive, self.folder = archive, folder
        self.storages: dict[str, torch.Tensor] = {}

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

    def persistent_load(self, identity: tuple) -> torch.Tensor:
        """A storage as a flat tensor: identity is ("storage", dtype, key, device, elements)."""
        _, dtype, key, _, elements = identity
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype)[:elements]
        return self.storages[key]


def _tensors(node: object, prefix: str):
    for name, value in vars(node).items() if isinstance(node, _Module) else ():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")
