"""docs/data-format.md is what an outsider writes a reader from: its code runs as it stands there."""

import re
from pathlib import Path

from data_helpers import record, small_config, write_scienceqa

from lavin_ds.data.schema import ROW_SCHEMA
from lavin_ds.data.shards import ShardReader
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.scienceqa import ScienceQA

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text(encoding="utf-8")


def test_the_documented_reader_reads_what_ours_reads(tmp_path, tokenizer_file, monkeypatch):
    data = write_scienceqa(tmp_path / "data", {"1": record(image="image.png"), "2": record()})
    prepare(ScienceQA(data), tokenizer_file, tmp_path / "shards", small_config())
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    ours = ShardReader(tmp_path / "shards", "train")
    row = ours.row(0)
    assert found["rows"].num_rows == 2 and found["row"]["id"] == "1"
    assert found["prompt"] == row.prompt_ids.tolist()
    assert found["learnt"] == [row.token_ids[a:b].tolist() for a, b in row.label_spans]
    assert (found["pixels"] == ours.image(row.image)).all()


def test_every_column_is_documented():
    table = DOCUMENT.split("## Rows")[1].split("Images:")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(ROW_SCHEMA.names)
