"""`lavin-ds profile`: what it prints and what --json holds."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lavin_ds.cli.profile import app
from lavin_ds.errors import UserError
from lavin_ds.profiling.report import LEGEND


def invoke(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def recipe(tiny, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    raw = tiny.model_dump(mode="json") | {"name": "tiny"}
    raw["model"]["frozen_dtype"] = "bf16"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_params_json():
    count = json.loads(invoke("params", "--recipe", "lavin-7b", "--json"))
    assert count["trainable"] == 3_781_296
    assert count["components"]["neck"] == 659_584


def test_json_report(recipe):
    report = json.loads(invoke("--recipe", str(recipe), "--gpus", "2", "--length", "96", "--json"))
    assert report["parameters"]["trainable"] == sum(report["parameters"]["components"].values())
    assert report["memory"]["peak_bytes"] == sum(report["memory"]["components"].values())
    assert report["time"]["hours"] > 0
    methods = [row["method"] for row in report["table"]]
    assert methods[:5] == ["BLIP-2", "LLaVA", "LLaVA, memory saving", "LaVIN-7B", "LaVIN-13B"]
    ours = report["table"][-1]
    assert [ours[c]["mark"] for c in ("trainable", "memory", "time", "storage")] == [
        *("exact", "simulated", "extrapolated", "exact")
    ]
    assert report["table"][3]["memory"] == {"text": "33.9G", "mark": "quoted", "value": None}
    assert set(report["legend"]) == set(LEGEND)


def test_table_says_what_its_marks_mean_and_overrides_stand_bare(recipe, tmp_path):
    png = tmp_path / "memory.png"
    arguments = ("--recipe", str(recipe), "training.micro_batch=2", "--length", "96", "--plot", str(png))
    text = invoke(*arguments, "model.neck.dim=64")
    assert "s simulated" in text and "x extrapolated" in text
    assert "2 x 96 positions" in text
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_html_holds_its_pictures_and_asks_for_nothing(recipe, tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "timeline.png"
    arguments = ("--recipe", str(recipe), "model.vision=null", "--length", "96", "--as-published", "--price", "2")
    report = json.loads(invoke(*arguments, "--html", str(page), "--timeline", str(picture), "--json"))
    assert report["time"]["price"] == pytest.approx(16 * report["time"]["hours"])
    text = page.read_text()
    sources = re.findall(r'(?:src|href)="(.{22})', text)
    assert sources == ["data:image/png;base64,"] * 3
    assert "http" not in text and "@import" not in text and "<script" not in text
    assert "LaVIN-13B" in text and "55.9G" in text and "the authors&#x27; way" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    theirs = report["as_published"]
    assert theirs["peak_bytes"] == sum(theirs["components"].values())
    assert [row["method"] for row in report["table"]][-2] == "tiny, as published"


class Balanced(HTMLParser):
    """Fails on an end tag that does not close the tag opened last."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_other_data_than_scienceqas_gets_no_hours_without_shards(recipe):
    report = json.loads(invoke("--recipe", str(recipe), "--length", "64", "--json", "data.prompt_format=single-turn"))
    assert report["time"] is None and report["table"][-1]["time"]["value"] is None
    assert any("give --data SHARDS" in note for note in report["notes"])


def test_shards_of_another_recipe_are_refused(recipe, tiny_shards):
    with pytest.raises(UserError, match=r"not for tiny: .*data.max_length: shards \d+, recipe 64"):
        invoke("--recipe", str(recipe), "--data", str(tiny_shards), "data.max_length=64")


def test_zero3_prints_json_alone_and_counts_the_model_it_loads(recipe):
    words = ["--recipe", str(recipe), "deepspeed=zero3", "--gpus", "16", "--length", "64", "--json"]
    command = [sys.executable, "-c", "from lavin_ds.cli.main import run; run()", "profile", *words]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    report = json.loads(shown)
    assert any("as if all 16 were in one node" in note for note in report["notes"])
    loaded = sum(report["parameters"]["frozen_bytes"].values()) + 4 * report["parameters"]["trainable"]
    assert (loaded > report["memory"]["peak_bytes"]) == any(note.startswith("Loading:") for note in report["notes"])


