"""Times real training steps on this machine, in new processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.logging import logger

from lavin_ds.config import RunConfig
from lavin_ds.data.collate import Batch
from lavin_ds.machine import free_port
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.profiling.workload import Workload, make_batch
from lavin_ds.training.engine import build_engine, start_distributed


def measure_seconds(config: RunConfig, workload: Workload, steps: int = 4) -> dict[str, float]:
    """Seconds of each phase (forward, backward, update), each the fastest of `steps` steps of one micro-batch.

    Two warm-up steps come first. The fastest counts because other work on the machine only adds time.
    """
    engine, batch = build(config, workload)
    timings = [step(engine, batch) for _ in range(2 + steps)][2:]
    return {phase: min(t[phase] for t in timings) for phase in timings[0]}


def in_fresh_processes(ranks: int, tensor_parallel: int, work: Callable[[], Any], threads: int = 1) -> Any:
    """Runs `work()` in `ranks` new processes joined in process groups. Returns rank 0's result.

    The processes are forks: packages are imported once, and measurements do not affect each other.

    Raises:
        RuntimeError: a process failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, ranks, tensor_parallel, port, work, results, threads))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    while results.empty() and all(p.exitcode in (None, 0) for p in processes):
        time.sleep(0.02)
    failed = any(p.exitcode for p in processes)
    for process in processes:
        if failed:
            process.terminate()
        process.join()
    if failed or results.empty():
        raise RuntimeError(f"a measuring process failed; exit codes: {[p.exitcode for p in processes]}")
    return results.get()


def _rank_main(rank, ranks, tensor_parallel, port, work, results, threads) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed uses names that torch will drop
    start_distributed()
    torch.set_num_threads(threads)
    initialize_tensor_parallel(tensor_parallel)
    result = work()
    if rank == 0:
        results.put(result)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # skips the cleanup of gloo and DeepSpeed, which is not needed here and sometimes fails


def build(config: RunConfig, workload: Workload) -> tuple[deepspeed.DeepSpeedEngine, Batch]:
    """A training engine with random weights, and a micro-batch for it."""
    model = Lavin(config.model, config.compat is not None, config.training.activation_checkpointing)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    engine = build_engine(model, config)
    engine.train()
    return engine, make_batch(config.model, workload, config.training.packing)


def step(engine: deepspeed.DeepSpeedEngine, batch: Batch) -> dict[str, float]:
    """Runs one optimizer step. Returns seconds by phase."""
    start = time.perf_counter()
    loss_sum, labels = engine(batch)
    forward = time.perf_counter()
    engine.backward(loss_sum / max(labels, 1))
    backward = time.perf_counter()
    engine.step()
    return {"forward": forward - start, "backward": backward - forward, "update": time.perf_counter() - backward}
