"""Fixtures on the small model of model_helpers."""

from collections.abc import Callable

import pytest
import torch
from model_helpers import CONFIG, fill, make_batch

from lavin_ds.config import ModelConfig
from lavin_ds.data.collate import Batch
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process


@pytest.fixture(scope="session", autouse=True)
def single_process():
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    initialize_single_process()


@pytest.fixture(name="make_batch")
def make_batch_fixture() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture(name="fill")
def fill_fixture() -> Callable:
    return fill


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def model() -> Lavin:
    return fill(Lavin(CONFIG)).eval()
