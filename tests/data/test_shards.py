import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import record, small_config, write_scienceqa

from lavin_ds.config import NeckConfig, Readout
from lavin_ds.data import shards
from lavin_ds.data.layout import lay_out
from lavin_ds.data.schema import ROW_SCHEMA, check_manifest, load_manifest, manifest_sha256
from lavin_ds.data.shards import ShardReader, write_shard
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.errors import UserError


def row(number: int) -> dict:
    return {
        "id": f"row {number}",
        "token_ids": list(range(number % 7 + 2)),
        "label_spans": [1, number % 7 + 2],
        "label_count": number % 7 + 1,
        "prompt_length": 1,
        "prompt_ids": [9] * (number % 3),
        "image": -1,
        "has_image": False,
        "has_hint": True,
        "answer": 1,
        "n_choices": 2,
        "subject": "social science",
        "grade": "grade3",
        "references": ["a map"] * (number % 2),
    }


@pytest.fixture
def prepared(tmp_path, tokenizer_file):
    """A shard directory of ten rows, five with an image of which two are the same file."""
    problems = {str(i): record(image="image.png" if i % 2 else None, hint="map " * i) for i in range(10)}
    data = write_scienceqa(tmp_path / "data", problems)
    (data / "images/train/3/image.png").write_bytes((data / "images/train/1/image.png").read_bytes())
    prepare(ScienceQA(data), tokenizer_file, tmp_path / "shards", small_config())
    return tmp_path / "shards"


def test_rows_come_back_over_batches_and_files(tmp_path):
    files = [
        write_shard(tmp_path / f"train-{start}.arrow", ROW_SCHEMA, map(row, range(start, min(start + 10, 25))), 4)
        for start in (0, 10, 20)
    ]
    assert [file.rows for file in files] == [10, 10, 5]
    table = shards._Table(tmp_path, files, ROW_SCHEMA)
    assert table.length == 25
    for i in range(25):
        batch, within = table.locate(i)
        assert batch.value("id", within) == f"row {i}"
        assert batch.items("token_ids", within).tolist() == row(i)["token_ids"]
    assert table.counts("token_ids").tolist() == [len(row(i)["token_ids"]) for i in range(25)]
    with pytest.raises(IndexError):
        table.locate(25)


def test_the_entry_of_a_file_is_what_is_on_disk_and_the_same_rows_give_the_same_bytes(tmp_path):
    entries = [write_shard(tmp_path / f"{name}.arrow", ROW_SCHEMA, map(row, range(7)), 4) for name in "ab"]
    for entry in entries:
        path = tmp_path / entry.name
        assert (entry.bytes, entry.sha256) == (path.stat().st_size, shards.file_sha256(path))
    assert entries[0].sha256 == entries[1].sha256


def test_no_rows_make_no_file(tmp_path):
    assert write_shard(tmp_path / "x.arrow", ROW_SCHEMA, [], 4) is None
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_unfinished_file(tmp_path):
    def rows():
        yield from map(row, range(5))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "x.arrow", ROW_SCHEMA, rows(), 4)
    assert list(tmp_path.iterdir()) == []


def test_reader_gives_lengths_labels_and_images(prepared):
    reader = ShardReader(prepared, "train")
    assert len(reader) == 10
    for visual_tokens in (0, 2):
        layouts = [
            lay_out(r.token_ids, r.label_spans, r.image >= 0, reader.frame, visual_tokens)
            for r in map(reader.row, range(10))
        ]
        assert reader.lengths(visual_tokens).tolist() == [len(layout.ids) for layout in layouts]
        assert reader.label_counts.tolist() == [int((layout.labels >= 0).sum()) for layout in layouts]
    assert reader.has_pixels.tolist() == [False, True] * 5
    assert reader.row(1).image == reader.row(3).image != reader.row(5).image
    assert reader.image(reader.row(5).image).tolist() == np.full((8, 8, 3), (5, 100, 200)).tolist()
    assert reader.manifest.images.rows == 4
    reader.verify()


def test_reader_pickles_by_path(prepared):
    reader = pickle.loads(pickle.dumps(ShardReader(prepared, "train")))
    assert reader.row(4).id == "4"


