"""Real ranks without the price of starting them: forked from a process that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

SECONDS = 200
_SERVER = multiprocessing.get_context("forkserver")
# The last one is DeepSpeed's: its ZeRO engines import it, and with it torch's compiler, for three seconds a rank.
_SERVER.set_forkserver_preload(
    ["lavin_ds.training.job", "matplotlib.backends.backend_agg", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


@dataclass(frozen=True)
class Spy:
    """What is done to ranks from outside, in the processes that train.

    file_size_limit: bytes after which writing a file fails, as on a full disk. keep_values: every rank writes the
    adapters that it holds at the end to OUT/values-of-rank-N.safetensors. fails_at: step at which rank 1's data raises.
    stops_at: step at which rank 0 gets SIGTERM. stops_in_validation: rank 1 gets it in the first batch of the first
    validation. second_out: the --out of rank 1, as on a disk of another node's own.
    """

    file_size_limit: int | None = None
    keep_values: bool = False
    fails_at: int | None = None
    stops_at: int | None = None
    stops_in_validation: bool = False
    second_out: Path | None = None


def run_ranks(world: int, arguments, log: Path, spy: Spy) -> list[int]:
    """Trains on `world` gloo ranks as launch/train.py does; returns their exit codes. They print to `log`."""
    from lavin_ds.machine import free_port

    given = (world, free_port(), arguments, log, spy)
    ranks = [_SERVER.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(SECONDS)
        if rank.exitcode is None:
            rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]


def in_ranks(world: int, work, *args) -> None:
    """Calls `work(*args)` on each of `world` ranks, and raises what it raises."""
    from lavin_ds.machine import free_port

    given = (world, free_port(), work, args)
    torch.multiprocessing.start_processes(_call, given, nprocs=world, start_method="forkserver")


def _call(rank: int, world: int, port: int, work, args: tuple) -> None:
    _set_environment(rank, world, port)
    work(*args)


def _set_environment(rank: int, world: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")


def _rank(rank: int, world: int, port: int, arguments, log: Path, spy: Spy) -> None:
    _set_environment(rank, world, port)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from lavin_ds.launching.rank import end, run
    from lavin_ds.training import checkpoint, feed, validation

    if spy.file_size_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (spy.file_size_limit, spy.file_size_limit))
    if spy.second_out and rank == 1:
        arguments = replace(arguments, out=spy.second_out)
    step = feed.Feed.step

    def disturb(self, number):
        if number == spy.fails_at and rank == 1:
            raise ValueError("what really happened")
        if number == spy.stops_at and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    feed.Feed.step = disturb
    if spy.stops_in_validation and rank == 1:
        score = validation.Validation._score

        def stop_and_score(self, *args):
            os.kill(os.getpid(), signal.SIGTERM)
            return score(self, *args)

        validation.Validation._score = stop_and_score
    if spy.keep_values:
        gather = checkpoint.gather_values

        def gather_and_keep(*args):
            values = gather(*args)
            save_file(values, arguments.out / f"values-of-rank-{rank}.safetensors")
            return values

        checkpoint.gather_values = gather_and_keep
    end(run(arguments))
