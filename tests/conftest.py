"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: models here are too small to share among
# threads, and threads of several processes on two cores wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden tensors beside the repository; skips where it is absent."""
    path = Path(os.environ.get("LAVIN_DS_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"{path} is not present: it holds the real data this test reads")
    return path
