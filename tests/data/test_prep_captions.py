import json

import pytest
from data_helpers import small_config
from PIL import Image

from lavin_ds.data.schema import check_manifest
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep import pipeline
from lavin_ds.data_prep.captions import Captions
from lavin_ds.errors import UserError

CONFIG = small_config(prompt_format="caption")


def image(number: int, split: str, *captions: str) -> dict:
    return {
        "filepath": "val2014" if split != "train" else "train2014",
        "filename": f"COCO_{number:012d}.jpg",
        "split": split,
        "cocoid": number,
        "sentences": [{"raw": caption, "tokens": []} for caption in captions],
    }


IMAGES = [
    image(11, "test", "A red map.", "A map of the states. "),
    image(12, "train", "Blue.", "It is blue."),
    image(13, "restval", "A rose."),
    image(14, "val", "Green.", "A compass rose."),
]


def write(folder, images=IMAGES):
    for one in images:
        if isinstance(one, dict) and "/" not in one.get("filename", "/"):
            path = folder / "coco" / one["filepath"] / one["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (one["cocoid"] * 10, 100, 200)).save(path)
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder


def prepare(folder, tokenizer_file, splits="train,val,test", config=CONFIG, **options):
    source = Captions(folder / "dataset_coco.json", folder / "coco", splits)
    return pipeline.prepare(source, tokenizer_file, folder / "shards", config, **options)


def test_training_learns_every_caption_and_restval_too(tmp_path, tokenizer_file):
    report = prepare(write(tmp_path), tokenizer_file)
    reader, tokenizer = ShardReader(report.out, "train"), Tokenizer(tokenizer_file)
    rows = [reader.row(i) for i in range(len(reader))]
    assert [row.id for row in rows] == ["12.0", "12.1", "13.0"]
    assert [row.image for row in rows] == [0, 0, 1] and not any(row.references for row in rows)
    prompt = "Instruction: Provide a brief description of the given image.\nResponse:"
    assert {tokenizer.decode(row.prompt_ids) for row in rows} == {prompt}
    learnt = [tokenizer.decode(row.token_ids[slice(*row.label_spans[0])]) for row in rows]
    assert learnt == ["Blue.", "It is blue.", "A rose."]
    assert (report.manifest.splits["train"].records, report.manifest.kind) == (2, "captions")


def test_an_image_to_score_is_one_row_with_all_its_captions(tmp_path, tokenizer_file):
    report = prepare(write(tmp_path), tokenizer_file)
    for split, id, references in (
        ("val", "14", ("Green.", "A compass rose.")),
        ("test", "11", ("A red map.", "A map of the states.")),
    ):
        reader = ShardReader(report.out, split)
        assert len(reader) == 1
        assert (reader.row(0).id, reader.row(0).references) == (id, references)
        red = int(reader.image(reader.row(0).image)[0, 0, 0])
        assert abs(red - 10 * int(id)) <= 2  # the picture is a JPEG of that red


def test_splits_can_be_chosen_and_must_exist(tmp_path, tokenizer_file):
    report = prepare(write(tmp_path), tokenizer_file, splits="test")
    assert list(report.manifest.splits) == ["test"] and report.manifest.images.rows == 1
    with pytest.raises(UserError, match="no image of split 'nope': it has train, val, test"):
        prepare(tmp_path, tokenizer_file, splits="nope", overwrite=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentences": []}, "train 12: sentences is refused"),
        ({"sentences": [{"raw": " "}]}, "train 12: sentences have an empty caption"),
        ({"filename": "../../x.jpg"}, "train 12: filename .* is not a plain relative path"),
        ({"filename": "absent.jpg"}, "train 12: image .*absent.jpg is missing"),
        ({"cocoid": 11}, "train 11: cocoid appears twice"),
    ],
)
def test_a_bad_record_is_named_or_skipped(tmp_path, tokenizer_file, changes, message):
    write(tmp_path)
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [IMAGES[0], IMAGES[1] | changes, *IMAGES[2:]]}))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, tokenizer_file)
    report = prepare(tmp_path, tokenizer_file, on_error="skip")
    assert (report.manifest.splits["train"].rejected, report.manifest.splits["train"].rows) == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must hold a JSON mapping"),
        (b"{}", "no list under the key images"),
        (b'{"images": [{"split": "odd", "cocoid": 1}]}', "image 0 of the list has no known split or cocoid"),
        (b'{"images": [7]}', "image 0 of the list has no known split or cocoid"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, tokenizer_file, content, message):
    write(tmp_path)
    (tmp_path / "dataset_coco.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, tokenizer_file)


def test_recipe_and_data_must_be_of_one_kind(tmp_path, tokenizer_file):
    report = prepare(write(tmp_path), tokenizer_file)
    assert check_manifest(report.manifest, CONFIG) == []
    [found] = check_manifest(report.manifest, small_config(prompt_format="single-turn"))
    assert found == "data.prompt_format: shards caption, recipe single-turn"
    with pytest.raises(UserError, match="data.prompt_format is QCM-ALE.*captions-13b"):
        prepare(tmp_path, tokenizer_file, config=small_config())
