"""Reads CLIP's vision transformer into a VisionTower. It reads these layouts:

    open_clip     open_clip_model.safetensors, open_clip_pytorch_model.bin   a state dict, the tower under `visual.`
    DiHT          diht_vitl14_336px_*.ckpt                                   the same names
    OpenAI        ViT-L-14.pt                           TorchScript, read without running it (torchscript.py)
    Hugging Face  model.safetensors, pytorch_model.bin  names of CLIPModel or CLIPVisionModel; q, k, v are separate

Weights do not tell the number of heads, nor the activation: QuickGELU (OpenAI's weights, and open_clip's models named
"-quickgelu") or GELU (open_clip's other models, and DiHT, whose model zoo leaves quick_gelu off). Both come from the
recipe, model.vision.heads and model.vision.quick_gelu. If Hugging Face's config.json lies beside the file, they are
compared with it.
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

if TYPE_CHECKING:  # torch takes seconds to import, and checking headers does not need it
    import torch

    from lavin_ds.models.vision import VisionTower

BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
# The number of a block, in either layout.
NUMBERED = re.compile(r"(?:resblocks|encoder\.layers)\.(\d+)\.")
# Tensors after the blocks, and constants: the tower need not use them.
IGNORABLE = re.compile(r"(^|\.)(proj|ln_post\.\w+|post_layernorm\.\w+|visual_projection\.\w+|position_ids)$")
# From the tower's names to Hugging Face's. The tower's in_proj is three tensors there.
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
    """An opened CLIP file. Its tensors have the names of VisionTower.

    Raises:
        UserError: the file cannot be read or holds no vision transformer.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: SafetensorsFile | TorchFile | TorchScriptFile = (
            TorchScriptFile(path) if path.is_file() and is_torchscript(path) else open_tensors(path)
        )
        # For each of the tower's tensors, the file's tensors to concatenate along dimension 0.
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
        """The properties of the tower that the file tells, by the keys of VisionConfig."""
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
        """The properties that no tensor tells, from the config.json beside a Hugging Face file."""
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
        """Tensors of the file's vision tower that the recipe's tower lacks although they would change its output."""
        used = {part for name in tower_shapes(config) for part in self.parts[name]}
        if self.hugging_face:
            prefix = _hugging_face_prefix(self.file.shapes)
            tower = [part for part in self.file.shapes if part.startswith(prefix)]
        else:
            tower = [part for (part,) in self.parts.values()]

        def is_ignorable(part: str) -> bool:
            block = NUMBERED.search(part)
            return bool(IGNORABLE.search(part) or block and int(block[1]) >= config.depth)

        return [part for part in tower if part not in used and not is_ignorable(part)]

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
    # CLIPModel's names begin with vision_model. CLIPVisionModel's do only before transformers 5.
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
    """Shapes of the frozen tensors of VisionTower, by name."""
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
    for number in range(config.depth):  # blocks after the last one that is read out are not built
        shapes.update({f"blocks.{number}.clip.{name}": shape for name, shape in block.items()})
    return shapes


def check_clip(path: Path, config: VisionConfig) -> ClipFile:
    """Opens a CLIP file and compares it with the recipe. It reads only the header.

    Raises:
        UserError: as ClipFile; or a number differs between file and recipe; or a tensor is missing, or would be unused.
    """
    clip = ClipFile(path)
    for key, theirs in clip.described().items():
        ours = getattr(config, key)
        # Width and patch size come first: if the tower is of another kind, they are the clearest error.
        if not math.isclose(ours, theirs):
            raise UserError(
                f"The recipe's model.vision.{key} is {ours:g}, but {path} has {theirs:g}: set "
                f"model.vision.{key}={theirs:g}, or give the CLIP that the recipe is for."
            )
    for name, shape in tower_shapes(config).items():
        if name not in clip.shapes:
            raise UserError(f"{path} lacks a tensor of its vision tower: {name}. Is its download complete?")
        if clip.shapes[name] != shape:
            raise UserError(
                f"{path}: {clip.parts[name][0]} is {list(clip.shapes[name])}, but by the recipe's model.vision it must "
                f"be {list(shape)}."
            )
    unused = clip.unused(config)
    if unused:
        raise UserError(
            f"{path} has {len(unused)} tensors in its vision tower that the tower here does not use: {some(unused)}. "
            "Without them its output would differ. Give OpenAI's CLIP, or one with the same architecture."
        )
    return clip


def load_clip(tower: VisionTower, path: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Fills the tower's frozen parameters, cast to their dtype. Adapters are left as they are.

    Tensors that the tower does not need (text tower, projection, blocks after the last one read out) are not read.
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
