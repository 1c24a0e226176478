"""Memory of a real training step, by two counts that the simulation has no part in.

Allocated: torch's CPU allocator reports every allocation and release to the profiler. Resident: the kernel's count of
the process's pages at their highest (VmHWM), above what they were before the model was built. The second also sees what
kernels allocate behind torch's back. It follows single tensors only if malloc returns memory at once, which
harness.MALLOC_THAT_RETURNS asks of glibc. That costs time, so memory and time are measured in processes of their own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.profiling.measure import build, step
from lavin_ds.profiling.workload import Workload

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


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
