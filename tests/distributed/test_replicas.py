"""Copies of the adapters on the ranks of a tensor-parallel group, where one rank computes other gradients."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import in_ranks

from lavin_ds.config import load_recipe
from lavin_ds.data.shards import ShardReader
from lavin_ds.launching.arguments import TrainArguments

NOISE, INFINITE_STEP = 1e-3, 3  # of the gradients; the step, from 0, in which rank 1's gradients are infinite


def train_with_noise_on_one_rank(arguments: TrainArguments, folder: Path) -> None:
    from lavin_ds.parallel import initialize_tensor_parallel
    from lavin_ds.training.checkpoint import gather_values
    from lavin_ds.training.engine import build_engine, start_distributed
    from lavin_ds.training.loop import Loop
    from lavin_ds.training.stop import StopSignal
    from lavin_ds.weights.base import build_model

    device = start_distributed()
    initialize_tensor_parallel(2)
    for stage in range(4):
        zero = folder / f"zero{stage}.json"
        zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        config = load_recipe(arguments.recipe, [f"deepspeed={zero}", "tensor_parallel=2", "data.max_length=160"])
        model = build_model(config, arguments.llama, arguments.clip, None, device)
        trainable = model.trainable()
        results = []

        def disturb(gradient: torch.Tensor, results=results) -> torch.Tensor:
            if len(results) == INFINITE_STEP:
                return gradient + torch.inf
            return gradient * (1 + NOISE * torch.randn(gradient.shape))

        if dist.get_rank() == 1:
            for name, parameter in trainable.items():
                if name.startswith("vision."):
                    parameter.register_hook(disturb)
        engine = build_engine(model, config)
        loop = Loop(engine, config, ShardReader(arguments.data, "train"), device)
        loop.run(StopSignal(), results.append)
        values = gather_values(engine, trainable)
        everywhere: list = [None, None]
        dist.all_gather_object(everywhere, values)
        for name, value in everywhere[0].items():
            assert torch.equal(value, everywhere[1][name]), (stage, name, (value - everywhere[1][name]).abs().max())
        assert [r.skipped for r in results] == [step == INFINITE_STEP for step in range(len(results))], stage


def test_they_stay_bit_identical_at_every_zero_stage_and_skip_the_same_steps(workplace, tmp_path):
    in_ranks(2, train_with_noise_on_one_rank, workplace.arguments("none"), tmp_path)
