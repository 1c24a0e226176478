import io
import json

import pytest
from data_helpers import png_claiming, record, small_config, write_scienceqa
from PIL import Image
from typer.testing import CliRunner

from lavin_ds.cli import prep
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep import pipeline
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.errors import UserError


def problems(**changes) -> dict[str, dict]:
    """Three records with their own pictures; `changes` replace or add to keys of the second."""
    good = {pid: record(image="image.png") for pid in ("10", "11", "12")}
    good["11"].update(changes)
    return good


def prepare(tmp_path, tokenizer_file, data=None, splits="", **options):
    config = options.pop("config", small_config())
    data = data or write_scienceqa(tmp_path / "data", problems())
    return pipeline.prepare(ScienceQA(data, splits), tokenizer_file, tmp_path / "shards", config, **options)


def test_shards_stand_alone_and_say_what_they_are(tmp_path, tokenizer_file):
    report = prepare(tmp_path, tokenizer_file)
    names = sorted(path.name for path in report.out.iterdir())
    assert names == ["images-00000.arrow", "manifest.json", "tokenizer.model", "train-00000.arrow"]
    manifest = report.manifest
    assert manifest.tokenizer.sha256 == Tokenizer(report.out / "tokenizer.model").sha256
    assert (manifest.images.size, manifest.images.resize, manifest.images.rows) == (8, "squash", 3)
    split = manifest.splits["train"]
    assert (split.rows, split.images, split.lengths.whole, split.rejected) == (3, 3, 3, 0)
    assert report.max_positions["train"] == 1 + ShardReader(report.out, "train").lengths(2).max()


def test_the_same_data_gives_the_same_bytes(tmp_path, tokenizer_file):
    data = write_scienceqa(tmp_path / "data", problems())
    for name in "ab":
        pipeline.prepare(ScienceQA(data), tokenizer_file, tmp_path / name, small_config())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_splits_are_those_of_the_standard_ones_that_exist_or_those_asked_for(tmp_path, tokenizer_file):
    splits = {"train": ["10"], "val": ["11"], "minival": ["11"]}
    data = write_scienceqa(tmp_path / "data", problems(), splits)
    report = prepare(tmp_path, tokenizer_file, data)
    assert list(report.manifest.splits) == ["train", "val"]
    report = prepare(tmp_path, tokenizer_file, data, splits="minival", overwrite=True)
    assert ShardReader(report.out, "minival").row(0).id == "11"
    with pytest.raises(UserError, match="no split 'nope'.*train, val, minival"):
        prepare(tmp_path, tokenizer_file, data, splits="nope", overwrite=True)


def test_captions_are_read_where_the_recipe_wants_them(tmp_path, tokenizer_file):
    data = write_scienceqa(tmp_path / "data", problems())
    with pytest.raises(UserError, match="captions.json cannot be read"):
        prepare(tmp_path, tokenizer_file, data, config=small_config(captions=True))
    (data / "captions.json").write_text(json.dumps({"captions": {"10": "Two stars."}}))
    report = prepare(tmp_path, tokenizer_file, data, config=small_config(captions=True))
    reader, tokenizer = ShardReader(report.out, "train"), Tokenizer(tokenizer_file)
    texts = [tokenizer.decode(reader.row(i).token_ids) for i in range(2)]
    assert "Context: Look at the picture. Two stars.\n" in texts[0] and "Two stars" not in texts[1]


def test_a_recipe_without_vision_reads_no_image_but_knows_who_had_one(tmp_path, tokenizer_file):
    data = write_scienceqa(tmp_path / "data", problems())
    (data / "images/train/10/image.png").write_bytes(b"broken")
    report = prepare(tmp_path, tokenizer_file, data, config=small_config(vision=False))
    row = ShardReader(report.out, "train").row(0)
    assert report.manifest.images is None and (row.image, row.has_image) == (-1, True)


BAD_RECORDS = [
    ({"answer": None}, "train 11: answer is refused"),
    ({"answer": "1"}, "train 11: answer is refused"),
    ({"answer": 2}, "train 11: answer is 2, beyond its 2 choices"),
    ({"answer": -1}, "train 11: answer is refused"),
    ({"choices": []}, "train 11: choices is refused"),
    ({"question": None}, "train 11: question is refused"),
    ({"question": "\ud800"}, "train 11: question is refused"),
    ({"split": "../elsewhere", "image": None}, None),
]


