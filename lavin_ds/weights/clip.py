"""Reads CLIP's vision transformer into a VisionTower, from files of these layouts:

    open_clip     open_clip_model.safetensors, open_clip_pytorch_model.bin   a state dict, the tower in `visual.`
    DiHT          diht_vitl14_336px_*.ckpt                                   the same names
    OpenAI        ViT-L-14.pt                           TorchScript, read without running it (torchscript.py)
    Hugging Face  model.safetensors, pytorch_model.bin  as CLIPModel or CLIPVisionModel name it, q, k and v apart

Two things that matter cannot be seen in the weights: the number of heads, and whether the activation is QuickGELU
(OpenAI's weights, open_clip's models that are named "-quickgelu") or GELU (open_clip's other models; DiHT's, whose
model zoo leaves quick_gelu off). They come from the recipe, model.vision.heads and model.vision.quick_gelu, and are
compared with Hugging Face's config.json where one lies beside the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lavin_ds.config import VisionConfig
from lavin_ds.errors import UserError
from lavin_ds.weights.architecture import some
from lavin_ds.weights.tensor_files import SafetensorsFile, TorchFile, copy_in_bands, open_tensors
from lavin_ds.weights.torchscript import TorchScriptFile, is_torchscript

if TYPE_CHECKING:  # torch takes seconds to import, and headers are checked without it
    import torch

    from lavin_ds.models.vision import VisionTower

BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
# A block of either layout's vision tower; and what stands after its blocks, or is a constant.
NUMBERED = re.compile(r"(?:resblocks|encoder\.layers)\.(\d+)\.")
IGNORABLE = re.compile(r"(^|\.)(proj|ln_post\.\w+|post_layernorm\.\w+|visual_projection\.\w+|position_ids)$")
# The tower's names, to Hugging Face's; of a block, what is in one tensor here is in three there.
HF_TOWER = {
    "class_embedding": ["embeddings.class_embedding"],
    "conv1.weight": ["embeddings.patch_embedding.weight"],
    "positional_embedding": ["embeddings.position_embedding.weight"],
    "ln_pre.weight": ["pre_layrnorm.weight"],  # their spelling
    "ln_pre.bias": ["pre_layrnorm.bias"],
    "ln_post.weight": ["post_layernorm.weight"],
    "ln_post.bias": ["post_layernorm.bias"],
}
HF_BLOCK = {
    f"{ours}{kind}": [f"{theirs}.{kind}" for theirs in several]
    for kind in ("weight", "bias")
    for ours, several in {
        "attn.in_proj.": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.out_proj.": ["self_attn.out_proj"],
        "ln_1.": ["layer_norm1"],
        "ln_2.": ["layer_norm2"],
        "mlp.c_fc.": ["mlp.fc1"],
        "mlp.c_proj.": ["mlp.fc2"],
    }.items()
}


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
        # The file's tensors that make up each one of the tower's, on top of each other.
        self.parts: dict[str, list[str]] = _open_clip_parts(self.file.shapes)
        self.hugging_face = not self.parts
        if self.hugging_face:
            self.parts = _hugging_face_parts(self.file.shapes)
        shapes = {name: [self.file.shapes[part] for part in parts] for name, parts in self.parts.items()}
        self.shapes = {
            name: (sum(rows for rows, *_ in several), *several[0][1:]) if len(several) > 1 else several[0]
            for name, several in shapes.items()
        }
        if len(self.shapes.get("conv1.weight", ())) != 4 or len(self.shapes.get("positional_embedding", ())) != 2:
            raise UserError(
                f"{path} holds no CLIP vision transformer: expected visual.conv1.weight and "
                "visual.transformer.resblocks.* as in open_clip's, OpenAI's and DiHT's files, or "
                "vision_model.encoder.layers.* as in Hugging Face's."
            )

    def described(self) -> dict[str, int | float]:
        """What the file says about the tower, by VisionConfig's keys."""
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
        return described | self._described_beside()

    def _described_beside(self) -> dict[str, int]:
        """What no tensor tells, from the config.json beside a file of Hugging Face's."""
        beside = self.path.with_name("config.json")
        if not self.hugging_face or not beside.is_file():
            return {}
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
            content = content.get("vision_config", content)
            stated = {"heads": content.get("num_attention_heads"), "quick_gelu": content.get("hidden_act")}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"{beside} cannot be read as CLIP's configuration: {error}.") from None
        if stated["quick_gelu"] not in (None, "gelu", "quick_gelu"):
            raise UserError(f"{beside} has hidden_act {stated['quick_gelu']}: only gelu and quick_gelu are known.")
        stated["quick_gelu"] = stated["quick_gelu"] and stated["quick_gelu"] == "quick_gelu"
        return {key: int(value) for key, value in stated.items() if value is not None}

    def unused(self, config: VisionConfig) -> list[str]:
        """Tensors of the file's vision tower that the recipe's would not use, though they change what it computes."""
        used = {part for name in tower_shapes(config) for part in self.parts[name]}
        if self.hugging_face:
            prefix = _hugging_face_prefix(self.file.shapes)
            tower = [part for part in self.file.shapes if part.startswith(prefix)]
        else:
            tower = [part for (part,) in self.parts.values()]

        def is_needless(part: str) -> bool:
            block = NUMBERED.search(part)
            return bool(IGNORABLE.search(part) or block and int(block[1]) >= config.depth)

        return [part for part in tower if part not in used and not is_needless(part)]

    def copy(self, name: str, target: torch.Tensor) -> None:
        """Fills `target` with the tower's tensor `name`."""
        rows = 0
        for part in self.parts[name]:
            source = self.file.tensor(part)
            copy_in_bands(target.narrow(0, rows, len(source)), source)
            rows += len(source)
            self.file.release(source)


