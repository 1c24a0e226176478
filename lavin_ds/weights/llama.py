"""Reads a LLaMA's weights, in Meta's or Hugging Face's layout, directly into this rank's parameters.

    Meta          params.json   consolidated.NN.pth                          split over any number of shards
    Hugging Face  config.json   model*.safetensors or pytorch_model*.bin     whole tensors, rotary halves separate

Names here are Meta's, which are also the model's. Opening a folder reads only JSON and tensor headers. Loading reads
one tensor at a time, and a tensor-parallel rank reads only the bytes of its own slice. Opening and comparing does not
import torch or the model, which takes seconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lavin_ds.config import LlamaConfig, RopeScaling
from lavin_ds.errors import UserError
from lavin_ds.weights.architecture import IGNORABLE, check_description, check_tensors, some
from lavin_ds.weights.tensor_files import SafetensorsFile, TorchFile, copy_in_bands, open_tensors

if TYPE_CHECKING:
    import torch

    from lavin_ds.models.llama import Llama

ROPE_THETA = 10000.0  # if the files do not give it
Part = tuple[slice, ...]  # of a tensor: one slice per dimension


class MetaLlama:
    """A folder with params.json and consolidated.NN.pth.

    Every shard holds a part of each tensor, or all of it. The shapes tell which dimension is split: for the token
    embedding it is the width in LLaMA-1 and 2, and the vocabulary in LLaMA-3.
    """

    def __init__(self, path: Path):
        self.path = path
        self.params = _read_json(path / "params.json")
        check_description(path / "params.json", self.params)
        files = sorted(path.glob("consolidated.*.pth"))
        numbers = [file.name.split(".")[1] for file in files]
        if numbers != [f"{i:02d}" for i in range(len(files))]:
            raise UserError(
                f"{path} holds the shards {', '.join(numbers)}: one is missing, or one does not belong to the model."
            )
        self.shards = [TorchFile(file, key="model") for file in files]
        self.shapes = self.shards[0].shapes
        for shard in self.shards[1:]:
            if shard.shapes != self.shapes:
                raise UserError(f"{shard.path} and {files[0]} hold different tensors: are they of the same model?")
        self.names = {name: name for name in self.shapes if not IGNORABLE.search(name)}

    def described(self) -> dict[str, object]:
        """What the files say about the model, by LlamaConfig's keys."""
        params, n = self.params, len(self.shards)
        facts = {key: params.get(key) for key in ("dim", "n_layers", "n_heads", "norm_eps")}
        facts["rope_theta"] = params.get("rope_theta", ROPE_THETA)
        facts["n_kv_heads"] = params.get("n_kv_heads") or params.get("n_heads")
        facts["rope_scaling"] = bool(params.get("use_scaled_rope"))
        facts["ffn_dim"] = _rows(self.shapes, "layers.0.feed_forward.w1.weight", times=n)
        facts["vocab_size"] = _rows(self.shapes, "output.weight", times=n)
        return facts

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raises UserError if the shards of `name` do not add up to the shape `expected`."""
        shape, n = self.shapes[name], len(self.shards)
        if self._split_dim(shape, expected) is None and shape != expected:
            raise UserError(
                f"{self.path}: {name} is {list(shape)} in each of {n} shard{'s' * (n > 1)}, but by the recipe's "
                f"model.llm it must be {list(expected)} in total."
            )

    def _split_dim(self, shape: tuple[int, ...], whole: tuple[int, ...]) -> int | None:
        n = len(self.shards)
        split = [d for d in range(len(whole)) if len(shape) == len(whole) and shape[d] != whole[d]]
        return split[0] if len(split) == 1 and shape[split[0]] * n == whole[split[0]] else None

    def copy(self, name: str, part: Part, whole: tuple[int, ...], head_dim: int, target: torch.Tensor) -> None:
        """Fills `target` with a part of tensor `name`, whose whole shape is `whole`."""
        split = self._split_dim(self.shapes[name], whole)
        if split is None:  # every shard holds the whole tensor
            source = self.shards[0].tensor(name)
            copy_in_bands(target, source[part])
            self.shards[0].release(source)
            return
        width, wanted = self.shapes[name][split], part[split]
        for number, shard in enumerate(self.shards):
            offset = number * width
            first, last = max(wanted.start, offset), min(wanted.stop, offset + width)
            if first < last:
                source = shard.tensor(name)
                here = (*part[:split], slice(first - offset, last - offset), *part[split + 1 :])
                copy_in_bands(target.narrow(split, first - wanted.start, last - first), source[here])
                shard.release(source)


class HuggingFaceLlama:
    """A folder with config.json and either model.safetensors or pytorch_model.bin, in one file or with an index."""

    NAMES = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    }
    LAYER_NAMES = {
        "self_attn.q_proj.weight": "attention.wq.weight",
        "self_attn.k_proj.weight": "attention.wk.weight",
        "self_attn.v_proj.weight": "attention.wv.weight",
        "self_attn.o_proj.weight": "attention.wo.weight",
        "mlp.gate_proj.weight": "feed_forward.w1.weight",
        "mlp.down_proj.weight": "feed_forward.w2.weight",
        "mlp.up_proj.weight": "feed_forward.w3.weight",
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
    }
    ROTATED = ("attention.wq.weight", "attention.wk.weight")

    def __init__(self, path: Path):
        self.path = path
        self.params = _read_json(path / "config.json")
        check_description(path / "config.json", self.params)
        self.files = _huggingface_files(path)
        self.file_of: dict[str, SafetensorsFile | TorchFile] = {}
        for file in self.files:
            self.file_of.update(dict.fromkeys(file.shapes, file))
        self.shapes = {name: file.shapes[name] for name, file in self.file_of.items()}
        self.names = self._model_names()

    def described(self) -> dict[str, object]:
        """What the files say about the model, by LlamaConfig's keys."""
        params = self.params
        heads = params.get("num_attention_heads")
        rope = params.get("rope_parameters") or {}
        return {
            "dim": params.get("hidden_size"),
            "n_layers": params.get("num_hidden_layers"),
            "n_heads": heads,
            "n_kv_heads": params.get("num_key_value_heads") or heads,
            "ffn_dim": params.get("intermediate_size"),
            "vocab_size": _rows(self.shapes, "model.embed_tokens.weight"),
            "norm_eps": params.get("rms_norm_eps"),
            "rope_theta": params.get("rope_theta", rope.get("rope_theta", ROPE_THETA)),
            "rope_scaling": self._rope_scaling(params.get("rope_scaling") or rope),
        }

    def _rope_scaling(self, scaling: dict) -> RopeScaling | bool:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return False
        if kind != "llama3":
            raise UserError(f"{self.path / 'config.json'} has RoPE scaling '{kind}': lavin_ds knows only 'llama3'.")
        return RopeScaling(**{key: scaling[key] for key in RopeScaling.model_fields if key in scaling})

    def _model_names(self) -> dict[str, str]:
        """Maps the model's name of every tensor to its name in the files. Unknown names are kept as they are."""
        names = {}
        for theirs in self.shapes:
            if IGNORABLE.search(theirs):
                continue
            layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", theirs)
            if layer and layer[2] in self.LAYER_NAMES:
                names[f"layers.{layer[1]}.{self.LAYER_NAMES[layer[2]]}"] = theirs
            else:
                names[self.NAMES.get(theirs, theirs)] = theirs
        if self.params.get("tie_word_embeddings"):  # as transformers, even if the file has an output tensor
            names["output.weight"] = "model.embed_tokens.weight"
        return names

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raises UserError if the shape of tensor `name` differs from `expected`."""
        theirs = self.names[name]
        if self.shapes[theirs] != expected:
            raise UserError(
                f"{self.path}: {theirs} is {list(self.shapes[theirs])}, but by the recipe's model.llm it must be "
                f"{list(expected)}."
            )

    def copy(self, name: str, part: Part, whole: tuple[int, ...], head_dim: int, target: torch.Tensor) -> None:
        """Fills `target` with a part of tensor `name`."""
        theirs = self.names[name]
        file = self.file_of[theirs]
        source = file.tensor(theirs)
        wanted = source[part]
        if name.endswith(self.ROTATED):
            # Hugging Face stores a head's even features before its odd ones; Meta interleaves them. A rank holds whole
            # heads, so its slice can be rearranged without the others.
            wanted = wanted.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
            target = target.view(-1, head_dim // 2, 2, target.shape[1])
        copy_in_bands(target, wanted)
        file.release(source)


def open_llama(path: Path) -> MetaLlama | HuggingFaceLlama:
    """Opens a folder of LLaMA weights without reading the tensors.

    Raises:
        UserError: there is no such folder, or it has neither layout, or a file cannot be read.
    """
    if path.is_file():
        raise UserError(f"{path} is a file: give its folder, which holds Meta's or Hugging Face's files.")
    if not path.is_dir():
        raise UserError(f"No LLaMA at {path}: give a folder with Meta's or Hugging Face's files.")
    if (path / "params.json").is_file() and any(path.glob("consolidated.*.pth")):
        return MetaLlama(path)
    if (path / "config.json").is_file():
        return HuggingFaceLlama(path)
    raise UserError(
        f"{path} holds no LLaMA: expected params.json with consolidated.NN.pth (Meta), or config.json with "
        "*.safetensors or pytorch_model*.bin (Hugging Face)."
    )


def llama_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the frozen tensors, by name."""
    D, F, K = config.dim, config.ffn_dim, config.head_dim
    block = {
        "attention.wq.weight": (config.n_heads * K, D),
        "attention.wk.weight": (config.kv_heads * K, D),
        "attention.wv.weight": (config.kv_heads * K, D),
        "attention.wo.weight": (D, config.n_heads * K),
        "feed_forward.w1.weight": (F, D),
        "feed_forward.w2.weight": (D, F),
        "feed_forward.w3.weight": (F, D),
        "attention_norm.weight": (D,),
        "ffn_norm.weight": (D,),
    }
    shapes = {"tok_embeddings.weight": (config.vocab_size, D), "norm.weight": (D,)}
    for layer in range(config.n_layers):
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in block.items()})
    shapes["output.weight"] = (config.vocab_size, D)
    return shapes


