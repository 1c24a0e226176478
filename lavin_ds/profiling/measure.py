"""A real training step on this machine: its time, and its memory by two counts that the simulation has no part in.

Allocated: torch's CPU allocator reports every allocation and release to the profiler, operator or not. Resident: the
kernel's count of the process's pages at their highest (VmHWM), above what they were before the model was built. The
second also sees what kernels allocate behind torch's back; it follows single tensors only if malloc returns memory at
once, which benchmarks/harness.py's MALLOC_THAT_RETURNS asks of glibc, and which costs time. So each is measured in a
process of its own (in_fresh_processes), and so is time.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.logging import logger
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.data.collate import Batch
from lavin_ds.machine import free_port
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.profiling.memory import Workload, make_batch
from lavin_ds.training.engine import build_engine, start_distributed

THIRD_STEP = "third step"


def measure_allocated(config: RunConfig, workload: Workload) -> int:
    """Bytes that torch's allocator holds at most during the third step of a new engine; needs a new process."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine, batch = build(config, workload)
        for _ in range(2):
            step(engine, batch)
        gc.collect()  # what only waits for Python's collector, a bucket of DeepSpeed's now and then, is not a step's
        with record_function(THIRD_STEP):
            step(engine, batch)
    return highest_allocation(profiler, since=THIRD_STEP)


def highest_allocation(profiler: profile, since: str | None = None) -> int:
    """Bytes that torch's CPU allocator held at most above its start, from a profile with profile_memory.

    What gloo's threads allocate is left out: they receive into a copy of every gathered tensor, and NCCL does not.
    What they release goes unreported: it is gone at the latest when its address is given anew.

    since: counts from the beginning of the record_function of that name on.
    """
    events = profiler.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == since) if since else 0
    python_thread = events[0].start_thread_id()
    total = highest = 0
    held = {}  # bytes by address
    for moment, address, size, thread in sorted(_allocations(profiler)):
        total -= held.pop(address, 0)
        if size > 0:
            held[address] = size if thread == python_thread else 0
            total += held[address]
        if moment >= start:
            highest = max(highest, total)
    return highest


def _allocations(profiler: profile) -> Iterator[tuple[int, int, int, int]]:
    """Moment, address, bytes (negative when released) and thread of each."""
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            what = event.extra_fields
            yield event.start_time_ns, what.ptr, what.alloc_size, event.start_tid


def measure_resident(config: RunConfig, workload: Workload) -> int:
    """Bytes that the process's pages grow by during the third step of a new engine; needs MALLOC_THAT_RETURNS."""
    step(*build(load_recipe("tiny"), Workload(1, 64)))  # libraries' code and their own tables come into memory
    before = _status("VmRSS")
    engine, batch = build(config, workload)
    for _ in range(2):
        step(engine, batch)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here (proc(5))
    step(engine, batch)
    return _status("VmHWM") - before


def measure_seconds(config: RunConfig, workload: Workload, steps: int = 4) -> dict[str, float]:
    """The fastest of `steps` optimizer steps of one micro-batch, by phase (forward, backward, update).

    Two more go before them. The fastest, as whatever else the machine does only adds.
    """
    engine, batch = build(config, workload)
    timings = [step(engine, batch) for _ in range(2 + steps)][2:]
    return {phase: min(t[phase] for t in timings) for phase in timings[0]}


def in_fresh_processes(ranks: int, tensor_parallel: int, work: Callable[[], Any], threads: int = 1) -> Any:
    """Rank 0's result of `work()` in that many new processes of so many threads each, joined in process groups.

    They are forks: packages are imported once, and nothing is left of one measurement in the next.

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
        raise RuntimeError(f"a measuring process ended with {[p.exitcode for p in processes]}")
    return results.get()


def _rank_main(rank, ranks, tensor_parallel, port, work, results, threads) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, of names that torch will drop
    start_distributed()
    torch.set_num_threads(threads)
    initialize_tensor_parallel(tensor_parallel)
    result = work()
    if rank == 0:
        results.put(result)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo and DeepSpeed have nothing to tidy up here, and sometimes fail at it


def build(config: RunConfig, workload: Workload) -> tuple[deepspeed.DeepSpeedEngine, Batch]:
    model = Lavin(config.model, config.compat is not None, config.training.activation_checkpointing)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    engine = build_engine(model, config)
    engine.train()
    return engine, make_batch(config.model, workload, config.training.packing)


def step(engine: deepspeed.DeepSpeedEngine, batch: Batch) -> dict[str, float]:
    """Seconds by phase."""
    start = time.perf_counter()
    loss_sum, labels = engine(batch)
    forward = time.perf_counter()
    engine.backward(loss_sum / max(labels, 1))
    backward = time.perf_counter()
    engine.step()
    return {"forward": forward - start, "backward": backward - forward, "update": time.perf_counter() - backward}


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
