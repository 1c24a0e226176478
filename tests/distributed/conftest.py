"""A small base and shards, and real launches on them: processes, gloo, the deepspeed launcher."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lavin_ds.config import load_recipe
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import prepare_scienceqa
from lavin_ds.training.arguments import TrainArguments
from lavin_ds.training.launcher import free_port, train_command

TOKENIZER = Path(__file__).parents[2] / "lavin_ds" / "assets" / "tiny" / "llama" / "tokenizer.model"
GLOBAL_BATCH, STEPS = 8, 20
RECIPE = {
    "name": "distributed",
    "model": {
        "llm": {"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 64, "vocab_size": 512},
        "vision": {"width": 16, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 32, "cls_every": 1},
        "llm_adapter": {"kind": "mm", "dropout": 0.0},
        "vision_adapter": {"kind": "mm", "dropout": 0.0},
        "neck_dim": 16,
        "frozen_dtype": "fp32",
    },
    "data": {"max_length": 160},
    "training": {
        "epochs": 1,
        "warmup_epochs": 0.1,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": 4,
        "peak_lr": 0.02,
        "checkpoint_every": 7,
    },
}


@dataclass(frozen=True)
class Workplace:
    """Inputs of every launch. Runs go to folders of their own below `folder`."""

    folder: Path
    recipe: Path

    def arguments(self, name: str, *overrides: str, resume: str = "never") -> TrainArguments:
        return TrainArguments(
            recipe=str(self.recipe),
            data=self.folder / "shards",
            llama=self.folder / "llama",
            clip=self.folder / "vit.safetensors",
            out=self.folder / "runs" / name,
            resume=resume,
            overrides=overrides,
        )

    def command(self, name: str, ranks: int, *overrides: str, resume: str = "never") -> list[str]:
        return train_command(ranks, None, free_port(), self.arguments(name, *overrides, resume=resume).words())

    def train(self, name: str, ranks: int, *overrides: str, resume: str = "never") -> Run:
        """Launches under `deepspeed` and waits; fails the test with what was printed if the launch failed."""
        done = subprocess.run(
            self.command(name, ranks, *overrides, resume=resume),
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return Run(self.folder / "runs" / name)


@dataclass(frozen=True)
class Run:
    folder: Path

    @property
    def metrics(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([m["loss"] for m in self.metrics], dtype=torch.float64)

    @property
    def adapters(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter.safetensors")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    llm, vision = RECIPE["model"]["llm"], RECIPE["model"]["vision"]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=llm["vocab_size"],
            hidden_size=llm["dim"],
            intermediate_size=llm["ffn_dim"],
            num_hidden_layers=llm["n_layers"],
            num_attention_heads=llm["n_heads"],
            num_key_value_heads=llm["n_heads"],
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder / "llama")
    shape = {key: value for key, value in vision.items() if key != "cls_every"}
    vit = VisionTransformer(**shape, mlp_ratio=4.0, output_dim=8, act_layer=QuickGELU)
    save_file({f"visual.{k}": v.contiguous() for k, v in vit.state_dict().items()}, folder / "vit.safetensors")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    generate(folder / "source", seed=0, train=GLOBAL_BATCH * STEPS, val=0, test=0)
    prepare_scienceqa(folder / "source", TOKENIZER, folder / "shards", load_recipe(str(recipe)), splits=["train"])
    return Workplace(folder, recipe)
