"""Imports the LaVIN authors' checkpoints, and exports adapters in their layout.

Their training script writes `checkpoint-N.pth` with keys model, optimizer, epoch, scaler and args; `model` holds the
trainable parameters, with a `module.` prefix under data parallelism (reference.md, sections 6 and 10). Only tensors
and an argparse.Namespace are unpickled. Their adapters give their published numbers with `compat: lavin-official`.

    theirs                                                          ours
    layers.N.adapter_{attn,mlp}.*                                   llm.layers.N.adapters.{attention,ffn}.*
    backbone.visual.transformer.resblocks.N.adapter_{attn,mlp}.*    vision.blocks.N.adapters.{attention,ffn}.*
      conv_A.{weight [R, D, 1], bias}                                 down_{weight [R, D], bias}
      conv_B.*, conv_D.* {weight [D, R/G, 1], bias}                   up_{weight,bias}_0, up_{weight,bias}_1
      conv_B.* (without a router)                                     up_{weight,bias}
      expert_weights.{weight [2, D], bias}                            router_{weight,bias}
    adapter_proj.conv_A.*, adapter_proj.conv_B.*                    neck.down_*, neck.up_*
    adapter_modality_embedding.weight                               modality.weight

Their adapter_mlp exists only if adapter_type is block (in the LLM) or visual_adapter_type is router_block (in the ViT).
In generation, their code routes an adapter_mlp of the LLM by a different hidden state than in training (reference.md,
section 4). This is not reproduced.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lavin_ds.config import ModelConfig, RunConfig
from lavin_ds.errors import UserError
from lavin_ds.models.lavin import Lavin
from lavin_ds.weights.adapter import fill_trainable
from lavin_ds.weights.tensor_files import load_torch

OWNERS = [
    (re.compile(r"llm\.layers\.(\d+)\.adapters\.(attention|ffn)\.(\w+)"), "layers"),
    (re.compile(r"vision\.blocks\.(\d+)\.adapters\.(attention|ffn)\.(\w+)"), "backbone.visual.transformer.resblocks"),
]
PLACES = {"attention": "adapter_attn", "ffn": "adapter_mlp"}
KINDS = ("none", "mm", "rep", "bottleneck")  # adapter kinds that their layout can hold
CONVOLUTIONS = {"down": "conv_A", "up_0": "conv_B", "up_1": "conv_D", "up": "conv_B", "router": "expert_weights"}
WHOLE_NAMES = {
    "neck.down_weight": "adapter_proj.conv_A.weight",
    "neck.down_bias": "adapter_proj.conv_A.bias",
    "neck.up_weight": "adapter_proj.conv_B.weight",
    "neck.up_bias": "adapter_proj.conv_B.bias",
    "modality.weight": "adapter_modality_embedding.weight",
}


def official_name(name: str) -> str:
    """The authors' name of a parameter of Lavin.trainable().

    Raises:
        UserError: their layout has no such parameter.
    """
    if name in WHOLE_NAMES:
        return WHOLE_NAMES[name]
    for pattern, blocks in OWNERS:
        match = pattern.fullmatch(name)
        part = match and re.fullmatch(r"(down|up|router)_(weight|bias)(_[01])?", match[3])
        convolution = part and CONVOLUTIONS.get(part[1] + (part[3] or ""))
        if convolution:
            return f"{blocks}.{match[1]}.{PLACES[match[2]]}.{convolution}.{part[2]}"
    raise _no_place(name)


def _no_place(what: str) -> UserError:
    return UserError(f"The authors' layout has no place for {what}: give --layout safetensors.")


def _check_kinds(config: ModelConfig) -> None:
    """Refuses kinds whose parameters have the authors' names but another meaning."""
    for adapter in (config.llm_adapter, config.vision_adapter):
        if adapter.kind not in KINDS:
            raise _no_place(f"adapters of kind {adapter.kind}")
    if config.vision and config.neck.kind != "lavin":
        raise _no_place(f"a neck of kind {config.neck.kind}")
    if config.vision and (config.vision.readout.rows != "cls" or config.vision.readout.norm):
        raise _no_place("visual features that are not [cls] tokens without the last norm")


