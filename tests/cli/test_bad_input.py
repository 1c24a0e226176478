"""What a person gets for a mistake: one sentence, exit code 2, within seconds, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lavin_ds
from lavin_ds.config import load_recipe
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import prepare_scienceqa

ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    generate(folder / "source", train=28, val=0, test=0)
    tokenizer = ASSETS / "llama" / "tokenizer.model"
    prepare_scienceqa(folder / "source", tokenizer, folder / "shards", load_recipe("tiny"), splits=["train"])
    return folder / "shards"


def train(shards: Path, out: Path, *words: str, **changes: str) -> subprocess.CompletedProcess:
    options = {"recipe": "tiny", "data": shards, "llama": ASSETS / "llama", "clip": ASSETS / "vit.safetensors"}
    options |= {"out": out} | changes
    named = [str(word) for name, value in options.items() if value for word in (f"--{name}", value)]
    command = [Path(sys.executable).with_name("lavin-ds"), "train", *named, *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def assert_refused(done: subprocess.CompletedProcess, out: Path, *said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for words in said:
        assert words in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["training.epoch=3"], {}, ["unknown key training.epoch", "epochs"]),
        ([], {"recipe": "lavin-70b"}, ["No recipe 'lavin-70b'", "lavin-7b"]),
        ([], {"data": "nowhere"}, ["nowhere"]),
        ([], {"llama": "nowhere"}, ["nowhere"]),
        ([], {"clip": "nowhere.pt"}, ["nowhere.pt"]),
        ([], {"clip": ""}, ["--clip"]),
        (["model.llm.ffn_dim=1024"], {}, ["1024", "ffn_dim"]),
        (["model.vision.width=256", "model.vision.heads=8"], {}, ["256"]),
        (["tensor_parallel=4", "--ranks", "2"], {}, ["tensor_parallel 4", "2"]),
        (["deepspeed=zero9"], {}, ["zero9", "zero2"]),
        (["data.prompt_format=QCM-A"], {}, ["QCM-A"]),
        (["training.global_batch=1", "--ranks", "2"], {}, ["global_batch 1"]),
    ],
)
def test_train_says_in_one_sentence_what_is_wrong_and_writes_nothing(shards, tmp_path, words, changes, said):
    out = tmp_path / "run"
    assert_refused(train(shards, out, *words, **changes), out, *said)


def test_train_does_not_touch_a_folder_that_holds_something(shards, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = train(shards, tmp_path)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_shards_of_another_tokenizer_than_the_base_are_refused(shards, tmp_path):
    data = tmp_path / "shards"
    shutil.copytree(shards, data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 32000
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(train(data, tmp_path / "run"), tmp_path / "run", "32000", "vocab_size")


def test_a_missing_shard_file_is_named(shards, tmp_path):
    data = tmp_path / "shards"
    shutil.copytree(shards, data)
    missing = next(data.glob("*train*.arrow"))
    missing.unlink()
    assert_refused(train(data, tmp_path / "run"), tmp_path / "run", missing.name)


def test_resuming_with_another_recipe_names_the_key(shards, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = {
        "config": load_recipe("tiny").model_dump(mode="json"),
        "inputs": {"data": str(shards), "llama": "x", "clip": None},
        "data_sha256": "0",
        "ranks": 1,
        "versions": {},
        "git_revision": None,
    }
    (run / "run.json").write_text(json.dumps(record))
    done = train(shards, run, "training.peak_lr=1.0", "--resume", "auto")
    assert done.returncode == 2 and "training.peak_lr" in done.stderr