def _open_clip_parts(theirs: dict) -> dict[str, list[str]]:
    parts = {}
    for part in theirs:
        _, visual, name = part.removeprefix("module.").rpartition("visual.")
        if visual:
            parts[BLOCK.sub(r"blocks.\1.clip.\2", name).replace("in_proj_", "in_proj.")] = [part]
    return parts


def _hugging_face_prefix(theirs: dict) -> str:
    # CLIPModel's names begin with vision_model; those of a CLIPVisionModel do before transformers 5.
    return "vision_model." if any(part.startswith("vision_model.") for part in theirs) else ""


def _hugging_face_parts(theirs: dict) -> dict[str, list[str]]:
    prefix = _hugging_face_prefix(theirs)
    parts = {ours: [prefix + part for part in several] for ours, several in HF_TOWER.items()}
    blocks = {found[1] for part in theirs if (found := re.match(rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.", part))}
    for n in blocks:
        for ours, several in HF_BLOCK.items():
            parts[f"blocks.{n}.clip.{ours}"] = [f"{prefix}encoder.layers.{n}.{part}" for part in several]
    return {ours: several for ours, several in parts.items() if all(part in theirs for part in several)}


def tower_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every frozen tensor's shape in VisionTower, by name."""
    W, F, patch = config.width, int(config.width * config.mlp_ratio), config.patch_size
    block = {
        "ln_1.weight": (W,),
        "ln_1.bias": (W,),
        "attn.in_proj.weight": (3 * W, W),
        "attn.in_proj.bias": (3 * W,),
        "attn.out_proj.weight": (W, W),
        "attn.out_proj.bias": (W,),
        "ln_2.weight": (W,),
        "ln_2.bias": (W,),
        "mlp.c_fc.weight": (F, W),
        "mlp.c_fc.bias": (F,),
        "mlp.c_proj.weight": (W, F),
        "mlp.c_proj.bias": (W,),
    }
    shapes = {
        "conv1.weight": (W, 3, patch, patch),
        "class_embedding": (W,),
        "positional_embedding": (1 + (config.image_size // patch) ** 2, W),
        "ln_pre.weight": (W,),
        "ln_pre.bias": (W,),
    }
    if config.readout.norm:
        shapes |= {"ln_post.weight": (W,), "ln_post.bias": (W,)}
    for number in range(config.depth):  # blocks behind the last that is read out: not there
        shapes.update({f"blocks.{number}.clip.{name}": shape for name, shape in block.items()})
    return shapes


def check_clip(path: Path, config: VisionConfig) -> ClipFile:
    """Opens a CLIP file and compares it with the recipe, from its header alone.

    Raises:
        UserError: as ClipFile; or the file and the recipe disagree in a number; or a tensor is missing, or one is there
            that the tower does not use.
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
    for name, shape in tower_shapes(config).items():
        if name not in clip.shapes:
            raise UserError(f"{path} lacks a tensor of its vision tower, here {name}: is its download complete?")
        if clip.shapes[name] != shape:
            raise UserError(
                f"{path}: {clip.parts[name][0]} is {list(clip.shapes[name])}, but the recipe's model.vision makes it "
                f"{list(shape)}."
            )
    unused = clip.unused(config)
    if unused:
        raise UserError(
            f"{path} has {len(unused)} tensors in its vision tower that the tower here does not use: {some(unused)}. "
            "Without them it would compute something else. Give OpenAI's CLIP or one built like it."
        )
    return clip


def load_clip(tower: VisionTower, path: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Fills the tower's frozen parameters, cast to their dtype; adapters are not touched.

    What the tower does not need (text tower, projection, blocks after the last one read out) is not read.
    on_progress(done, total) is called after every tensor.

    Raises:
        UserError: see check_clip.
    """
    from lavin_ds.models.linear import fill_weight

    clip = check_clip(path, tower.config)
    names = tower_shapes(tower.config)
    for done, name in enumerate(names, start=1):
        owner, _, parameter = name.rpartition(".")
        fill_weight(tower.get_submodule(owner), parameter, partial(clip.copy, name))
        if on_progress:
            on_progress(done, len(names))
