"""Prep with several workers, killed, out of disk, and run again."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from data_helpers import record, same_files, small_config, write_scienceqa

from lavin_ds.data.schema import load_manifest
from lavin_ds.data_prep import pipeline
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.errors import UserError

FILE = 2  # records and images a file, so that a small job has many tasks
SMALL_FILES = f"""
from lavin_ds.cli import main
from lavin_ds.data_prep import pipeline
pipeline.RECORDS_PER_FILE = pipeline.IMAGES_PER_FILE = {FILE}
main.run()
"""


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(pipeline, "RECORDS_PER_FILE", FILE)
    monkeypatch.setattr(pipeline, "IMAGES_PER_FILE", FILE)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """60 records; two of three have an image, some the same one, and one a broken one."""
    folder = tmp_path_factory.mktemp("data")
    problems = {str(i): record(image="image.png" if i % 3 else None, hint="north " * i) for i in range(60)}
    splits = {"train": [str(i) for i in range(40)], "val": [str(i) for i in range(40, 60)]}
    write_scienceqa(folder, problems, splits)
    image = folder / "images/train/{}/image.png"
    for number in (10, 13, 22):
        shutil.copy(str(image).format(1), str(image).format(number))
    Path(str(image).format(5)).write_bytes(b"no image")
    return folder


@pytest.fixture
def uninterrupted(tmp_path, data, tokenizer_file) -> Path:
    return prepare(ScienceQA(data), tokenizer_file, tmp_path / "whole", small_config(), on_error="skip").out


class Command:
    """`prep scienceqa` in a process of its own."""

    def __init__(self, tmp_path: Path, data: Path, tokenizer_file: Path):
        recipe = tmp_path / "small.yaml"
        recipe.write_text(json.dumps(small_config().model_dump(mode="json")))
        self.out = tmp_path / "shards"
        self.progress = tmp_path / ".shards.part" / "progress.jsonl"
        options = {"--data": data, "--tokenizer": tokenizer_file, "--out": self.out, "--recipe": recipe}
        words = [str(word) for pair in options.items() for word in pair]
        self.words = [sys.executable, "-c", SMALL_FILES, "prep", "scienceqa", *words, "--on-error", "skip"]

    def finish(self, *more: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run([*self.words, *more], capture_output=True, text=True, timeout=60, **options)

    def stop(self, number: signal.Signals, tasks: int) -> subprocess.CompletedProcess:
        """Starts it with two workers and sends a signal when `tasks` more are finished; checks that all of it ends."""
        before = self.finished_tasks()
        process = subprocess.Popen([*self.words, "--workers", "2"], stderr=subprocess.PIPE, text=True)
        while self.finished_tasks() < before + tasks and process.poll() is None:
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert len(workers) == 3  # two, and multiprocessing's resource tracker
        assert psutil.wait_procs(workers, timeout=5)[1] == []
        return subprocess.CompletedProcess(self.words, process.returncode, stderr=stderr)

    def finished_tasks(self) -> int:
        return self.progress.read_bytes().count(b"\n") - 1 if self.progress.is_file() else 0


@pytest.fixture
def command(tmp_path, data, tokenizer_file):
    return Command(tmp_path, data, tokenizer_file)


def test_the_number_of_workers_does_not_change_a_byte(tmp_path, data, tokenizer_file, uninterrupted):
    out = tmp_path / "three"
    report = prepare(ScienceQA(data), tokenizer_file, out, small_config(), on_error="skip", workers=3)
    assert same_files(out, uninterrupted)
    assert len(report.manifest.splits["train"].files) == 20
    assert report.manifest.splits["train"].rejected == 1


def test_killed_twice_and_run_again_gives_the_bytes_of_an_uninterrupted_run(command, uninterrupted):
    for tasks in (20, 20):  # among the checks, then among the images
        assert command.stop(signal.SIGKILL, tasks).returncode == -signal.SIGKILL
        assert not command.out.exists()
    done = command.finish("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_files"] >= 5
    assert same_files(command.out, uninterrupted)
    assert not command.progress.parent.exists()


def test_sigterm_ends_the_workers_and_keeps_what_is_finished(command):
    stopped = command.stop(signal.SIGTERM, 35)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in stopped.stderr
    assert command.finished_tasks() >= 35


def workers() -> list[psutil.Process]:
    """The pool's living processes; other tests may have left helpers of their own to this one."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # or a zombie, which is one of these
            if any("multiprocessing.spawn" in word for word in child.cmdline()):
                found.append(child)
    return found


