"""The RAM that a job may take is what its control group leaves it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lavin_ds.launching.ram import free_ram

GIB = 2**30


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


def tell_group(root: Path, line: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"12:cpuset:/x\n{line}\n")


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch):
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=512 * GIB))


def test_without_a_group_it_is_what_the_machine_has_free(tmp_path):
    assert free_ram(tmp_path) == 512 * GIB


def test_the_tightest_group_of_version_2_around_the_process_counts(tmp_path):
    tell_group(tmp_path, "0::/slurm/job_7/step_0")
    groups = tmp_path / "sys/fs/cgroup/slurm"
    write(groups / "job_7/step_0", memory_max="max", memory_current=GIB, memory_stat="anon 5\ninactive_file 0")
    write(groups / "job_7", memory_max=16 * GIB, memory_current=3 * GIB, memory_stat=f"anon 5\ninactive_file {GIB}")
    write(groups, memory_max=64 * GIB, memory_current=4 * GIB, memory_stat="anon 5\ninactive_file 0")
    assert free_ram(tmp_path) == 14 * GIB  # page cache counts as free


def test_a_container_that_cannot_see_its_own_path_has_the_limit_at_the_top(tmp_path):
    tell_group(tmp_path, "4:memory:/docker/0123abc")
    write(
        tmp_path / "sys/fs/cgroup/memory",
        memory_limit_in_bytes=8 * GIB,
        memory_usage_in_bytes=9 * GIB,
        memory_stat=f"cache {2 * GIB}\ntotal_inactive_file {2 * GIB}",
    )
    assert free_ram(tmp_path) == GIB


MOUNTED = Path("/sys/fs/cgroup/memory")


@pytest.mark.skipif(not os.access(MOUNTED / "cgroup.procs", os.W_OK), reason="needs root and cgroup version 1")
def test_in_a_real_group():
    group = MOUNTED / f"lavin_ds_test_{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(GIB))
        program = (
            f"open('{group}/cgroup.procs', 'w').write('0'); "
            "from lavin_ds.launching.ram import free_ram; print(free_ram())"
        )
        shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert GIB - 64 * 2**20 < int(shown.stdout) <= GIB
    finally:
        group.rmdir()
