"""Reads CLIP's vision transformer, from open_clip's or OpenAI's files, into a VisionTower.

    open_clip   open_clip_model.safetensors, open_clip_pytorch_model.bin, DiHT's .ckpt: a state dict
    OpenAI      ViT-L-14.pt: a TorchScript archive, read without running it (see torchscript.py)

Both name the tower `visual.` and its parts alike. Two things that matter cannot be seen in the weights: the number
of heads and whether the activation is QuickGELU (OpenAI's and DiHT's weights, and open_clip's models that are named
"-quickgelu") or GELU. They come from the recipe: model.vision.heads and model.vision.quick_gelu.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from lavin_ds.config import VisionConfig
from lavin_ds.errors import UserError
from lavin_ds.models.adapters import frozen_parameters
from lavin_ds.models.vision import VisionTower
from lavin_ds.weights.llama import LoadReport
from lavin_ds.weights.tensor_files import SafetensorsFile, TorchFile, open_tensors
from lavin_ds.weights.torchscript import TorchScriptFile, is_torchscript

BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


class ClipFile:
    """An opened CLIP: its vision tower's tensors by the names of VisionTower.

    Raises:
        UserError: the file cannot be read or holds no vision transformer.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: SafetensorsFile | TorchFile | TorchScriptFile = (
            TorchScriptFile(path) if path.is_file() and is_torchscript(path) else open_tensors(path)
        )
        self.names = {}
        for theirs in self.file.shapes:
            _, visual, name = theirs.removeprefix("module.").rpartition("visual.")
            if visual:
                self.names[BLOCK.sub(r"blocks.\1.clip.\2", name)] = theirs
        self.shapes = {name: self.file.shapes[theirs] for name, theirs in self.names.items()}
        if len(self.shapes.get("conv1.weight", ())) != 4 or len(self.shapes.get("positional_embedding", ())) != 2:
            raise UserError(
                f"{path} holds no CLIP vision transformer: expected visual.conv1.weight and "
                "visual.transformer.resblocks.*, as in open_clip's and OpenAI's files."
            )

    def described(self) -> dict[str, int | float]:
        """What the shapes say about the tower, by VisionConfig's keys."""
        width, _, patch, _ = self.shapes["conv1.weight"]
        side = math.isqrt(self.shapes["positional_embedding"][0] - 1)
        blocks = [int(name.split(".")[1]) for name in self.shapes if name.startswith("blocks.")]
        described = {
            "width": width,
            "patch_size": patch,
            "image_size": side * patch,
            "layers": 1 + max(blocks, default=-1),
        }
        if "blocks.0.clip.mlp.c_fc.weight" in self.shapes:
            described["mlp_ratio"] = self.shapes["blocks.0.clip.mlp.c_fc.weight"][0] / width
        return described


def check_clip(path: Path, config: VisionConfig) -> ClipFile:
    """Opens a CLIP file and compares it with the recipe, from its header alone.

    Raises:
        UserError: as ClipFile; or the file and the recipe disagree in a number; or a tensor is missing.
    """
    clip = ClipFile(path)
    for key, theirs in clip.described().items():
        ours = getattr(config, key)
        # Width and patch first: a tower of another kind differs in everything, and those say it best.
        if not math.isclose(ours, theirs):
            raise UserError(
                f"The recipe's model.vision.{key} is {ours:g}, but {path} has {theirs:g}: set "
                f"model.vision.{key}={theirs:g} or give the CLIP the recipe is for."
            )
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in VisionTower(config).named_parameters()}
    for name, shape in wanted.items():
        if name not in clip.shapes:
            raise UserError(f"{path} lacks visual.{name.replace('.clip.', '.')}: is it a CLIP of open_clip's layout?")
        if clip.shapes[name] != shape:
            raise UserError(
                f"{path}: {clip.names[name]} is {list(clip.shapes[name])}, but the recipe's model.vision makes it "
                f"{list(shape)}."
            )
    return clip


def load_clip(tower: VisionTower, path: Path, on_progress: Callable[[int, int], None] | None = None) -> LoadReport:
    """Fills the tower's frozen parameters, cast to their dtype; adapters are not touched.

    What the tower has no use for (text tower, projection, blocks behind the last that is read out) is not read.
    on_progress(done, total) is called after every tensor.

    Raises:
        UserError: see check_clip.
    """
    clip = check_clip(path, tower.config)
    parameters = frozen_parameters(tower)
    with torch.no_grad():
        for done, (name, parameter) in enumerate(parameters.items(), start=1):
            source = clip.file.tensor(clip.names[name])
            parameter.data.copy_(source)
            clip.file.release(source)
            if on_progress:
                on_progress(done, len(parameters))
    unexpected = [theirs for name, theirs in clip.names.items() if name not in parameters]
    return LoadReport(matched=list(parameters), missing=[], unexpected=unexpected)