def test_a_worker_that_is_killed_is_reported_and_its_work_done_again(tmp_path, data, tokenizer_file, uninterrupted):
    out, config = tmp_path / "shards", small_config()

    def kill_one(stage, done, total):
        if stage == "images" and done:
            for worker in workers()[:1]:
                worker.kill()

    with pytest.raises(UserError, match="worker process was killed.*memory ran out.*fewer --workers"):
        prepare(ScienceQA(data), tokenizer_file, out, config, on_error="skip", workers=2, on_progress=kill_one)
    assert workers() == []
    report = prepare(ScienceQA(data), tokenizer_file, out, config, on_error="skip")
    assert report.resumed and same_files(out, uninterrupted)


def interrupt(data, tokenizer_file, out):
    def stop(stage, done, total):
        if stage == "rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(ScienceQA(data), tokenizer_file, out, small_config(), on_error="skip", on_progress=stop)


def test_an_unfinished_job_of_other_settings_is_refused_unless_restarted(tmp_path, data, tokenizer_file):
    out = tmp_path / "shards"
    interrupt(data, tokenizer_file, out)
    other = small_config(max_length=300)
    with pytest.raises(UserError, match=r"unfinished job.*max_length: 512 there, 300 here.*--restart"):
        prepare(ScienceQA(data), tokenizer_file, out, other, on_error="skip")
    report = prepare(ScienceQA(data), tokenizer_file, out, other, on_error="skip", restart=True)
    assert report.resumed == 0 and load_manifest(out).prompt.max_length == 300


def test_a_half_written_progress_file_and_a_missing_shard_are_done_again(tmp_path, data, tokenizer_file, uninterrupted):
    out = tmp_path / "shards"
    interrupt(data, tokenizer_file, out)
    part = tmp_path / ".shards.part"
    progress = part / "progress.jsonl"
    progress.write_bytes(progress.read_bytes()[:-7])
    (part / "shards" / "images-00001.arrow").unlink()
    (part / "shards" / ".train-00000.arrow.part").write_bytes(b"half")
    prepare(ScienceQA(data), tokenizer_file, out, small_config(), on_error="skip")
    assert same_files(out, uninterrupted)


def test_an_image_that_changed_meanwhile_is_named(tmp_path, data, tokenizer_file):
    folder = shutil.copytree(data, tmp_path / "data")

    def change(stage, done, total):
        if stage == "images" and not done:
            shutil.copy(folder / "images/train/2/image.png", folder / "images/train/1/image.png")

    source, out, config = ScienceQA(folder), tmp_path / "shards", small_config()
    with pytest.raises(UserError, match="images/train/1/image.png was changed while the job ran.*--restart"):
        prepare(source, tokenizer_file, out, config, on_error="skip", on_progress=change)


def test_two_jobs_do_not_write_the_same_shards(tmp_path, data, tokenizer_file):
    def again(stage, done, total):
        prepare(ScienceQA(data), tokenizer_file, tmp_path / "shards", small_config())

    with pytest.raises(UserError, match="Another job is preparing"):
        prepare(ScienceQA(data), tokenizer_file, tmp_path / "shards", small_config(), on_progress=again)


def test_a_disk_that_fills_up_is_one_sentence_and_the_job_goes_on_later(command, uninterrupted):
    limit = 12_000  # bytes a file: the disk's quota, as far as a process can tell
    full = command.finish(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode != 0 and "cannot be written: File too large. Free space" in full.stderr
    assert not command.out.exists()
    assert not list(command.progress.parent.glob("shards/.*"))
    done = command.finish("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_files"] and same_files(command.out, uninterrupted)


def test_a_file_system_that_is_full_is_one_sentence(command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=80k none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system of its own")
    words = [*command.words, "--workers", "2", "--out", str(disk / "shards")]
    script = f'{mount} && "$@"; code=$?; ls -A {disk} {disk}/.shards.part/shards; exit $code'
    full = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *words], capture_output=True, text=True)
    assert full.returncode != 0 and "No space left on device" in full.stderr
    assert "Free space" in full.stderr
    # Whole files stay, to go on with; which ones depends on the worker that filled the disk.
    assert re.search(r"\nimages-\d+\.arrow\n", full.stdout)
    assert "\n.train" not in full.stdout and "\nshards" not in full.stdout
    assert os.listdir(disk) == []
