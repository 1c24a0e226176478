"""What a person gets for a mistake: one sentence, exit code 2, within seconds, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lavin_ds
from lavin_ds.cli import main
from lavin_ds.config import load_recipe
from lavin_ds.launching import deepspeed_command, launcher
from lavin_ds.launching.deepspeed_command import launch_command
from lavin_ds.machine import free_port
from lavin_ds.models.meta import build_on_meta
from lavin_ds.weights.adapter import METADATA, record_file, save_adapter

ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"


@dataclass(frozen=True)
class Outcome:
    code: int
    stderr: str


def words_of(shards: Path, out: Path, *words: str, **changes: str) -> list[str]:
    options = {"recipe": "tiny", "data": shards, "llama": ASSETS / "llama", "clip": ASSETS / "vit.safetensors"}
    options |= {"out": out} | changes
    return ["train", *(str(w) for name, value in options.items() if value for w in (f"--{name}", value)), *words]


@pytest.fixture
def train(monkeypatch, capsys):
    """`lavin-ds train` in this process: `train(shards, out, *words, **changed_options)`."""

    def run_command(*args, **changes) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lavin-ds", *words_of(*args, **changes)])
        with pytest.raises(SystemExit) as end:
            main.run()
        return Outcome(end.value.code, capsys.readouterr().err)

    return run_command


def assert_refused(done: Outcome, out: Path, *said: str) -> None:
    assert done.code == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for words in said:
        assert words in done.stderr
    assert not out.exists()


def test_the_installed_command_exits_with_2_and_one_sentence(tiny_shards, tmp_path):
    command = [Path(sys.executable).with_name("lavin-ds"), *words_of(tiny_shards, tmp_path / "run", llama="nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_refused(Outcome(done.returncode, done.stderr), tmp_path / "run", "nowhere")


def test_bare_deepspeed_says_the_sentence_once_for_all_ranks(tiny_shards, tmp_path):
    words = words_of(tiny_shards, tmp_path / "run", llama="nowhere")[1:]
    done = subprocess.run(launch_command("train.py", 2, None, free_port(), words), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


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
def test_train_says_in_a_sentence_what_is_wrong_and_writes_nothing(train, tiny_shards, tmp_path, words, changes, said):
    out = tmp_path / "run"
    assert_refused(train(tiny_shards, out, *words, **changes), out, *said)


def test_train_does_not_touch_a_folder_that_holds_something(train, tiny_shards, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = train(tiny_shards, tmp_path)
    assert done.code == 2 and "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_shards_of_another_tokenizer_than_the_base_are_refused(train, tiny_shards, tmp_path):
    data = tmp_path / "shards"
    shutil.copytree(tiny_shards, data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 32000
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(train(data, tmp_path / "run"), tmp_path / "run", "32000", "vocab_size")


def test_a_missing_shard_file_is_named(train, tiny_shards, tmp_path):
    data = tmp_path / "shards"
    shutil.copytree(tiny_shards, data)
    missing = next(data.glob("*train*.arrow"))
    missing.unlink()
    assert_refused(train(data, tmp_path / "run"), tmp_path / "run", missing.name)


def test_resuming_with_another_recipe_names_the_key(train, tiny_shards, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = {
        "config": load_recipe("tiny").model_dump(mode="json"),
        "inputs": {"data": str(tiny_shards), "llama": "x", "clip": None},
        "data_sha256": "0",
        "starts": [],
    }
    (run / "run.json").write_text(json.dumps(record))
    done = train(tiny_shards, run, "training.peak_lr=1.0", "--resume", "auto")
    assert done.code == 2 and "training.peak_lr" in done.stderr


def test_checkpoints_without_their_run_json_are_not_resumed(train, tiny_shards, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000007").mkdir(parents=True)
    done = train(tiny_shards, run, "--resume", "auto")
    assert done.code == 2 and "has checkpoints but no run.json" in done.stderr and "another --out" in done.stderr


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    config = load_recipe("tiny")
    file = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    model = build_on_meta(config)
    tensors = {name: torch.zeros(p.shape) for name, p in model.trainable().items()}
    save_adapter(file, tensors, config, ASSETS / "llama", ASSETS / "vit.safetensors")
    return file


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def announce_a_huge_header(file: Path) -> None:
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


def hold_another_shape(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {"modality.weight": torch.zeros(3, 5)}, file, METADATA)


def hold_half_precision(file: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, METADATA)


def lack_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["modality.weight"]
    save_file(tensors, file, METADATA)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_short, "cannot be read as safetensors"),
        (announce_a_huge_header, "cannot be read as safetensors"),
        (hold_another_shape, "modality.weight is F32 [3, 5] in the file"),
        (hold_half_precision, "F16"),
        (lack_a_tensor, "modality.weight is missing in the file"),
    ],
)
def test_a_bad_first_adapter_is_refused_before_anything_is_written(train, tiny_shards, adapter, tmp_path, spoil, said):
    bad = tmp_path / "bad.safetensors"
    shutil.copy(adapter, bad)
    shutil.copy(record_file(adapter), record_file(bad))
    spoil(bad)
    assert_refused(train(tiny_shards, tmp_path / "run", **{"init-adapter": bad}), tmp_path / "run", bad.name, said)


def test_an_authors_checkpoint_that_asks_for_code_is_refused_before_anything_is_written(train, tiny_shards, tmp_path):
    bad = tmp_path / "bad.pth"
    torch.save({"model": {}, "args": Path("x")}, bad)
    done = train(tiny_shards, tmp_path / "run", **{"init-adapter": bad})
    assert_refused(done, tmp_path / "run", bad.name, "which is not a tensor")


def test_without_ranks_a_run_takes_those_of_this_machine(train, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_command, "local_ranks", lambda: 2)
    monkeypatch.setattr(launcher, "run_to_the_end", lambda command, _: sys.exit(" ".join(command)))
    command = str(train(tiny_shards, tmp_path / "run").code)
    assert "--num_gpus 2" in command and "train.py --recipe tiny" in command


def test_help_is_shown_without_importing_anything_heavy():
    """The whole command line is imported for every --help and every mistyped option."""
    said = (
        "import sys; from lavin_ds.cli.main import app\n"
        "print(sorted({'torch', 'pyarrow', 'numpy', 'sentencepiece'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_run_is_checked_without_importing_torch(tiny_shards, tmp_path):
    """Seconds of a wait that nobody needs: the files of a run are compared with its recipe by their headers."""
    said = (
        "import sys; from lavin_ds.cli import main; from lavin_ds.launching import launcher\n"
        "heavy = {'torch', 'transformers', 'deepspeed'}\n"
        "launcher.run_to_the_end = lambda *_: sys.exit(' '.join(heavy & set(sys.modules)))\n"
        "main.run()"
    )
    command = [sys.executable, "-c", said, *words_of(tiny_shards, tmp_path / "run", "--ranks", "2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr  # what was imported before the launcher started
