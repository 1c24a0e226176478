"""Makes a small base with random weights for a recipe, to try the pipeline on real data without the real weights.

    python examples/random_base.py --recipe examples/real-data.yaml --out base

writes base/llama (Hugging Face's layout) and base/vit.safetensors. Nothing trained over it scores above chance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lavin_ds.config import ModelConfig, load_recipe


def write_random_base(model: ModelConfig, out: Path) -> None:
    """Writes OUT/llama and, for a recipe that sees, OUT/vit.safetensors; the same numbers every time."""
    torch.manual_seed(0)
    llm, vision = model.llm, model.vision
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=llm.vocab_size,
            hidden_size=llm.dim,
            intermediate_size=llm.ffn_dim,
            num_hidden_layers=llm.n_layers,
            num_attention_heads=llm.n_heads,
            num_key_value_heads=llm.kv_heads,
            rms_norm_eps=llm.norm_eps,
            tie_word_embeddings=False,
        )
    ).save_pretrained(out / "llama")
    if vision is None:
        return
    vit = VisionTransformer(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.heads,
        mlp_ratio=vision.mlp_ratio,
        output_dim=vision.width,
        act_layer=QuickGELU if vision.quick_gelu else nn.GELU,
    )
    state = {f"visual.{name}": tensor.contiguous() for name, tensor in vit.state_dict().items()}
    save_file(state, out / "vit.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    write_random_base(load_recipe(given.recipe).model, given.out)


if __name__ == "__main__":
    main()
