"""A new kind of data is one file and one line of registration, from the command line to training."""

import json
import os
import subprocess
import sys

import pytest
from data_helpers import small_config

from lavin_ds.config import load_recipe
from lavin_ds.data.collate import collate
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep.sources import SOURCES
from lavin_ds.errors import UserError

TOY = '''"""Riddles: a line each, `question | answer`."""

from dataclasses import dataclass
from pathlib import Path

from lavin_ds.data_prep.records import Listed, Listing, Record, Refused, Source, Text, option
from lavin_ds.data_prep.sources import SOURCES


@dataclass(frozen=True)
class RiddleTurn:
    question: str
    answer: str
    context = ""

    @property
    def response(self):
        return f" {self.answer}!"

    def prompt(self, context):
        return f"Riddle: {self.question}\\nResponse:"


@dataclass(frozen=True)
class Riddles(Source):
    """Riddles, a line each."""

    kind, formats, recipe = "riddles", ("riddle",), "tiny-text"

    file: Path = option("A riddle a line.")
    skip: int = option("Lines to leave out.", 0)

    @property
    def where(self):
        return str(self.file)

    @property
    def root(self):
        return self.file.parent

    def listing(self, prompt):
        lines = self.file.read_text().splitlines()[self.skip :]
        return Listing({"train": [Listed(str(n), line) for n, line in enumerate(lines)]}, {})

    def read(self, listed, prompt):
        question, bar, answer = listed.raw.partition(" | ")
        if not bar:
            raise Refused("line", "has no answer")
        return Record((Text(listed.id, (RiddleTurn(question, answer),)),))


SOURCES[Riddles.kind] = Riddles
'''


@pytest.fixture
def lavin_ds(tmp_path, tokenizer_file):
    """Runs `lavin-ds` in a process that has imported the toy kind."""
    (tmp_path / "riddles.py").write_text(TOY)
    (tmp_path / "riddles.txt").write_text("skipped\nWhat is north? | It is red.\nno answer here\nLook. | Blue.\n")
    config = small_config().model_dump(mode="json")
    config["data"]["prompt_format"] = "riddle"
    (tmp_path / "riddles.yaml").write_text(json.dumps(config))
    main = "import riddles\nfrom lavin_ds.cli.main import run\nrun()"

    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, "-c", main, *map(str, words)], env=environment, capture_output=True, text=True
        )

    return run


def test_a_toy_kind_is_prepared_inspected_and_read_for_training(lavin_ds, tmp_path, tokenizer_file):
    shards = tmp_path / "shards"
    words = ["prep", "riddles", "--file", tmp_path / "riddles.txt", "--tokenizer", tokenizer_file, "--out", shards]
    words += ["--recipe", tmp_path / "riddles.yaml", "--skip", "1", "--workers", "2"]
    refused = lavin_ds(*words)
    assert refused.returncode == 2 and "train 1: line has no answer" in refused.stderr
    done = lavin_ds(*words, "--on-error", "skip", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["rows"] == 2

    reader, tokenizer = ShardReader(shards, "train"), Tokenizer(tokenizer_file)
    assert (reader.manifest.kind, reader.manifest.prompt.format) == ("riddles", "riddle")
    batch = collate([reader.row(0), reader.row(1)], reader.image, reader.frame, 2)
    learnt = batch.labels_BT[1][batch.labels_BT[1] > 0].tolist()
    assert batch.row_ids == ["0", "2"] and tokenizer.decode(learnt) == "Blue.!"

    shown = lavin_ds("prep", "inspect", "--data", shards, "--recipe", tmp_path / "riddles.yaml")
    assert shown.returncode == 0, shown.stderr
    assert "riddles, schema" in shown.stdout and "Riddle: What is north?" in shown.stdout


def test_every_kind_says_what_it_is_and_has_a_recipe_of_one_of_its_formats():
    for kind, source in SOURCES.items():
        assert source.kind == kind and source.__doc__
        assert load_recipe(source.recipe).data.prompt_format in source.formats


def test_a_format_that_no_kind_has_is_refused_when_the_recipe_is_read():
    message = r"prompt_format: 'QCM-ALEE' is not .* Did you mean QCM-ALE\? scienceqa has QCM-A, .*captions has caption"
    with pytest.raises(UserError, match=message):
        load_recipe("lavin-7b", ["data.prompt_format=QCM-ALEE"])


def test_a_format_is_refused_without_torch_or_arrow():
    code = (
        "import sys\nfrom lavin_ds.config import load_recipe\n"
        "try: load_recipe('lavin-7b', ['data.prompt_format=x'])\n"
        "except Exception as error: print(type(error).__name__, sorted({'torch', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "UserError []", done.stderr
