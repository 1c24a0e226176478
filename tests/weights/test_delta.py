"""Vicuna v0's way: a delta in Hugging Face's layout whose vocabulary has one row more than the base."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from weights_helpers import CONFIG, filled, write_huggingface, write_meta

from lavin_ds.cli.main import app
from lavin_ds.errors import UserError
from lavin_ds.models.llama import Llama
from lavin_ds.weights import delta as merging
from lavin_ds.weights.delta import merge_delta
from lavin_ds.weights.llama import check_llama, load_llama

VOCABULARY = CONFIG.model.llm.vocab_size


@pytest.fixture
def folders(tmp_path):
    """The base in both layouts, a delta in half precision, and the state dict that their sum must be."""
    source = filled()
    write_meta(tmp_path / "meta", source, shards=2)
    theirs = AutoModelForCausalLM.from_pretrained(write_huggingface(tmp_path / "huggingface", source))
    base = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    theirs.resize_token_embeddings(VOCABULARY + 1)
    torch.manual_seed(0)
    delta = {name: (0.1 * torch.randn(tensor.shape)).half() for name, tensor in theirs.state_dict().items()}
    theirs.half().load_state_dict(delta)
    theirs.save_pretrained(tmp_path / "delta", max_shard_size="20KB")
    (tmp_path / "delta" / "tokenizer.model").write_bytes(b"pieces")
    for name, tensor in base.items():
        delta[name][: len(tensor)] += tensor
    return tmp_path, delta


@pytest.mark.parametrize("layout", ["meta", "huggingface"])
def test_base_plus_delta_is_the_sum_in_hugging_faces_layout_whatever_the_bases(folders, layout, monkeypatch):
    folder, want = folders
    monkeypatch.setattr(merging, "FILE_BYTES", 20_000)
    merged = merge_delta(folder / layout, folder / "delta", folder / "vicuna")
    assert (merged.vocab_size, merged.added_rows) == (VOCABULARY + 1, 1) and merged.files > 1
    got = AutoModelForCausalLM.from_pretrained(folder / "vicuna", dtype=torch.float16).state_dict()
    assert set(got) == set(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert (folder / "vicuna" / "tokenizer.model").read_bytes() == b"pieces"
    assert not list(folder.glob(".*tmp"))


@torch.no_grad()
def test_a_merged_folder_is_a_base_like_any_other(folders):
    folder, _ = folders
    command = ["merge-delta", "--base", folder / "meta", "--delta", folder / "delta", "--out", folder / "vicuna"]
    result = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tensors"] == 21
    config = CONFIG.model.llm.model_copy(update={"vocab_size": VOCABULARY + 1})
    model = Llama(config)
    load_llama(model, folder / "vicuna")
    ids = torch.randint(0, VOCABULARY, (2, 7))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "vicuna", dtype=torch.float32)
    torch.testing.assert_close(model.logits(model(model.embed(ids))), theirs(ids).logits, rtol=1e-4, atol=1e-4)

    merge_delta(folder / "meta", folder / "delta", folder / "dropped", drop_added_rows=True)
    check_llama(folder / "dropped", CONFIG.model.llm)


def test_what_does_not_fit_together_is_refused_and_nothing_is_left(folders, monkeypatch):
    folder, _ = folders
    for base, delta, out, message in [
        ("meta", "delta", "meta", "exists already: give a new folder"),
        ("meta", "delta", "no/vicuna", "there is no folder"),
        ("absent", "delta", "vicuna", "No LLaMA at"),
        ("huggingface", "meta", "vicuna", "is in Meta's layout, but a delta must be"),
        ("delta", "huggingface", "vicuna", "are base and delta swapped"),
    ]:
        with pytest.raises(UserError, match=message):
            merge_delta(folder / base, folder / delta, folder / out)
    monkeypatch.setattr(merging._Writer, "close", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_delta(folder / "meta", folder / "delta", folder / "vicuna")
    assert not (folder / "vicuna").exists() and not list(folder.glob(".*tmp"))
