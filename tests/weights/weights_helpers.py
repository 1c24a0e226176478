"""Small models and the files that others would have written of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lavin_ds.cli.export import app
from lavin_ds.config import RunConfig
from lavin_ds.models.lavin import Lavin
from lavin_ds.weights.llama import HuggingFaceLlama

ADAPTER = {"kind": "mm", "dim": 4, "temperature": 5.0}
CONFIG = RunConfig.model_validate(
    {
        "name": "small",
        "model": {
            "llm": {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 64},
            "vision": {
                "width": 32,
                "layers": 3,
                "heads": 4,
                "patch_size": 8,
                "image_size": 16,
                "readout": {"every": 2},
            },
            "llm_adapter": ADAPTER,
            "vision_adapter": ADAPTER,
            "neck": {"dim": 8},
            "frozen_dtype": "fp32",
        },
    }
)
# What Meta splits over the shards, and along which dimension; LLaMA-1 splits the embedding's width.
META_SPLIT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def filled(seed: int = 0, config: RunConfig = CONFIG) -> Lavin:
    """A model with random values in every parameter."""
    model = Lavin(config.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def frozen_llama(model: Lavin) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.llm.named_parameters() if ".adapters." not in name}


def write_meta(folder: Path, model: Lavin, shards: int, embedding_dim: int = 1) -> Path:
    """Meta's layout; `embedding_dim` is 1 as in LLaMA-1 and 2, or 0 as in LLaMA-3."""
    folder.mkdir(exist_ok=True)
    split = META_SPLIT | {"tok_embeddings": embedding_dim}
    for number in range(shards):
        state = {"rope.freqs": torch.ones(4)}
        for name, tensor in frozen_llama(model).items():
            dim = split.get(name.split(".")[-2])
            part = tensor if dim is None else tensor.chunk(shards, dim)[number]
            state[name] = part.clone()
        torch.save(state, folder / f"consolidated.{number:02d}.pth")
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(shape | {"multiple_of": 8}))
    return folder


def write_clip(file: Path, model: Lavin) -> Path:
    """open_clip's layout: the tower under `visual.`, one block more than is read out, and a text tower."""
    names = {n: p.detach() for n, p in model.vision.named_parameters() if ".adapters." not in n}
    theirs = {"blocks.": "transformer.resblocks.", ".clip.": ".", "in_proj.": "in_proj_"}
    state = {}
    for name, tensor in names.items():
        for ours, official in theirs.items():
            name = name.replace(ours, official)
        state[f"visual.{name}"] = tensor.clone()
    last = "visual.transformer.resblocks.1."
    state |= {name.replace(".1.", ".2."): torch.zeros_like(t) for name, t in state.items() if name.startswith(last)}
    state |= {"visual.proj": torch.zeros(32, 8), "token_embedding.weight": torch.zeros(50, 8)}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def write_huggingface(folder, model, kind=".safetensors", tied=False):
    """transformers' own model with these weights, saved by transformers."""
    import transformers

    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            rms_norm_eps=1e-6,
            tie_word_embeddings=tied,
        )
    )
    state = {}
    for name, tensor in frozen_llama(model).items():
        for their_name, ours in HuggingFaceLlama.LAYER_NAMES.items():
            if name.endswith(ours) and name.startswith("layers."):
                if name.endswith(("wq.weight", "wk.weight")):  # Meta's neighbours to halves, as their script does
                    tensor = tensor.view(-1, 4, 2, 32).transpose(1, 2).reshape(tensor.shape)
                state["model." + name.replace(ours, their_name)] = tensor
    plain = {ours: their_name for their_name, ours in HuggingFaceLlama.NAMES.items()}
    state |= {plain[name]: tensor for name, tensor in frozen_llama(model).items() if name in plain}
    theirs.load_state_dict(state)
    theirs.save_pretrained(folder, max_shard_size="20KB")
    if kind == ".bin":
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        state = theirs.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save(state, folder / "pytorch_model.bin")
    return folder


def same_trainables(first: Lavin, second: Lavin) -> bool:
    return all(torch.equal(p, second.trainable()[name]) for name, p in first.trainable().items())


def export(*arguments):
    return CliRunner().invoke(app, ["adapter", *map(str, arguments)])