@pytest.mark.parametrize(("change", "message"), BAD_RECORDS)
def test_a_bad_record_stops_the_job_and_is_named(tmp_path, tokenizer_file, change, message):
    data = write_scienceqa(tmp_path / "data", problems(**change), {"train": ["10", "11", "12"]})
    if message is None:  # harmless without an image
        assert prepare(tmp_path, tokenizer_file, data).manifest.splits["train"].rows == 3
        return
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, tokenizer_file, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_record_without_an_answer_is_named(tmp_path, tokenizer_file):
    bad = problems()
    del bad["11"]["answer"]
    with pytest.raises(UserError, match="train 11: answer is missing"):
        prepare(tmp_path, tokenizer_file, write_scienceqa(tmp_path / "data", bad))


def damaged(tmp_path, fault: str):
    """A data folder in which id 11 has one fault."""
    splits = {"train": ["10", "11", "12"]}
    if fault == "twice":
        splits["train"].append("11")
    if fault == "absent":
        splits["train"].append("99")
    if fault == "path in id":
        splits["train"].append("../data")
    data = write_scienceqa(tmp_path / "data", problems(), splits)
    path = data / "images/train/11/image.png"
    if fault == "missing":
        path.unlink()
    if fault == "truncated":
        buffer = io.BytesIO()
        Image.effect_noise((80, 80), 90).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue()[:900])
    if fault == "bomb":
        path.write_bytes(png_claiming(20_000, 20_000))
    if fault in ("path in image", "path in split"):
        raw = json.loads((data / "problems.json").read_text())
        raw["11"][fault.split()[-1]] = "../../../../etc/passwd"
        (data / "problems.json").write_text(json.dumps(raw))
    return data


FAULTS = {
    "twice": "train 11: id appears twice",
    "absent": "train 99: id is not in problems.json",
    "path in id": "train ../data: id is not a plain file name",
    "missing": "train 11: image .*images/train/11/image.png is missing",
    "truncated": "train 11: image .*image.png cannot be decoded",
    "bomb": "train 11: image .*image.png (is a decompression bomb|has 20000 x 20000)",
    "path in image": "train 11: image '../../../../etc/passwd' is not a plain relative path",
    "path in split": "train 11: split '../../../../etc/passwd' is not a plain relative path",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_folder_stops_the_job_and_leaves_nothing(tmp_path, tokenizer_file, fault):
    data = damaged(tmp_path, fault)
    with pytest.raises(UserError, match=FAULTS[fault]) as caught:
        prepare(tmp_path, tokenizer_file, data)
    assert "--on-error skip" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("fault", FAULTS)
def test_skip_leaves_bad_records_out_and_writes_them_down(tmp_path, tokenizer_file, fault):
    report = prepare(tmp_path, tokenizer_file, damaged(tmp_path, fault), on_error="skip")
    [reject] = [json.loads(line) for line in (report.out / "rejects.jsonl").read_text().splitlines()]
    assert (reject["split"], set(reject)) == ("train", {"split", "id", "key", "reason"})
    assert report.manifest.splits["train"].rejected == 1
    ids = [ShardReader(report.out, "train").row(i).id for i in range(report.manifest.splits["train"].rows)]
    assert set(ids) <= {"10", "11", "12"} and len(ids) == len(set(ids)) >= 2


def test_offenders_are_listed_up_to_twenty_and_then_counted(tmp_path, tokenizer_file):
    bad = {str(i): record(answer=9) for i in range(25)}
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer_file, write_scienceqa(tmp_path / "data", bad))
    message = str(caught.value)
    assert message.startswith("25 bad records") and message.count("beyond its") == 20
    assert "and 5 more" in message and "train 19" in message and "train 20" not in message


def test_nothing_left_to_write_is_an_error_even_when_skipping(tmp_path, tokenizer_file):
    data = write_scienceqa(tmp_path / "data", {"1": record(answer=9)})
    with pytest.raises(UserError, match="No record of split 'train'"):
        prepare(tmp_path, tokenizer_file, data, on_error="skip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("problems.json", None, "problems.json cannot be read"),
        ("problems.json", b'{"1": {"question": "\xff"}}', "problems.json is not valid UTF-8 at byte 20"),
        ("problems.json", b'{"1": ', "problems.json is not valid JSON"),
        ("problems.json", b"[]", "problems.json must hold a JSON mapping, but holds a list"),
        ("problems.json", b'{"1": 1}\n{"2": 2}\n', "problems.json is JSON Lines, but must be a single JSON mapping"),
        ("problems.json", b'{"1": 1, "1": 2}', "the key '1' appears twice"),
        ("problems.json", b"[" * 100_000, "problems.json is not valid JSON"),
        ("pid_splits.json", b'{"train": []}', "train is empty"),
        ("pid_splits.json", b'{"train": [1]}', "train must be a list of ids in quotes"),
        ("pid_splits.json", b'{"other": ["1"]}', "no train, val or test"),
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path, tokenizer_file, name, content, message):
    data = write_scienceqa(tmp_path / "data", problems())
    if content is None:
        (data / name).unlink()
    else:
        (data / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, tokenizer_file, data)


