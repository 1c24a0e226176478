"""Two ranks of ZeRO-3 whose losses take different numbers of chunks: `python unequal_chunks.py DEEPSPEED_JSON`."""

import sys
from functools import partial

import torch.distributed as dist

from lavin_ds.config import load_recipe
from lavin_ds.models import llama
from lavin_ds.profiling.measure import build, in_fresh_processes, step
from lavin_ds.profiling.workload import Workload, make_batch

SAMPLES, LENGTH = 2, 40
FEW, MANY = (Workload(SAMPLES, LENGTH, 0.5, labels / LENGTH) for labels in (2, 4))  # a sample


def train(config) -> None:
    llama.LOSS_CHUNK = SAMPLES * 2 + 1
    engine, few = build(config, FEW)
    many = make_batch(config.model, MANY, config.training.packing)
    for number in range(6):  # alike at first, so that DeepSpeed has seen a whole step before they differ
        step(engine, many if number > 2 and dist.get_rank() == 1 else few)


if __name__ == "__main__":
    settings = [f"deepspeed={sys.argv[1]}", "training.micro_batch=4", "training.global_batch=8"]
    in_fresh_processes(2, 1, partial(train, load_recipe("tiny", settings)))
