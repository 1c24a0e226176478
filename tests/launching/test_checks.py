"""The checks before a run: every problem at once, each a sentence that says what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import lavin_ds
from lavin_ds.cli.main import app
from lavin_ds.config import config_keys, load_recipe
from lavin_ds.devices import OVERHEAD
from lavin_ds.errors import UserError
from lavin_ds.launching import resources
from lavin_ds.launching.deepspeed_command import hostfile_ranks
from lavin_ds.launching.resources import disk_check, memory_check
from lavin_ds.launching.resume import FREE_ON_RESUME
from lavin_ds.models.counting import count_parameters
from lavin_ds.profiling.simulation import simulate
from lavin_ds.profiling.workload import worst_case
from lavin_ds.run import check_free, hold
from lavin_ds.training.deepspeed_config import check_deepspeed_config

ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"


@pytest.fixture
def validate(tiny_shards, tmp_path):
    def run(*words: str, **changes):
        options = {"recipe": "tiny", "data": tiny_shards, "llama": ASSETS / "llama", "clip": ASSETS / "vit.safetensors"}
        options |= {"out": tmp_path / "run"} | changes
        given = [str(w) for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value)]
        return CliRunner().invoke(app, ["validate", *given, *words])

    return run


def test_validate_lists_what_it_found_and_makes_nothing(validate, tmp_path):
    done = validate("--ranks", "2", "--json")
    assert done.exit_code == 0, done.output
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert all(check["passed"] for check in checks.values())
    assert {"recipe", "ranks", "DeepSpeed", "data", "LLaMA", "vision", "disk space", "memory"} <= checks.keys()
    assert "28 samples" in checks["data"]["found"] and "2 data parallel" in checks["ranks"]["found"]
    assert not (tmp_path / "run").exists()


def test_validate_tells_every_problem_at_once_and_exits_with_2(validate):
    done = validate(
        "--ranks", "3", "tensor_parallel=2", "deepspeed=zero9", "training.validate_every=5", llama="nowhere"
    )
    assert done.exit_code == 2
    said = " ".join(done.stdout.split())
    for words in ("4 of", "zero9", "nowhere", "split", "tensor_parallel 2", "WRONG"):
        assert words in said, words


def test_data_that_is_missing_is_told_once_and_memory_all_the_same(validate):
    done = validate("--ranks", "2", "--json", "training.validate_every=5", data="nowhere")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.exit_code == 2 and done.stdout.count("nowhere/manifest.json") == 1
    assert checks["memory"]["passed"] and "simulated" in checks["memory"]["found"]
    assert "GPU" in checks["devices"]["found"]


def test_a_disk_without_room_for_the_checkpoints_is_told_with_what_they_take(tmp_path, monkeypatch):
    config = load_recipe("tiny", ["training.keep_checkpoints=3", "training.validate_every=5"])
    count = count_parameters(config)
    needed = 5 * count.checkpoint_bytes + 2 * count.adapter_file_bytes  # 3 kept, one being written, the best one
    for free, passed in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        check = disk_check(tmp_path / "run", config)
        assert check.passed == passed and f"{needed / 1e6:.1f} MB for 5 checkpoints" in check.found


def test_a_gpu_needs_room_for_the_simulated_peak_and_the_cuda_context_unless_forced(monkeypatch):
    config = load_recipe("tiny")
    needed = simulate(config, worst_case(config, 2), 2).peak_bytes + int(OVERHEAD)
    monkeypatch.setattr(resources, "gpus", lambda: 3)
    for free, passed in ((needed, True), (needed - 1, False)):
        # The least of the GPUs that the ranks take counts; the third one is not taken.
        monkeypatch.setattr(resources, "free_gpu_memory", lambda free=free: [2 * needed, free, 0])
        check = memory_check(config, ranks=2, local_ranks=2)
        assert check.passed == passed and not check.warning
    assert "1.5 GB for the CUDA context" in check.found and "--force" in check.found
    forced = memory_check(config, ranks=2, local_ranks=2, force=True)
    assert forced.passed and forced.warning


def test_without_a_gpu_the_ranks_share_the_free_ram(monkeypatch):
    config = load_recipe("tiny")
    needed = simulate(config, worst_case(config, 2), 2).peak_bytes
    monkeypatch.setattr(resources, "gpus", lambda: 0)
    for free, passed in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(resources, "free_ram", lambda free=free: free)
        assert memory_check(config, ranks=2, local_ranks=2).passed == passed


def test_validate_shows_what_force_overrules_as_a_warning(validate, monkeypatch):
    monkeypatch.setattr(resources, "free_ram", lambda: 1000)
    assert validate("--ranks", "2").exit_code == 2
    done = validate("--ranks", "2", "--force")
    assert done.exit_code == 0 and "warning" in done.stdout and "--force was given" in " ".join(done.stdout.split())


def test_train_refuses_with_all_of_them(tiny_shards, tmp_path, monkeypatch, capsys):
    from lavin_ds.cli import main

    words = [
        "--recipe",
        "tiny",
        "--data",
        tiny_shards,
        "--llama",
        "nowhere",
        "--clip",
        "nothing.pt",
        "--out",
        tmp_path / "r",
    ]
    monkeypatch.setattr(sys, "argv", ["lavin-ds", "train", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main.run()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: 2 things are wrong:") and "nowhere" in said
    assert "nothing.pt" in said


def test_every_key_of_a_recipe_is_free_or_fixed_when_a_run_goes_on():
    """A new key belongs in one of the two: what a run learns must not change unseen in the middle of it."""
    fixed = {
        "compat",
        *("model.frozen_dtype", "model.vision_source"),
        *("data.prompt_format", "data.captions", "data.max_length", "data.overlength", "data.image_resize"),
        *(f"training.{key}" for key in ("epochs", "warmup_epochs", "global_batch", "peak_lr", "weight_decay")),
        *(f"training.{key}" for key in ("betas", "eps", "grad_clip", "seed")),
    }
    shapes = ("model.llm.", "model.vision.", "model.neck.", "model.llm_adapter.", "model.vision_adapter.")
    keys = config_keys()
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    unclassed = {key for key in leaves if not key.startswith(shapes)} - fixed - FREE_ON_RESUME
    assert not unclassed
    assert not FREE_ON_RESUME - leaves and not FREE_ON_RESUME & fixed


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage 4"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"comet": {"enabled": True}}, "comet"),
        ({"train_batch_size": 8}, "the recipe decides"),
    ],
)
def test_a_deepspeed_file_that_cannot_work_is_refused(tmp_path, config, said):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        check_deepspeed_config(str(file))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero2-offload", "zero3"])
def test_every_shipped_deepspeed_file_passes(name):
    assert "ZeRO stage" in check_deepspeed_config(name)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_monitor_without_its_package_says_how_to_install_it(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"tensorboard": {"enabled": True}}))
    with pytest.raises(UserError, match=r"pip install 'lavin_ds\[metrics\]'"):
        check_deepspeed_config(str(file))


@pytest.mark.parametrize(
    ("text", "said"), [("", "names no host"), ("node-1 slots=8\nnode-2\n", "line 2"), ("node-1 slots=x", "line 1")]
)
def test_a_bad_hostfile_is_told_by_its_line(tmp_path, text, said):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=said):
        hostfile_ranks(tmp_path / "hostfile")


def test_the_slots_of_a_hostfile_are_its_ranks(tmp_path):
    (tmp_path / "hostfile").write_text("# two nodes\nnode-1 slots=8\n\nnode-2 slots=4  # older\n")
    assert hostfile_ranks(tmp_path / "hostfile") == 12


def test_a_run_directory_is_held_by_one_process(tmp_path):
    check_free(tmp_path / "run")
    with hold(tmp_path / "run", pytest.fail):
        with pytest.raises(UserError, match=r"A run is going on in .* \(process \d+ on "):
            check_free(tmp_path / "run")
        with pytest.raises(UserError, match="going on"), hold(tmp_path / "run", pytest.fail):
            pass
    check_free(tmp_path / "run")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("existed", [False, True])
def test_a_run_directory_in_which_nothing_was_trained_goes_again(tmp_path, existed, trained):
    run = tmp_path / "run"
    if existed:
        run.mkdir()
    with pytest.raises(KeyError), hold(run, pytest.fail):
        if trained:
            (run / "run.json").write_text("{}")
        raise KeyError
    assert run.exists() == (existed or trained)
