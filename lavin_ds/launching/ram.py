"""RAM that this process may still use: the machine's free RAM, or what its control group's limit leaves if less.

Slurm, Kubernetes and containers limit a job's share of a node by a control group (cgroup), and kill the job without a
message if it uses more. The machine's own figures do not include that limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class _Files:
    """File names of a memory group. `cache` counts page cache, which the kernel frees on demand."""

    limit: str
    usage: str
    cache: str  # key in memory.stat


VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def free_ram(root: Path = Path("/")) -> int:
    """Free RAM in bytes. `root` is the folder that holds proc/ and sys/."""
    return min([psutil.virtual_memory().available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in the process's memory group, and in every group around it that has a limit."""
    for files, folder in _groups(root):
        with suppress(OSError, ValueError, KeyError):  # "max" means no limit; the outermost group has no such files
            limit, usage = (int((folder / name).read_text(encoding="ascii")) for name in (files.limit, files.usage))
            stat = (folder / "memory.stat").read_text(encoding="ascii").split()
            cache = int(dict(zip(stat[::2], stat[1::2], strict=True))[files.cache])
            yield max(0, limit - usage + cache)


def _groups(root: Path) -> Iterator[tuple[_Files, Path]]:
    """The folders of the process's memory groups. cgroups(7): `0::/PATH` is version 2, `N:memory:/PATH` version 1.

    In a container the path may be the host's, of which only some folders exist. The caller skips the others.
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