def test_fit_prints_a_command(recipe):
    text = invoke("--recipe", str(recipe), "--gpus", "1", "--fit", "24GiB", "data.max_length=64")
    assert "fits 1 x a card of 24.0 GiB" in text
    assert "lavin-ds train --recipe" in text and "data.max_length=64" in text and "--ranks 1" in text
    assert "as no --device was given" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "Give --recipe NAME or --run RUN"),
        (("--recipe", "lavin-7b", "--device", "abacus"), "No device 'abacus'"),
        (("--recipe", "lavin-7b", "model.nek_dim=3"), "unknown key model.nek_dim"),
        (("--recipe", "lavin-7b", "--gpus", "5", "training.global_batch=4"), "cannot be split over"),
        (("--run", "/nowhere"), "not a run directory"),
        (("--recipe", "lavin-7b", "--fit", "big"), "not an amount of memory"),
        (
            ("--recipe", "lavin-7b", "--fit", "24GiB", "--html", "x.html", "--length", "9"),
            "use for --length, --html",
        ),
        (("--recipe", "lavin-7b", "--tflops", "100"), "needs all of"),
        (("--recipe", "lavin-7b", "--tflops", "0", "--bandwidth", "1", "--memory", "1"), "above 0"),
        (("--recipe", "lavin-7b", "--plot", "/nowhere/x.png"), "--plot /nowhere/x.png: there is no folder"),
        (("--recipe", "lavin-7b", "--timeline", "x.pdf"), "ends with .png"),
        (("--recipe", "chatbot-7b", "--fit", "24GiB"), "give --data SHARDS"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        invoke(*arguments)


@pytest.fixture
def finished_run(recipe, tmp_path) -> Path:
    """Of two ranks and 25 steps, 0.2 s each but for those of the start."""
    run = tmp_path / "run"
    run.mkdir()
    config = yaml.safe_load(recipe.read_text())
    config["training"]["micro_batch"] = 1
    config["data"]["max_length"] = 64
    record = {
        "config": config,
        "inputs": {"data": str(tmp_path / "gone"), "llama": "/x", "clip": "/y"},
        "data_sha256": "0",
        "starts": [{"began": "2026-01-01T00:00:00Z", "step": 0, "ranks": 2, "versions": {}}],
    }
    (run / "run.json").write_text(json.dumps(record))
    summary = {"steps": 25, "samples": 96, "tokens": 900, "seconds": 4.5, "trainable_parameters": 1234}
    summary |= {"peak_rss_bytes": 800_000_000, "peak_device_bytes": None}
    (run / "summary.json").write_text(json.dumps(summary))
    steps = [{"step": n, "seconds": 3.0 if n < 5 else 0.2, "skipped": False} for n in range(25)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "adapter.safetensors").write_bytes(b"x" * 5000)
    return run


@pytest.mark.slow
def test_this_cpu_is_measured_and_a_step_of_one_rank_predicted():
    """In a process of its own: it forks, which pytest's threads and those of earlier simulations would disturb.

    On one core, as another test may have the other: two threads would wait for one another. It is the last one, as
    the README's commands run on the first one.
    """
    command = [Path(sys.executable).with_name("lavin-ds"), "profile", "--recipe", "tiny", "--device", "here", "--json"]
    one_core = {max(os.sched_getaffinity(0))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=540, preexec_fn=lambda: os.sched_setaffinity(0, one_core)
    )
    assert done.returncode == 0, done.stderr
    time = json.loads(done.stdout)["time"]
    assert (time["device"], time["gpus"], time["efficiency"]) == ("this CPU", 1, 1.0)
    assert 0.01 < time["step_seconds"] < 60  # 16 samples of 128 positions in a model of 2 million parameters


def test_a_finished_run_gets_a_measured_row(finished_run):
    report = json.loads(invoke("--run", str(finished_run), "--json"))
    assert report["gpus"] == 2
    assert report["measured"]["seconds"] == 4.5
    assert report["reached"] is None  # it had no GPU, and the report is for one
    assert report["table"][-1]["memory"] == {"text": "800 MB", "mark": "measured", "value": 800_000_000}
    assert any("resident set" in note for note in report["notes"])
    with pytest.raises(UserError, match="--device that it ran on"):
        invoke("--run", str(finished_run), "--gpus", "4")


def test_others_are_predicted_at_the_speed_that_a_run_reached(finished_run, recipe):
    device = ("--tflops", "0.1", "--bandwidth", "10", "--memory", "16")
    own = json.loads(invoke("--run", str(finished_run), *device, "--json"))
    speed = own["reached"]
    assert (speed["step_seconds"], speed["steps"]) == (0.2, 20)
    assert own["time"]["efficiency"] == 0.4 and speed["predicted_seconds"] == own["time"]["step_seconds"]
    calibrated = ("--run", str(finished_run), *device, "--json")
    again = json.loads(invoke(*calibrated, "--recipe", str(recipe), "training.micro_batch=1", "data.max_length=64"))
    assert again["time"]["efficiency"] == speed["efficiency"]
    assert again["time"]["step_seconds"] == pytest.approx(0.2)
    four = json.loads(invoke(*calibrated, "--gpus", "4"))
    assert 0.05 < four["time"]["step_seconds"] < 0.2
