"""A LaVIN small enough to run for real."""

import sys
from pathlib import Path

import pytest
import torch

from lavin_ds.config import RunConfig, load_recipe

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # memory_use.py measures what is simulated here

TINY = [
    "model.llm={dim: 96, n_layers: 2, n_heads: 4, ffn_dim: 256, vocab_size: 512}",
    "model.vision={width: 64, layers: 2, heads: 2, patch_size: 8, image_size: 64, readout: {every: 1}}",
    "model.frozen_dtype=fp32",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


@pytest.fixture
def tiny() -> RunConfig:
    return load_recipe("lavin-7b", TINY)


@pytest.fixture
def tiny_checkpointed() -> RunConfig:
    return load_recipe("lavin-7b", [*TINY, "training.activation_checkpointing=true", "training.packing=false"])
