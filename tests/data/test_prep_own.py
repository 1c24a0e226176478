import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from data_helpers import small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavin_ds.config import load_recipe
from lavin_ds.data.schema import PromptSettings
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep import pipeline
from lavin_ds.data_prep.own import Own, _given_splits
from lavin_ds.data_prep.records import Listed, Refused
from lavin_ds.errors import UserError

GUIDE = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text(encoding="utf-8")


def said(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def sharegpt(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def asks_about(image: str, kind: str = "image_url") -> list[dict]:
    """A user's message of an image and a question, and the reply."""
    address = {"url": image} if kind == "image_url" else image
    return [
        {"role": "user", "content": [{"type": kind, kind: address}, {"type": "text", "text": "Which colour?"}]},
        {"role": "assistant", "content": "Red."},
    ]


def write(folder: Path, *records, name="own.jsonl") -> Path:
    (folder / "a").mkdir(exist_ok=True)
    for number, image in enumerate(("1.jpg", "2.jpg")):
        Image.new("RGB", (12, 10), (90 * number, 100, 200)).save(folder / "a" / image)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def prepare(file: Path, tokenizer_file, format="conversation", images=None, **options):
    own = {key: options.pop(key) for key in ("val_fraction", "seed") if key in options}
    config = small_config(prompt_format=format)
    return pipeline.prepare(Own(file, images, **own), tokenizer_file, file.parent / "shards", config, **options)


def texts(report, tokenizer_file, split="train") -> dict[str, tuple[str, list[str], int]]:
    """By row id: the first prompt, what is learnt, and the image's row."""
    reader, tokenizer = ShardReader(report.out, split), Tokenizer(tokenizer_file)
    rows = [reader.row(i) for i in range(len(reader))]
    learnt = [[tokenizer.decode(row.token_ids[a:b]) for a, b in row.label_spans] for row in rows]
    prompts = [re.fullmatch(r"(?s)Instruction: (.*)\nResponse:", tokenizer.decode(row.prompt_ids))[1] for row in rows]
    return {row.id: found for row, *found in zip(rows, prompts, learnt, [row.image for row in rows], strict=True)}


QUESTION, MARK = {"type": "text", "text": "Which colour?"}, {"type": "image"}
REPLY = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
OPENAI_NAMES = [{"from": "user", "value": "Which colour?"}, {"from": "assistant", "value": "Red."}]
LAYOUTS = {
    "image_url": {"messages": asks_about("a/1.jpg")},
    "image_url as text": {
        "messages": [{"role": "user", "content": [QUESTION, {"type": "image_url", "image_url": "a/1.jpg"}]}, REPLY]
    },
    "image part": {"messages": asks_about("./a/1.jpg", "image")},
    "mark and images": {"messages": said("<image>\nWhich colour?", "Red."), "images": ["a/1.jpg"]},
    "part that marks": {"messages": [{"role": "user", "content": [MARK, QUESTION]}, REPLY], "image": "a/1.jpg"},
    "sharegpt": {"conversations": sharegpt("Which colour?\n<image>", "Red."), "image": "a/1.jpg"},
    "sharegpt with OpenAI's names": {"conversations": OPENAI_NAMES, "image": ["a/1.jpg"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(tmp_path, tokenizer_file, layout):
    report = prepare(write(tmp_path, LAYOUTS[layout]), tokenizer_file)
    assert texts(report, tokenizer_file) == {"own.jsonl:1": ["Which colour?", ["Red."], 0]}
    assert report.manifest.kind == "own"


def test_every_reply_is_learnt_and_a_system_message_is_before_the_first_instruction(tmp_path, tokenizer_file):
    system = {"role": "system", "content": "Look."}
    file = write(
        tmp_path,
        {"messages": [system, *said("Which colour?", "Red.", "And north?", "Blue.")]},
        "",
        {"messages": said("a", "b")},
    )
    whole = texts(prepare(file, tokenizer_file, val_fraction=0), tokenizer_file)
    assert whole == {"own.jsonl:1": ["Look.\nWhich colour?", ["Red.", "Blue."], -1], "own.jsonl:3": ["a", ["b"], -1]}
    single = texts(prepare(file, tokenizer_file, "single-turn", val_fraction=0, overwrite=True), tokenizer_file)
    assert single["own.jsonl:1.1"] == ["And north?", ["Blue."], -1]


def test_a_json_list_is_read_too_and_images_may_be_elsewhere(tmp_path, tokenizer_file):
    write(tmp_path)
    folder = tmp_path / "list"
    folder.mkdir()
    file = folder / "own.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([LAYOUTS["sharegpt"]]).encode())
    report = prepare(file, tokenizer_file, images=tmp_path)
    assert list(texts(report, tokenizer_file)) == ["own.json[0]"]
    with pytest.raises(UserError, match="image .*list/a/1.jpg is missing"):
        prepare(file, tokenizer_file, overwrite=True)


LATE = [*said("a", "b"), {"role": "system", "content": "c"}]
TOOL = [*said("a"), {"role": "assistant", "content": None, "tool_calls": [1]}]
NOT_LEARNT = [*said("a"), {"role": "assistant", "content": "b", "weight": 0}]
TWO = ["a/1.jpg", "a/2.jpg"]
BAD = {
    "no reply": ({"messages": said("Look.")}, "messages must alternate .* the roles are user$"),
    "reply first": ({"messages": said("a", "b")[::-1]}, "messages must alternate"),
    "late system": (
        {"messages": LATE},
        "the roles are user, assistant, system",
    ),
    "empty instruction": ({"messages": said(" ", "b")}, "messages have an empty instruction"),
    "empty reply": ({"messages": said("a", "")}, "messages have an empty reply"),
    "other role": ({"messages": [{"role": "tool", "content": "a"}]}, r'messages\[0\].role is "tool"'),
    "tool call": (
        {"messages": TOOL},
        "calls a tool",
    ),
    "not learnt": (
        {"messages": NOT_LEARNT},
        r"\[1\].weight is 0",
    ),
    "no content": ({"messages": [*said("a"), {"role": "assistant", "content": None}]}, "neither a text nor a list"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 'content.0. is of type "audio"'),
    "other speaker": ({"conversations": [{"from": "x", "value": "y"}]}, r'conversations\[0\].from is "x"'),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    "mark without image": ({"messages": said("<image>a", "b")}, "image is missing, but the conversation has <image>"),
    "two images": (
        {"messages": said("a", "b"), "images": TWO},
        "image is given 2 times: a record may",
    ),
    "two marks": ({"messages": said("<image><image>a", "b"), "image": "a/1.jpg"}, "image is given 2 times"),
    "remote": (
        {"messages": asks_about("https://x.org/1.jpg")},
        r'\[0\] is a URL, "https://x.org/1.jpg"',
    ),
    "file address": ({"messages": asks_about("file:///etc/passwd")}, "is a URL"),
    "data URL": ({"messages": asks_about("data:image/png;base64,AA")}, "is a data URL: save the image as a file"),
    "absolute": ({"messages": said("a", "b"), "image": "/etc/passwd"}, "is an absolute path, .* relative to --images"),
    "backslash": ({"messages": said("a", "b"), "image": "a\\1.jpg"}, "image has backslashes"),
    "leaves": ({"messages": said("a", "b"), "image": "a/../../x.jpg"}, "image .* is not a plain relative path"),
    "absent": ({"messages": said("a", "b"), "image": "a/3.jpg"}, "a/3.jpg is missing"),
    "no image": ({"messages": said("a", "b"), "image": "own.jsonl"}, "own.jsonl is not an image in a known format"),
    "number as image": ({"messages": said("a", "b"), "image": 7}, "names no image"),
    "other keys": ({"text": "a"}, "has neither messages nor conversations, only text"),
    "no mapping": ("[1]", "is not a JSON mapping"),
    "broken line": ('{"messages": [', "line is not valid JSON"),
    "key twice": ('{"messages": [], "messages": []}', "the key 'messages' appears twice"),
    "odd split": ({"messages": said("a", "b"), "split": "dev"}, 'split is "dev": it must be train, val or test'),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_record_is_named_by_file_and_line_or_skipped(tmp_path, tokenizer_file, fault):
    record, message = BAD[fault]
    good = {"messages": said("a", "b")} | ({"split": "train"} if fault == "odd split" else {})
    file = write(tmp_path, good, record, good | {"messages": said("c", "d")})
    with pytest.raises(UserError, match=r"(?m)^  train own.jsonl:2: .*" + message):
        prepare(file, tokenizer_file)
    report = prepare(file, tokenizer_file, on_error="skip")
    assert report.manifest.splits["train"].rejected == 1
    assert json.loads((report.out / "rejects.jsonl").read_text())["id"] == "own.jsonl:2"


KEYS = ["messages", "conversations", "role", "from", "content", "value", "type", "text", "image", "image_url", "url"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "text", "a/1.jpg", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
)


@settings(max_examples=100, deadline=None)
@given(json_values, json_values, json_values)
def test_whatever_a_record_holds_it_is_read_or_refused(value, other, third):
    prompt = PromptSettings.of(small_config(prompt_format="conversation"))
    source = Own(Path("own.jsonl"))
    for raw in (
        value,
        {"messages": value, "image": other, "images": third},
        {"messages": [{"role": "user", "content": value}, {"role": "assistant", "content": other}], "image": third},
        {"messages": [{"role": value, "content": [{"type": "image_url", "image_url": other}]}, third]},
        {"conversations": [{"from": value, "value": other}, third], "split": value},
    ):
        listed = Listed("own.jsonl:1", raw)
        source._group(listed, prompt)
        _given_splits([listed])
        with suppress(Refused):
            source.read(listed, prompt)


def test_records_may_name_their_split_and_then_all_must(tmp_path, tokenizer_file):
    records = [{"messages": said(f"a {split}", "b"), "split": split} for split in ("test", "train", "val", "train")]
    report = prepare(write(tmp_path, *records), tokenizer_file, val_fraction=0.5)
    assert {name: split.rows for name, split in report.manifest.splits.items()} == {"train": 2, "val": 1, "test": 1}
    with pytest.raises(UserError, match="own.jsonl:5: split is missing, but other records have it"):
        prepare(write(tmp_path, *records, {"messages": said("a", "b")}), tokenizer_file, overwrite=True)


def test_val_is_drawn_by_the_seed_and_keeps_an_image_in_one_split(tmp_path, tokenizer_file):
    records = [{"messages": asks_about(f"a/{n % 10}.jpg")} for n in range(40)]
    records += [{"messages": said(f"a {n % 20}", "b")} for n in range(40)]
    file = write(tmp_path, *records)
    for number in range(10):
        Image.new("RGB", (12, 10), (25 * number, 0, 0)).save(tmp_path / "a" / f"{number}.jpg")
    drawn = {}
    for seed in (0, 1):
        report = prepare(file, tokenizer_file, val_fraction=0.25, seed=seed, overwrite=True)
        rows = {split: texts(report, tokenizer_file, split) for split in ("train", "val")}
        kept, held_out = ({(text, image) for text, _, image in rows[split].values()} for split in ("train", "val"))
        assert not kept & held_out and 20 <= len(rows["val"]) <= 23
        drawn[seed] = set(rows["val"])
    assert drawn[0] != drawn[1]


def test_an_unfinished_job_of_another_draw_is_not_gone_on_with(tmp_path, tokenizer_file):
    def stop(stage, done, total):
        if stage == "rows":
            raise KeyboardInterrupt

    file = write(tmp_path, *LAYOUTS.values())
    with pytest.raises(KeyboardInterrupt):
        prepare(file, tokenizer_file, on_progress=stop)
    with pytest.raises(UserError, match="unfinished job with other .*--seed: 0 there, 1 here"):
        prepare(file, tokenizer_file, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no record"),
        ("[]", "has no record"),
        ('{\n"messages": []\n}', r"is not JSON Lines \(one JSON value per line\)"),
        ("what\never", "is not JSON Lines"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, tokenizer_file, content, message):
    file = tmp_path / "own.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(file, tokenizer_file)


def test_options_that_cannot_be_meant_are_refused(tmp_path, tokenizer_file):
    file = write(tmp_path, LAYOUTS["sharegpt"])
    with pytest.raises(UserError, match="--val-fraction 1.5 must be"):
        prepare(file, tokenizer_file, val_fraction=1.5)
    with pytest.raises(UserError, match="--images .* is not a folder"):
        prepare(file, tokenizer_file, images=tmp_path / "b")
    with pytest.raises(UserError, match="--data .* is a folder"):
        prepare(tmp_path, tokenizer_file)
    with pytest.raises(UserError, match="--data .* cannot be read"):
        prepare(tmp_path / "absent.jsonl", tokenizer_file)


def test_the_guides_example_is_prepared_as_it_stands(tmp_path, tokenizer_file):
    [example] = re.findall(r"```json\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(example.splitlines()) == 10
    (tmp_path / "pets.jsonl").write_text(example)
    (tmp_path / "pets").mkdir()
    for name in set(re.findall(r"pets/(\w+\.jpg)", example)):
        Image.new("RGB", (12, 10), (1, 2, 3)).save(tmp_path / "pets" / name)
    config = small_config(prompt_format="conversation").model_dump(mode="json")
    (tmp_path / "own-7b.json").write_text(json.dumps(config))
    words = [
        "prep",
        "own",
        "--data",
        "pets.jsonl",
        "--tokenizer",
        tokenizer_file,
        "--out",
        "shards",
        "--recipe",
        "own-7b.json",
        "--json",
    ]
    main = "from lavin_ds.cli.main import run; run()"
    done = subprocess.run([sys.executable, "-c", main, *map(str, words)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    splits = json.loads(done.stdout)["splits"]
    assert sum(split["records"] for split in splits.values()) == 10 and set(splits) == {"train", "val"}


def test_its_recipe_trains_lavin_7b_on_whole_conversations():
    own, chat = load_recipe("own-7b"), load_recipe("chatbot-7b")
    assert own.model == chat.model
    assert (own.data.prompt_format, own.data.image_resize) == ("conversation", "pad")
