"""Measures the memory of a real training step in two ways that do not depend on the simulation.

Allocated: torch's CPU allocator reports every allocation and release to the profiler. Resident: the kernel's peak count
of the process's pages (VmHWM), minus the count before the model was built. The second includes memory that kernels
allocate without torch. It follows single tensors only if malloc returns memory at once, which
harness.MALLOC_THAT_RETURNS sets. That costs time, so memory and time are measured in separate processes.
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
    """The most bytes that torch's allocator holds in the third step of a new engine. Needs a new process."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine, batch = build(config, workload)
        for _ in range(2):
            step(engine, batch)
        gc.collect()  # garbage, sometimes a bucket of DeepSpeed's, is not part of a step
        with record_function(THIRD_STEP):
            step(engine, batch)
    return highest_allocation(profiler, since=THIRD_STEP)


def highest_allocation(profiler: profile, since: str | None = None) -> int:
    """The most bytes that torch's CPU allocator held, above its start, in a profile made with profile_memory.

    Allocations by gloo's threads are left out: gloo receives into a copy of every gathered tensor, and NCCL does not.
    Releases by gloo's threads are not reported. Such memory counts as released when its address is used again.

    since: name of a record_function; only what happens after its start counts.
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
    """Time, address, bytes (negative for a release) and thread of every allocation and release."""
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            what = event.extra_fields
            yield event.start_time_ns, what.ptr, what.alloc_size, event.start_tid


def measure_resident(config: RunConfig, workload: Workload) -> int:
    """Peak bytes of the process's pages in the third step of a new engine, above those before it was built.

    Needs MALLOC_THAT_RETURNS.
    """
    step(*build(load_recipe("tiny"), Workload(1, 64)))  # loads the libraries' code and tables into memory
    before = _status("VmRSS")
    engine, batch = build(config, workload)
    for _ in range(2):
        step(engine, batch)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    step(engine, batch)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """The bytes in one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
