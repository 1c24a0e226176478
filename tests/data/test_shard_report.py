import json

import numpy as np
import pytest
from data_helpers import record, small_config, write_scienceqa
from rich.console import Console
from typer.testing import CliRunner

from lavin_ds.cli import prep_inspect
from lavin_ds.cli.main import app
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.data_prep.shard_report import make_report, view
from lavin_ds.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer_file):
    """Nine rows, three with an image; a tenth is rejected."""
    folder = tmp_path_factory.mktemp("inspect")
    problems = {f"q{i}": record(image="image.png" if i % 3 == 0 else None, hint="north " * i) for i in range(9)}
    problems["bad"] = record(answer=7)
    data = write_scienceqa(folder / "source", problems)
    prepare(ScienceQA(data), tokenizer_file, folder / "shards", small_config(), on_error="skip")
    return folder / "shards"


def test_counts_are_those_of_the_rows(shards):
    report = make_report(shards, global_batch=4, micro_batch=2)
    train = report.splits["train"]
    assert (train.rows, train.rows_text, train.rows_image, train.trainable) == (9, 6, 3, 9)
    assert sum(train.histogram_text) == 6 and sum(train.histogram_image) == 3
    views = [view(shards, "train", str(i)) for i in range(9)]
    assert train.longest == max(len(v.tokens) for v in views)
    labelled = sum(token.kind == "label" for v in views for token in v.tokens)
    assert train.label_share == pytest.approx(labelled / sum(len(v.tokens) for v in views))
    assert report.rejects == {"answer": 1} and train.rejected == 1
    assert [p.ranks for p in report.padding] == [1, 2, 8] and report.padding[2].sampler is None
    assert report.padding[0].to_max_length < report.padding[0].sampler <= 1 == report.padding[0].packed
    assert report.padding[0].with_waiting == report.padding[0].sampler  # one rank waits for nobody
    assert report.padding[1].with_waiting <= report.padding[1].sampler


def test_the_last_bin_has_the_longest_sample(shards):
    report = make_report(shards)
    train = report.splits["train"]
    rows = np.add(train.histogram_text, train.histogram_image)
    last = np.flatnonzero(rows)[-1]
    assert rows.sum() == 9 and last * report.bin_width < train.longest <= (last + 1) * report.bin_width


def test_prep_and_inspect_count_alike(tmp_path, tokenizer_file):
    words = {f"q{i}": record(hint="north " * i) for i in range(4)}
    source = write_scienceqa(tmp_path / "source", words)
    made = prepare(ScienceQA(source), tokenizer_file, tmp_path / "shards", small_config())
    train = make_report(tmp_path / "shards").splits["train"]
    assert (made.median_positions["train"], made.max_positions["train"]) == (train.median, train.longest)
    assert train.median == sorted(len(view(tmp_path / "shards", "train", f"q{i}").tokens) for i in range(4))[1]


def test_a_sample_is_shown_as_the_model_sees_it(shards):
    shown = view(shards, "train", "q3")
    kinds = [kind for kind, _, _ in shown.spans()]
    assert kinds == ["modality token", "BOS", "prefix", "visual slot", "prompt", "label"]
    spans = {kind: (first, last) for kind, first, last in shown.spans()}
    assert spans["modality token"] == (0, 0) and spans["visual slot"][1] - spans["visual slot"][0] == 1
    text = prep_inspect.token_text(shown, brackets=True).plain
    assert text.startswith("[t_m:image][BOS] Image: [v0][v1] Question: Which colour is it?↵\nContext: north")
    assert text.endswith("⟦ The answer is B. BECAUSE: Maps have directions. It is blue.</s>⟧")
    assert shown.pixels.shape == (8, 8, 3) and shown.source == "images/train/q3/image.png"
    words = view(shards, "train", "q1")
    assert words.pixels is None and [k for k, _, _ in words.spans()][2:] == ["prefix", "prompt", "label"]
    assert prep_inspect.token_text(words, brackets=True).plain.startswith("[t_m:text][BOS] Image: N/A Question:")


def test_a_sample_that_is_not_there_is_refused(shards):
    assert view(shards, "train").id == "q0" == view(shards, "train", "0").id
    with pytest.raises(UserError, match="no sample 'q99': give one of its ids, such as q0, or a row's number below 9"):
        view(shards, "train", "q99")


def test_a_picture_becomes_coloured_half_blocks():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[:2] = (255, 0, 0)
    lines = prep_inspect.half_blocks(pixels, 4)
    assert lines.plain == "▀▀▀▀\n▀▀▀▀\n"
    console = Console(force_terminal=True, color_system="truecolor", width=20)
    with console.capture() as captured:
        console.print(lines)
    assert "38;2;255;0;0;48;2;255;0;0m" in captured.get() and "38;2;0;0;0;48;2;0;0;0m" in captured.get()


def test_the_command_prints_tables_json_and_a_png(shards, tmp_path):
    run = CliRunner().invoke
    png = tmp_path / "lengths.png"
    shown = run(app, ["prep", "inspect", "--data", str(shards), "--png", str(png)])
    assert shown.exit_code == 0, shown.output
    assert "1 for answer" in shown.stdout and "train rows by positions" in shown.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    told = run(app, ["prep", "inspect", "--data", str(shards), "--json", "--recipe", "tiny", "--sample", "q4"])
    found = json.loads(told.stdout)
    assert found["splits"]["train"]["rows"] == 9 and found["sample"]["id"] == "q4"
    assert "data.max_length: shards 512, recipe 128" in found["disagreements"]
