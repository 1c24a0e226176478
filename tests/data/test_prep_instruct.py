import json

import pytest
from data_helpers import small_config
from PIL import Image
from typer.testing import CliRunner

from lavin_ds.cli import prep
from lavin_ds.config import load_recipe
from lavin_ds.data.schema import check_manifest
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep import pipeline
from lavin_ds.data_prep.instruct import Instruct
from lavin_ds.errors import UserError

ALPACA = [
    {"instruction": "Which is north?", "input": "A map.", "output": "It is red."},
    {"instruction": "Look.", "input": "", "output": "Maps have directions."},
]


def said(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


LLAVA = [
    {"id": "7", "image": "a/1.jpg", "conversations": said("<image>\nWhich colour?", "Red.", "And north?", "Blue.")},
    {"id": "7", "image": "a/1.jpg", "conversations": said("Look at the map.\n<image>", "A map of the states.")},
    {"id": "8", "conversations": said("Is it north?", "The answer is B.")},
]


def write(folder, alpaca=ALPACA, llava=LLAVA):
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "llava.json").write_text(json.dumps(llava))
    (folder / "images/a").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (9, 100, 200)).save(folder / "images/a/1.jpg")
    return folder


def prepare(folder, tokenizer_file, turns="single-turn", **options):
    config = options.pop("config", small_config(prompt_format=turns))
    images = options.pop("images", folder / "images")
    source = Instruct((folder / "alpaca.json",), (folder / "llava.json",), images)
    return pipeline.prepare(source, tokenizer_file, folder / "shards", config, **options)


def texts(report, tokenizer_file) -> dict[str, tuple[str, list[str]]]:
    """By row id: the prompt of evaluation, and what is learnt."""
    reader, tokenizer = ShardReader(report.out, "train"), Tokenizer(tokenizer_file)
    rows = [reader.row(i) for i in range(len(reader))]
    learnt = [[tokenizer.decode(row.token_ids[a:b]) for a, b in row.label_spans] for row in rows]
    return {row.id: (tokenizer.decode(row.prompt_ids), one) for row, one in zip(rows, learnt, strict=True)}


def test_single_turns_are_samples_of_their_own_each_with_the_image(tmp_path, tokenizer_file):
    report = prepare(write(tmp_path), tokenizer_file)
    assert texts(report, tokenizer_file) == {
        "alpaca-0": ("Instruction: Which is north? A map.\nResponse:", ["It is red."]),
        "alpaca-1": ("Instruction: Look.\nResponse:", ["Maps have directions."]),
        "llava-0": ("Instruction: Which colour?\nResponse:", ["Red."]),
        "llava-0.1": ("Instruction: And north?\nResponse:", ["Blue."]),
        "llava-1": ("Instruction: Look at the map.\nResponse:", ["A map of the states."]),
        "llava-2": ("Instruction: Is it north?\nResponse:", ["The answer is B."]),
    }
    split, reader = report.manifest.splits["train"], ShardReader(report.out, "train")
    assert (split.records, split.rows, split.images, report.manifest.images.rows) == (5, 6, 3, 1)
    assert [reader.row(i).image for i in range(6)] == [-1, -1, 0, 0, 0, -1]


def test_whole_conversations_learn_every_reply(tmp_path, tokenizer_file):
    found = texts(prepare(write(tmp_path), tokenizer_file, "conversation"), tokenizer_file)
    assert found["llava-0"] == ("Instruction: Which colour?\nResponse:", ["Red.", "Blue."])
    assert list(found) == ["alpaca-0", "alpaca-1", "llava-0", "llava-1", "llava-2"]


