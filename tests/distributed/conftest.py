"""A small base and shards, and real ranks on them: processes, gloo, and where a test is about it the launcher."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lavin_ds.config import load_recipe
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.launching.arguments import TrainArguments
from lavin_ds.launching.deepspeed_command import launch_command
from lavin_ds.machine import free_port

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples")]

from random_base import write_random_base
from ranks import Spy, run_ranks

TOKENIZER = Path(__file__).parents[2] / "lavin_ds" / "assets" / "tiny" / "llama" / "tokenizer.model"
NO_SPY = Spy()
GLOBAL_BATCH, STEPS = 8, 20
RECIPE = {
    "name": "distributed",
    "model": {
        "llm": {"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 64, "vocab_size": 512},
        "vision": {"width": 16, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 32, "readout": {"every": 1}},
        "llm_adapter": {"kind": "mm", "dropout": 0.0},
        "vision_adapter": {"kind": "mm", "dropout": 0.0},
        "neck": {"dim": 16},
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

    def arguments(self, name: str, *overrides: str, llama: str = "llama", **more) -> TrainArguments:
        return TrainArguments(
            recipe=str(self.recipe),
            data=self.folder / "shards",
            llama=self.folder / llama,
            clip=self.folder / "vit.safetensors",
            out=self.folder / "runs" / name,
            overrides=list(overrides),
            **more,
        )

    def command(self, name: str, ranks: int, *overrides: str, **more) -> list[str]:
        """What `lavin-ds train` starts."""
        return launch_command("train.py", ranks, None, free_port(), self.arguments(name, *overrides, **more).words())

    def train(self, name: str, ranks: int, *overrides: str, code: int = 0, spy: Spy = NO_SPY, **more) -> Run:
        """Trains and waits; fails the test with what was printed unless rank 0 ended with `code`, and the others too
        if it is 0."""
        log = self.folder / f"{name}.log"
        codes = run_ranks(ranks, self.arguments(name, *overrides, **more), log, spy)
        assert codes[0] == code and (code or not any(codes)), (codes, log.read_text()[-4000:])
        return Run(self.folder / "runs" / name, log)


@dataclass(frozen=True)
class Run:
    folder: Path
    log: Path

    @property
    def metrics(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([math.nan if m["loss"] is None else m["loss"] for m in self.metrics], dtype=torch.float64)

    @property
    def adapters(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter.safetensors")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    folder = tmp_path_factory.mktemp("distributed")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    config = load_recipe(str(recipe))
    write_random_base(config.model, folder)
    generate(folder / "source", seed=0, train=GLOBAL_BATCH * STEPS, val=14, test=0)
    prepare(ScienceQA(folder / "source", splits="train,val"), TOKENIZER, folder / "shards", config)
    return Workplace(folder, recipe)