def test_an_existing_directory_is_only_replaced_when_asked_and_only_if_it_is_shards(tmp_path, tokenizer_file):
    out = tmp_path / "shards"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty.*--overwrite"):
        prepare(tmp_path, tokenizer_file)
    with pytest.raises(UserError, match="not a shard directory"):
        prepare(tmp_path, tokenizer_file, overwrite=True)
    assert (out / "precious.txt").exists()


def test_a_failed_overwrite_leaves_the_old_shards(tmp_path, tokenizer_file):
    report = prepare(tmp_path, tokenizer_file)
    before = (report.out / "manifest.json").read_bytes()
    bad = write_scienceqa(tmp_path / "bad", {"1": record(answer=9)})
    with pytest.raises(UserError):
        prepare(tmp_path, tokenizer_file, bad, overwrite=True)
    assert (report.out / "manifest.json").read_bytes() == before
    prepare(tmp_path, tokenizer_file, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "data", "shards"]


def test_overlength_error_names_the_samples_and_the_keys_to_change(tmp_path, tokenizer_file):
    data = write_scienceqa(tmp_path / "data", {"1": record(), "2": record(lecture="directions " * 300)})
    with pytest.raises(UserError, match=r"(?s)train 2: length is \d+ tokens over.*data.overlength"):
        prepare(tmp_path, tokenizer_file, data, config=small_config(overlength="error"))


def test_samples_too_long_to_train_on_are_counted_and_written_down(tmp_path, tokenizer_file):
    data = write_scienceqa(tmp_path / "data", {"1": record(), "2": record(lecture="directions " * 300)})
    report = prepare(tmp_path, tokenizer_file, data)
    lengths = report.manifest.splits["train"].lengths
    assert (lengths.whole, lengths.evaluation_only) == (1, 1)
    assert "; its prompt is kept" in (report.out / "rejects.jsonl").read_text()


def test_a_tokenizer_that_the_base_has_no_rows_for_is_refused(tmp_path, tokenizer_file):
    with pytest.raises(UserError, match="has 340 pieces, but the recipe's model.llm.vocab_size is 320"):
        prepare(tmp_path, tokenizer_file, config=small_config(vocab_size=320))


def test_progress_reaches_the_total(tmp_path, tokenizer_file):
    seen = []
    prepare(tmp_path, tokenizer_file, on_progress=lambda *step: seen.append(step))
    assert {(stage, 3, 3) for stage in ("check", "images", "rows")} <= set(seen)


@pytest.fixture
def command(tmp_path, tokenizer_file):
    """Runs `prep scienceqa` with a small recipe and further arguments."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(small_config().model_dump(mode="json")))
    data = write_scienceqa(tmp_path / "data", problems())
    options = {
        "--data": data,
        "--tokenizer": tokenizer_file,
        "--out": tmp_path / "shards",
        "--recipe": recipe,
    }
    base = ["scienceqa", *(str(part) for pair in options.items() for part in pair)]
    return lambda *more: CliRunner().invoke(prep.app, [*base, *more])


def test_command_prints_json_alone_on_stdout(command):
    result = command("--json", "--splits", "train", "data.max_length=256")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["splits"]["train"]["rows"] == 3 and summary["images"] == 3 and summary["bytes"] > 0


def test_command_prints_a_row_a_split(command):
    result = command()
    assert result.exit_code == 0, result.output
    assert "train" in result.stdout and "median" in result.stdout


def test_command_raises_user_errors_for_the_main_program_to_print(command):
    result = command("--splits", "nope")
    assert isinstance(result.exception, UserError) and "no split 'nope'" in str(result.exception)


def test_the_whole_real_set_is_prepared_and_reads_well(tmp_path, shared):
    tokenizer_file = shared / "data/tokenizer/llama-32k.model"
    config = small_config(vocab_size=32000)
    report = prepare(tmp_path, tokenizer_file, shared / "data/scienceqa", config=config)
    rows = {name: (split.rows, split.images) for name, split in report.manifest.splits.items()}
    assert rows == {"train": (1088, 547), "val": (371, 191), "test": (130, 77)}
    tokenizer, reader = Tokenizer(tokenizer_file), ShardReader(report.out, "train")
    row = reader.row(0)
    assert row.id == "1"
    assert tokenizer.decode(row.token_ids).startswith(
        "Question: Which of these states is farthest north?\nContext: N/A\n"
        "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma\n"
        "Response: The answer is A. BECAUSE: Maps have four cardinal directions"
    )
    assert tokenizer.decode(row.prompt_ids).endswith("(D) Oklahoma\nResponse:")
    assert reader.lengths(2).max() <= 511
