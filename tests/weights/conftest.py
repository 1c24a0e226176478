"""Files of a small model, and a complete run."""

import pytest
import torch
from weights_helpers import CONFIG, filled, write_clip, write_meta

from lavin_ds.parallel import initialize_single_process
from lavin_ds.run import Inputs, RunRecord
from lavin_ds.weights.adapter import save_adapter


@pytest.fixture(scope="session", autouse=True)
def single_process():
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    initialize_single_process()


@pytest.fixture
def files(tmp_path):
    """A model, and the files of its frozen LLaMA and CLIP."""
    model = filled()
    return model, write_meta(tmp_path / "llama", model, shards=2), write_clip(tmp_path / "clip.safetensors", model)


@pytest.fixture
def run(tmp_path, files):
    """A complete run directory."""
    model, llama, clip = files
    folder = tmp_path / "run"
    folder.mkdir()
    inputs = Inputs(data=tmp_path, llama=llama, clip=clip)
    RunRecord(config=CONFIG, inputs=inputs, data_sha256="", starts=()).save(folder)
    save_adapter(folder / "adapter.safetensors", model.trainable(), CONFIG, llama, clip)
    return folder
