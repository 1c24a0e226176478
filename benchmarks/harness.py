"""Shared by the benchmarks: quiet output, malloc settings, interleaved timing, tables, JSON and the environment.

Import it before torch and DeepSpeed. It sets environment variables that they read when they are imported.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # at lower levels torch's profiler prints "USDT:" lines
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it DeepSpeed warns on stdout that there is no GPU

# Environment variables for a process. glibc reads them when the process starts (mallopt(3)).
# Freed memory is returned to the system at once, so the resident set follows single tensors.
MALLOC_THAT_RETURNS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
# Freed memory is kept for the next tensor, as by a GPU's allocator, so no time is spent on page faults.
MALLOC_THAT_KEEPS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}

PACKAGES = ("torch", "deepspeed", "transformers")


def restart_with(variables: Mapping[str, str]) -> None:
    """Starts this script again with these environment variables, unless they are already set."""
    if not variables.items() <= os.environ.items():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | variables)


def environment() -> dict[str, Any]:
    """The machine and the package versions of a result."""
    import torch

    import lavin_ds

    found = {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found |= {"python": platform.python_version(), "lavin_ds": lavin_ds.__version__, "revision": _revision()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def interleaved(
    cases: Mapping[str, Callable[[], Any]], repetitions: int, tell: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of every repetition of every case. The cases take turns, so a slow minute affects all of them.

    `tell(name)` is called before each repetition. Use the minimum, because other work on the machine only adds time.
    """
    seconds = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, work in cases.items():
            tell(name)
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def show(result: dict[str, Any], as_json: bool, *parts: Table | str) -> None:
    """Prints `result` and the environment as JSON, or prints `parts` and then the environment in one line."""
    where = environment()
    if as_json:
        print(json.dumps({"environment": where} | result, indent=2))
        return
    console = Console()
    for part in parts:
        console.print(part)
    console.print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None), style="dim")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """A table. Its first column is text, the others are numbers."""
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    return made


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str | None:
    """The commit of the checkout, with a + if files differ from it. None without git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
