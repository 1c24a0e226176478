"""RAM that this process may still take: what the machine has free, or what is left of its control group's limit.

Slurm, Kubernetes and containers give a job a share of a node by a control group (cgroup), and kill it without a word
when it takes more. The machine's own figures do not know of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class _Files:
    """Names of a memory group's files; the page cache that `cache` counts is given back on demand."""

    limit: str
    usage: str
    cache: str  # key in memory.stat


VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def free_ram(root: Path = Path("/")) -> int:
    """Bytes. `root` holds proc/ and sys/."""
    return min([psutil.virtual_memory().available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Of the process's memory group and of every group around it, where it has a limit."""
    for files, folder in _groups(root):
        with suppress(OSError, ValueError, KeyError):  # no limit is "max", and the outermost group has no files
            limit, usage = (int((folder / name).read_text(encoding="ascii")) for name in (files.limit, files.usage))
            stat = (folder / "memory.stat").read_text(encoding="ascii").split()
            cache = int(dict(zip(stat[::2], stat[1::2], strict=True))[files.cache])
            yield max(0, limit - usage + cache)


def _groups(root: Path) -> Iterator[tuple[_Files, Path]]:
    """cgroups(7): a line `0::/PATH` for version 2, `N:memory:/PATH` for version 1.

    A container may be told a path of its host's, which it cannot see: the folders that do exist are looked at.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files, mounted = (VERSION_1, "sys/fs/cgroup/memory") if controllers else (VERSION_2, "sys/fs/cgroup")
        folder = root / mounted / path.lstrip("/")
        while folder.is_relative_to(root / mounted):
            yield files, folder
            folder = folder.parent