BAD = {
    "no answer": ("alpaca", {"instruction": "Look."}, "train alpaca-1: output is missing"),
    "empty answer": (
        "alpaca",
        {"instruction": "Look.", "output": " "},
        "alpaca-1: output is empty: there is no answer",
    ),
    "half a character": ("alpaca", {"instruction": "\ud800", "output": "x"}, "alpaca-1: instruction is refused"),
    "not a record": ("alpaca", 7, "alpaca-1: record is refused"),
    "no reply": ("llava", {"conversations": said("Look.")}, "llava-1: conversations is refused"),
    "empty reply": ("llava", {"conversations": said("Look.", "")}, "llava-1: conversations have an empty reply"),
    "gpt first": ("llava", {"conversations": said("a", "b")[::-1]}, "llava-1: conversations do not alternate"),
    "half a turn": ("llava", {"conversations": said("a", "b", "c")}, "llava-1: conversations do not alternate"),
    "other speaker": (
        "llava",
        {"conversations": [{"from": "x", "value": "y"}] * 2},
        "llava-1: conversations.0.from is",
    ),
    "mark without image": ("llava", {"conversations": said("<image>", "b")}, "llava-1: image is missing"),
    "leaves": (
        "llava",
        {"image": "../alpaca.json", "conversations": said("a", "b")},
        "llava-1: image .* is not a plain relative path",
    ),
    "absolute": (
        "llava",
        {"image": "/etc/passwd", "conversations": said("a", "b")},
        "llava-1: image .* is not a plain relative path",
    ),
    "two images": ("llava", {"image": ["a", "b"], "conversations": said("a", "b")}, "llava-1: image is refused"),
    "absent": ("llava", {"image": "a/2.jpg", "conversations": said("a", "b")}, "llava-1: image .*2.jpg is missing"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_record_is_named_or_skipped(tmp_path, tokenizer_file, fault):
    kind, raw, message = BAD[fault]
    records = {"alpaca": list(ALPACA), "llava": list(LLAVA)}
    records[kind][1] = raw
    write(tmp_path, **records)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, tokenizer_file)
    report = prepare(tmp_path, tokenizer_file, on_error="skip")
    assert report.manifest.splits["train"].rejected == 1
    assert len((report.out / "rejects.jsonl").read_text().splitlines()) == 1


def test_images_that_are_all_missing_may_be_of_another_folder(tmp_path, tokenizer_file):
    records = [{"image": f"{n}.jpg", "conversations": said("a", "b")} for n in range(3)]
    write(tmp_path, llava=records)
    with pytest.raises(UserError) as error:
        prepare(tmp_path, tokenizer_file)
    first, *listed, last = str(error.value).splitlines()
    assert first.startswith("3 bad records in ") and len(listed) == 3 and "llava-1: image " in listed[1]
    assert "or do their paths start from another folder than " in last


def test_images_without_their_folder_are_refused(tmp_path, tokenizer_file):
    write(tmp_path)
    with pytest.raises(UserError, match="llava-0: image is given, but --images is not"):
        prepare(tmp_path, tokenizer_file, images=None)
    with pytest.raises(UserError, match="is not a folder"):
        prepare(tmp_path, tokenizer_file, images=tmp_path / "elsewhere")


def test_files_that_cannot_be_told_apart_or_hold_nothing_are_refused(tmp_path, tokenizer_file):
    write(tmp_path, llava=[])
    with pytest.raises(UserError, match="llava.json is empty"):
        prepare(tmp_path, tokenizer_file)
    file, out, config = tmp_path / "alpaca.json", tmp_path / "shards", small_config(prompt_format="single-turn")
    lines = tmp_path / "lines.json"
    lines.write_text('{"instruction": "a", "output": "b"}\n' * 2)
    with pytest.raises(UserError, match=r"is JSON Lines, .* `jq -s \. lines.json > list.json` makes one"):
        pipeline.prepare(Instruct((lines,)), tokenizer_file, out, config)
    with pytest.raises(UserError, match="2 files are named alpaca"):
        pipeline.prepare(Instruct((file, file)), tokenizer_file, out, config)
    with pytest.raises(UserError, match="nothing to prepare"):
        pipeline.prepare(Instruct(), tokenizer_file, out, config)


def test_recipe_and_data_must_be_of_one_kind(tmp_path, tokenizer_file):
    report = prepare(write(tmp_path), tokenizer_file)
    [found] = check_manifest(report.manifest, small_config())
    assert found == "data.prompt_format: shards single-turn, recipe QCM-ALE"
    assert check_manifest(report.manifest, small_config(prompt_format="single-turn")) == []
    with pytest.raises(UserError, match="data.prompt_format is QCM-ALE.*chatbot-13b"):
        prepare(tmp_path, tokenizer_file, config=small_config())
    with pytest.raises(UserError, match="authors train single turns"):
        prepare(tmp_path, tokenizer_file, config=small_config(prompt_format="conversation", compat="lavin-official"))


def test_chatbot_recipes_differ_from_scienceqa_in_epochs_and_text_alone():
    for size in ("7b", "13b"):
        chat, questions = load_recipe(f"chatbot-{size}"), load_recipe(f"lavin-{size}")
        assert chat.model == questions.model
        assert (chat.training.epochs, chat.training.warmup_epochs) == (15, 0.2)
        own = {"epochs", "warmup_epochs", "validate_every", "validation_samples"}  # it has no split to validate on
        assert chat.training.model_dump(exclude=own) == questions.training.model_dump(exclude=own)
        assert chat.data.model_copy(update={"prompt_format": "QCM-ALE"}) == questions.data


def test_command_counts_records_apart_from_rows(tmp_path, tokenizer_file):
    write(tmp_path)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(small_config(prompt_format="single-turn").model_dump(mode="json")))
    files = ["--alpaca", tmp_path / "alpaca.json", "--llava", tmp_path / "llava.json", "--images", tmp_path / "images"]
    more = ["--tokenizer", tokenizer_file, "--out", tmp_path / "out", "--recipe", recipe, "--workers", "1"]
    words = ["instruct", *map(str, [*files, *more])]
    shown = CliRunner().invoke(prep.app, words)
    assert shown.exit_code == 0, shown.output
    assert "records" in shown.stdout
    printed = CliRunner().invoke(prep.app, [*words, "--overwrite", "--json"])
    train = json.loads(printed.stdout)["splits"]["train"]
    assert (train["records"], train["rows"], train["images"]) == (5, 6, 3)


def test_real_alpaca_and_llava_records_mix(tmp_path, shared):
    tokenizer_file = shared / "data/tokenizer/llama-32k.model"
    alpaca, llava = shared / "data/alpaca/alpaca_en_demo.json", shared / "data/llava_pretrain"
    config = small_config(prompt_format="single-turn", vocab_size=32000)
    source = Instruct((alpaca,), (llava / "blip_laion_cc_sbu_120.json",), llava / "images")
    report = pipeline.prepare(source, tokenizer_file, tmp_path / "shards", config)
    split = report.manifest.splits["train"]
    assert (split.records, split.images, report.manifest.images.rows) == (999 + 120, 120, 120)
    found = texts(report, tokenizer_file)["blip_laion_cc_sbu_120-0"]
    assert found == ("Instruction: Provide a brief description of the given image.\nResponse:", ["the bunk room"])
