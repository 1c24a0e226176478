import hashlib

import pytest

from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError


def test_llama_tokenizer_gives_the_authors_prefixes(shared):
    tokenizer = Tokenizer(shared / "data/tokenizer/llama-32k.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.encode("Image: ") == [7084, 29901, 29871]
    assert tokenizer.encode("Image: N/A") == [7084, 29901, 405, 29914, 29909]


def test_a_continuation_has_the_ids_it_has_in_running_text(shared):
    tokenizer = Tokenizer(shared / "data/tokenizer/llama-32k.model")
    whole = tokenizer.encode("Response: The answer is B.")
    [rest] = tokenizer.encode_continuation_batch([" The answer is B."])
    assert [*tokenizer.encode("Response:"), *rest] == whole


def test_names_of_control_pieces_in_a_text_are_only_text(tokenizer):
    ids = tokenizer.encode("<s>a</s><unk>")
    assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(ids)
    assert tokenizer.decode(ids) == "<s>a</s><unk>"


def test_hash_is_of_the_file(tokenizer, tokenizer_file):
    assert tokenizer.sha256 == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b'{"model": 1}', b"\x08\x01" * 50])
def test_a_file_that_is_no_sentencepiece_model_is_refused_by_name(tmp_path, content):
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="wrong.model is not a SentencePiece model"):
        Tokenizer(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="absent.model cannot be read"):
        Tokenizer(tmp_path / "absent.model")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path)
