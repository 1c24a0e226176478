"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden tensors beside the repository; skips where it is absent."""
    path = Path(os.environ.get("LAVIN_DS_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"{path} is not present: it holds the real data this test reads")
    return path