def test_rows_without_labels_are_not_trainable(tmp_path, tokenizer_file):
    problems = {"a": record(), "b": record(lecture="directions " * 300)}
    data = write_scienceqa(tmp_path / "data", problems)
    prepare(ScienceQA(data), tokenizer_file, tmp_path / "shards", small_config())
    reader = ShardReader(tmp_path / "shards", "train")
    assert len(reader) == 2 and reader.trainable.tolist() == [0]
    assert len(reader.row(1).prompt_ids) == reader.prompt_lengths(2)[1] - len(reader.frame.head(False, 2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (lambda d: (d / "train-00000.arrow").unlink(), "train-00000.arrow is missing"),
        (lambda d: (d / "images-00000.arrow").unlink(), "images-00000.arrow is missing"),
        (lambda d: (d / "train-00000.arrow").open("ab").write(b"x"), "bytes and the manifest says"),
        (lambda d: edit(d, schema_version=99), "schema_version 99, but this version reads 2"),
        (lambda d: edit(d, surprise=1), "surprise"),
        (lambda d: edit(d, splits={}), "has no split 'train'"),
    ],
)
def test_a_damaged_directory_is_refused_by_name_with_a_remedy(prepared, damage, message):
    damage(prepared)
    with pytest.raises(UserError, match=message) as caught:
        ShardReader(prepared, "train")
    assert "prep" in str(caught.value)


def test_verify_finds_a_changed_byte(prepared):
    path = prepared / "train-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="train-00000.arrow does not have the checksum"):
        ShardReader(prepared, "train").verify()


def test_a_manifest_cannot_point_out_of_its_folder(prepared):
    raw = json.loads((prepared / "manifest.json").read_text())
    raw["splits"]["train"]["files"][0]["name"] = "../train-00000.arrow"
    (prepared / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="splits.train.files.0.name"):
        load_manifest(prepared)


def edit(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_manifest_agrees_with_its_own_recipe_and_with_a_blind_one(prepared):
    manifest = load_manifest(prepared)
    assert check_manifest(manifest, small_config()) == []
    assert check_manifest(manifest, small_config(vision=False)) == []
    assert manifest_sha256(prepared, "pixels") == manifest_sha256(prepared, "pixels")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_format": "QCM-A"}, "data.prompt_format: shards QCM-ALE, recipe QCM-A"),
        ({"captions": True}, "data.captions: shards False, recipe True"),
        ({"max_length": 256}, "data.max_length: shards 512, recipe 256"),
        ({"image_resize": "crop"}, "data.image_resize: shards squash, recipe crop"),
        ({"compat": "lavin-official"}, "compat: shards None, recipe lavin-official"),
        ({"vocab_size": 300}, "shards' tokenizer has 340 pieces, recipe's model.llm.vocab_size is 300"),
    ],
)
def test_every_disagreement_with_the_recipe_is_named(prepared, changes, message):
    assert message in " ".join(check_manifest(load_manifest(prepared), small_config(**changes)))


def test_more_visual_tokens_are_refused_only_where_they_make_samples_overlong(prepared):
    manifest = load_manifest(prepared)
    model = small_config().model
    more = model.vision.model_copy(update={"readout": Readout(every=1)})
    config = small_config().model_copy(update={"model": model.model_copy(update={"vision": more})})
    assert check_manifest(manifest, config) == []
    patches = model.vision.model_copy(update={"readout": Readout(rows="patches", block=8)})
    linear = model.model_copy(update={"vision": patches, "neck": NeckConfig(kind="linear")})
    assert check_manifest(manifest, small_config().model_copy(update={"model": linear})) == []
    longest = manifest.splits["train"].model_copy(update={"longest_image": 497})
    tight = manifest.model_copy(update={"splits": {"train": longest}})
    [found] = check_manifest(tight, config)
    assert "cut for 2, recipe's model.neck makes 8" in found
    most = int(found.split("with at most ")[1])
    for tokens, refused in ((most, False), (most + 1, True)):
        few = model.vision.model_copy(update={"layers": tokens, "readout": Readout(every=1)})
        config = small_config().model_copy(update={"model": model.model_copy(update={"vision": few})})
        assert bool(check_manifest(tight, config)) == refused


def test_a_row_is_data(prepared):
    first = ShardReader(prepared, "train").row(0)
    assert replace(first, id="x").id == "x" and (first.answer, first.n_choices) == (1, 2)
    assert (first.subject, first.grade, first.has_hint) == ("natural science", "grade2", False)
