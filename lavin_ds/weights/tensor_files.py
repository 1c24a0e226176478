"""Opens files of named tensors without reading the data: .safetensors, and torch's zip files (.pth, .pt, .bin).

Tensors are views of the memory-mapped file, so only the bytes that are used are read. No code in a file is executed:
torch files are unpickled with `weights_only`.

Names and shapes of .safetensors are read without importing torch, which takes seconds.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import zipfile
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from lavin_ds.errors import UserError
from lavin_ds.files import sync

if TYPE_CHECKING:
    import torch

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
BAND_BYTES = 1 << 24


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file and flushes it to disk.

    The file gets the usual permissions of a new file; safetensors would let only the owner read it.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)
    sync(path)


class SafetensorsFile:
    """One .safetensors file. Opening it reads only its header.

    Raises:
        UserError: it is not a safetensors file, or is shorter than its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            header = safe_open(path, framework="np")
            names = header.keys()  # safe_open itself is not iterable
        except (SafetensorError, OSError) as error:
            said = _stand_in(path) or f"cannot be read as safetensors ({error}): is its download complete?"
            raise UserError(f"{path} {said}") from None
        self.metadata: dict[str, str] = header.metadata() or {}
        self.shapes = {name: tuple(header.get_slice(name).get_shape()) for name in names}
        self.dtypes = {name: header.get_slice(name).get_dtype() for name in names}  # as safetensors writes them: "F32"

    @cached_property
    def _file(self):
        try:
            return safe_open(self.path, framework="pt")
        except RuntimeError as error:  # torch's
            raise UserError(
                f"{self.path} cannot be memory-mapped ({error}): is the file larger than this machine's memory?"
            ) from None

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_slice(name)[...]

    def release(self, tensor: torch.Tensor) -> None:
        give_back_pages(tensor)


class TorchFile:
    """One torch zip file that holds a dict of tensors, or such a dict under `key`.

    Raises:
        UserError: it is not such a file, or has the format from before torch 1.6, or is a TorchScript archive, or asks
            for more than tensors.
    """

    def __init__(self, path: Path, key: str = "state_dict", allowed_globals: tuple = ()):
        import torch

        self.path = path
        content = load_torch(path, allowed_globals)
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
        if not isinstance(content, dict) or not any(isinstance(v, torch.Tensor) for v in content.values()):
            raise UserError(f"{path} holds no named tensors: expected a state dict saved by torch.save.")
        self._tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def release(self, tensor: torch.Tensor) -> None:
        give_back_pages(tensor)


def load_torch(path: Path, allowed_globals: tuple = ()) -> object:
    """torch.load, memory-mapped and without executing code. `allowed_globals` are classes it may also build."""
    import torch

    if path.is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"{path} {_stand_in(path) or 'was not written by torch.save: is it the right file?'}")
    allowed = torch.serialization.safe_globals(list(allowed_globals)) if allowed_globals else nullcontext()
    try:
        with allowed:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} asks to build {wanted.group(1) if wanted else 'an object'}, which is not a tensor, so it is "
            "not opened. Save only its state dict, best as .safetensors."
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().partition(". ")[0]
        raise UserError(f"{path} cannot be read as a torch file ({reason}): is its download complete?") from None


def _stand_in(path: Path) -> str | None:
    """What a file without tensors seems to be, and what to do about it; None if that is unknown."""
    with path.open("rb") as file:
        start = file.read(40)
    if not start:
        return "is empty: download it again."
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file: fetch the file with `git lfs pull`, or download it by hand."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file: follow the page's download link."
    if start.startswith(b"PK\x03\x04"):
        return "is cut short: download it again."
    if start.startswith(b"\x80"):
        return "is a pickle from before torch 1.6: load it and save it again with a newer torch."
    return None


def open_tensors(path: Path) -> SafetensorsFile | TorchFile:
    """Opens a file by its suffix.

    Raises:
        UserError: it does not exist, or is neither .safetensors nor a torch file.
    """
    if path.is_dir():
        held = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *TORCH_SUFFIXES))
        such = f", such as {held[0]}" if held else ""
        raise UserError(f"{path} is a folder: give the file in it that holds the tensors{such}.")
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path)
    raise UserError(f"{path} is neither .safetensors nor one of {', '.join(TORCH_SUFFIXES)}.")


def copy_in_bands(target: torch.Tensor, source: torch.Tensor) -> None:
    """target.copy_(source), BAND_BYTES at a time along dimension 0.

    If the devices differ and the dtypes or layouts differ too, torch first copies the source in host memory. Here that
    copy is as small as a band.
    """
    rows = max(1, BAND_BYTES * len(source) // max(1, source.nbytes))
    for into, band in zip(target.split(rows), source.split(rows), strict=True):
        into.copy_(band)


def give_back_pages(tensor: torch.Tensor) -> None:
    """Releases the resident pages of a memory-mapped tensor. They are read again if the tensor is used again.

    Without this, the whole file would count as memory of this process, in addition to the copy made from it.
    """
    if sys.platform != "linux":
        return
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(start, end - start, mmap.MADV_DONTNEED)