def is_convolution(official: str) -> bool:
    """Whether a tensor is a convolution of width 1 in the authors' layout, with a last dimension of 1."""
    return bool(re.search(r"adapter_(attn|mlp)\.conv_[ABD]\.weight$", official))


def import_official(model: Lavin, file: Path) -> argparse.Namespace:
    """Fills every trainable parameter of `model` from the authors' checkpoint; returns its training arguments.

    Raises:
        UserError: the file cannot be read safely, or its tensors or arguments do not fit the recipe.
    """
    arguments, theirs = read_official(file, model.config)
    tensors = {}
    for name in model.trainable():
        official = official_name(name)
        if official in theirs:
            tensor = theirs.pop(official)
            tensors[name] = tensor.squeeze(-1) if is_convolution(official) else tensor
    # Tensors that are left over keep their own names, which the error then shows.
    fill_trainable(model, tensors | theirs, where=str(file))
    return arguments


def read_official(file: Path, config: ModelConfig) -> tuple[argparse.Namespace, dict[str, torch.Tensor]]:
    """Opens the authors' checkpoint, memory-mapped. Returns its arguments, and its tensors by name without `module.`.

    Raises:
        UserError: the file cannot be read safely, or its arguments do not fit the recipe.
    """
    _check_kinds(config)
    content = load_torch(file, allowed_globals=(argparse.Namespace,))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file} is not a checkpoint of the LaVIN authors' training script: it has no key 'model'.")
    arguments = content.get("args") or argparse.Namespace()
    _check_arguments(arguments, config, file)
    return arguments, {name.removeprefix("module."): tensor for name, tensor in content["model"].items()}


def _check_arguments(arguments: argparse.Namespace, config: ModelConfig, file: Path) -> None:
    """Compares numbers that the shapes of the tensors do not tell, or would report badly."""
    adapter = config.llm_adapter
    for argument, key, ours in [
        ("adapter_dim", "llm_adapter.dim", adapter.dim),
        ("adapter_scale", "llm_adapter.scale", adapter.scale),
        ("temperature", "llm_adapter.temperature", adapter.temperature),
        ("hidden_proj", "neck.dim", config.neck.dim),
    ]:
        theirs = getattr(arguments, argument, ours)
        if theirs != ours:
            raise UserError(
                f"{file} was trained with {argument} {theirs}, but the recipe's model.{key} is {ours}: "
                f"set model.{key}={theirs}."
            )


def official_bytes(tensors: Mapping[str, torch.Tensor], config: RunConfig) -> bytes:
    """The content of a file for the authors' evaluation. `tensors` are Lavin.trainable(), by name.

    Raises:
        UserError: their layout has no place for one of the tensors.
    """
    _check_kinds(config.model)
    llm, vision = config.model.llm_adapter, config.model.vision_adapter
    plain = "router" if vision.kind == "mm" else "normal"
    model = {}
    for name, tensor in tensors.items():
        official = official_name(name)
        tensor = tensor.detach().to("cpu", torch.float32).clone()
        model[f"module.{official}"] = tensor.unsqueeze(-1) if is_convolution(official) else tensor
    arguments = argparse.Namespace(
        adapter_type="block" if "ffn" in llm.at else "attn",
        visual_adapter_type="router_block" if "ffn" in vision.at else plain,
        adapter_dim=llm.dim,
        adapter_scale=llm.scale,
        temperature=llm.temperature,
        hidden_proj=config.model.neck.dim,
        n_prompt=config.model.visual_tokens,
        max_seq_len=config.data.max_length,
        prompt_format=config.data.prompt_format,
    )
    content = {"model": model, "epoch": int(config.training.epochs) - 1, "args": arguments}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