def check_llama(path: Path, config: LlamaConfig) -> MetaLlama | HuggingFaceLlama:
    """Opens a folder and compares it with the recipe. It reads only JSON and tensor headers.

    Raises:
        UserError: as open_llama; or a number or a shape differs between files and recipe; or a tensor is missing, or
            the model would not use it.
    """
    files = open_llama(path)
    _compare(files, config)
    shapes = llama_shapes(config)
    check_tensors(path, [theirs for name, theirs in files.names.items() if name not in shapes])
    missing = [name for name in shapes if name not in files.names]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors of a LLaMA: {some(missing)}. Is its download complete?")
    for name, shape in shapes.items():
        files.check_shape(name, shape)
    return files


def load_llama(model: Llama, path: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Fills the frozen parameters of `model` on this rank, cast to their dtype. Adapters are left as they are.

    on_progress(done, total) is called after every tensor.

    Raises:
        UserError: see check_llama.
    """
    from lavin_ds.models.linear import fill_weight, held_part

    files = check_llama(path, model.config)
    wholes = llama_shapes(model.config)
    for done, (name, whole) in enumerate(wholes.items(), start=1):
        owner = model.get_submodule(name.removesuffix(".weight"))
        part = held_part(owner, whole)
        fill_weight(owner, "weight", partial(files.copy, name, part, whole, model.config.head_dim))
        if on_progress:
            on_progress(done, len(wholes))


def _compare(files: MetaLlama | HuggingFaceLlama, config: LlamaConfig) -> None:
    """Compares every number that the files give with the recipe's. A number that they do not give is not compared."""
    described = files.described()
    scaling = described.pop("rope_scaling")
    recipe = config.model_dump() | {"n_kv_heads": config.kv_heads}
    for key, theirs in described.items():
        if theirs is None:
            continue
        if not isinstance(theirs, (int, float)):
            raise UserError(f"{files.path}: its value for {key} must be a number, not {theirs!r}.")
        if not math.isclose(theirs, recipe[key], rel_tol=1e-9):
            raise UserError(
                f"The recipe's model.llm.{key} is {recipe[key]:g}, but {files.path} has {theirs:g}: "
                f"set model.llm.{key}={theirs:g}, or give the weights that the recipe is for."
            )
    # Meta's params.json says only whether there is a scaling.
    agrees = bool(scaling) == bool(config.rope_scaling) if isinstance(scaling, bool) else scaling == config.rope_scaling
    if not agrees:
        raise UserError(
            f"The recipe's model.llm.rope_scaling is {config.rope_scaling}, but {files.path} has "
            f"{scaling or 'none'}: change the recipe, or give the weights that it is for."
        )


def _huggingface_files(path: Path) -> list[SafetensorsFile | TorchFile]:
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index_name).is_file():
            weight_map = _read_json(path / index_name).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{path / index_name} has no weight_map, so it is not an index of weights.")
            absent = sorted({name for name in weight_map.values() if not (path / name).is_file()})
            if absent:
                raise UserError(
                    f"{path / index_name} names {some(absent)}, which {path} lacks: download the missing files."
                )
            return [open_tensors(path / name) for name in sorted(set(weight_map.values()))]
    # model.safetensors holds the whole model: other files beside it are something else, such as adapters.
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model*.bin"):
        files = sorted(path.glob(pattern))
        if files:
            return [open_tensors(file) for file in files]
    raise UserError(f"{path} has a config.json but neither *.safetensors nor pytorch_model*.bin beside it.")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return content


def _rows(shapes: dict[str, tuple[int, ...]], name: str, times: int = 1) -> int | None:
    return shapes[name][0] * times if name in shapes else None
