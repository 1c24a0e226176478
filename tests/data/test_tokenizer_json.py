"""The tokenizer.json of Hugging Face's tokenizers: ids and texts are those of transformers on the same files."""

import json

import pytest
import tokenizers
from data_helpers import record, small_config, write_scienceqa
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lavin_ds.data.layout import Frame
from lavin_ds.data.prompts import LETTERS, Instruction
from lavin_ds.data.samples import make_samples
from lavin_ds.data.schema import PromptSettings
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep import pipeline
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.errors import UserError

CONTROL = ["<|begin|>", "<|end|>", "<unk>"]
TEXT = """Question: Which of these is farthest north? Context: N/A Options: (A) red (B) blue (C) green
Response: The answer is B. BECAUSE: Maps have four cardinal directions, or main directions. Image: N/A
Look at the picture. The compass rose shows which way is north. Figure: a map of the states.""".splitlines()
NASTY = [
    "",
    " ",
    "a",
    " leading",
    "   three leading",
    "trailing  ",
    "two  spaces   three",
    "\n\nlines\r\n\tand tabs\n",
    "  12 345  6,789.0",
    "naïve café, Cafe\u0301, ﬁ, ẞ",
    "日本語のテキスト、한국어, עברית, ไทย",
    "🐧 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "\u200bzero\u200dwidth\ufeff",
    "\ufffd \x00 \x07 \x7f",
    "\u2581 and \u0120 and <0x0A>",
    "it's we'll I'M",
    "</s><s>[INST] <<SYS>>",
    "<|end|> a<|end|>b <|begin|><unk>",
    "<|im_end|>\n<|im_start|>assistant\n<|endoftext|><|eot_id|>",
    "https://example.org/a_b?c=%20#d",
    "Response: The answer is B.",
]


def byte_level(path):
    """Byte-level BPE in LLaMA-3's manner, with the control tokens outside of the model's vocabulary."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(TEXT * 20, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    model.add_special_tokens(CONTROL)
    model.save(str(path))


def sentencepiece_like(path):
    """BPE with byte fallback in the manner of LLaMA-2's tokenizer.json: a space is put before every text."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    control = ["<unk>", "<|begin|>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256))]
    words = [line.replace(" ", " \u2581") for line in TEXT]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(words * 20, trainers.BpeTrainer(vocab_size=420, special_tokens=control))
    learnt = json.loads(trained.to_str())["model"]
    whole = json.loads(model.to_str())
    whole["model"] |= {"vocab": learnt["vocab"], "merges": learnt["merges"]}
    path.write_text(json.dumps(whole), encoding="utf-8")
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_special_tokens(CONTROL)
    model.save(str(path))


@pytest.fixture(scope="session", params=[byte_level, sentencepiece_like], ids=lambda make: make.__name__)
def made(request, tmp_path_factory):
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder / "tokenizer.json")
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "unk_token": "<unk>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of `made` that a test may change."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_ids_are_those_of_transformers(made):
    ours, theirs = Tokenizer(made / "tokenizer.json"), AutoTokenizer.from_pretrained(made)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    want = [theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in NASTY]
    assert ours.encode_batch(NASTY) == want
    assert [ours.encode(text) for text in NASTY] == want


def test_decoding_gives_back_the_text_and_leaves_control_tokens_out(made):
    ours, theirs = Tokenizer(made / "tokenizer.json"), AutoTokenizer.from_pretrained(made)
    for text in NASTY:
        ids = ours.encode(text)
        spelled = text.replace("\u2581", " ") if ours.adds_space else text  # SentencePiece's own sign for a space
        assert ours.decode([ours.bos_id, *ids, ours.eos_id]) == spelled
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_the_name_of_a_control_token_is_only_text(made):
    tokenizer = Tokenizer(made / "tokenizer.json")
    for ids in tokenizer.encode_batch(["<|end|>", "x<|begin|>y", "".join(CONTROL)]):
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_prompt_and_response_join_to_the_ids_of_running_text(made):
    tokenizer = Tokenizer(made / "tokenizer.json")
    answers = [f" The answer is {letter}. BECAUSE: x" for letter in LETTERS[:5]]
    for prompt in ("Question: Which?\nResponse:", "Instruction: <|end|> 12\nResponse:"):
        for response in (*answers, " 12 345", " \u65e5\u672c \U0001f427"):
            [rest] = tokenizer.encode_continuation_batch([response])
            joined = [*tokenizer.encode(prompt), *rest]
            assert tokenizer.decode(joined) == prompt + response
            assert joined == tokenizer.encode(prompt + response)


def test_labels_are_the_response_and_its_end(made):
    tokenizer = Tokenizer(made / "tokenizer.json")
    turn = Instruction("Say <|end|>", "", "It is <|end|> \u65e5.")
    settings = PromptSettings.of(small_config(prompt_format="single-turn"))
    [sample] = make_samples([[turn]], [False], tokenizer, Frame.of(tokenizer), settings)
    start, end = sample.label_spans
    assert tokenizer.decode(sample.token_ids[:start]) == turn.prompt("")
    assert tokenizer.decode(sample.token_ids) == turn.prompt("") + turn.response
    assert sample.token_ids[start:end].count(tokenizer.eos_id) == 1 and sample.token_ids[end - 1] == tokenizer.eos_id


def test_the_prefix_of_a_text_sample_does_not_run_into_the_prompt(made):
    tokenizer = Tokenizer(made / "tokenizer.json")
    ids = [*Frame.of(tokenizer).prefix_text, *tokenizer.encode("Question: Which?")]
    assert tokenizer.decode(ids) == f"Image: N/A{' ' if tokenizer.adds_space else chr(10)}Question: Which?"


def test_a_piece_reads_as_in_running_text(made):
    tokenizer = Tokenizer(made / "tokenizer.json")
    assert "".join(map(tokenizer.piece, tokenizer.encode("The answer\nis B."))).strip() == "The answer\nis B."
    assert tokenizer.piece(tokenizer.eos_id) == "<|end|>"
    assert "\ufffd" not in "".join(map(tokenizer.piece, tokenizer.encode("\U0001f427")))


def test_settings_that_a_file_carries_do_not_cut_or_pad(folder):
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.enable_truncation(3)
    model.enable_padding(length=5)
    model.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0] and len(tokenizer.encode("a")) < 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "BOS of .*tokenizer.json is unknown: none of tokenizer_config.json"),
        ({"tokenizer_config.json": {"bos_token": "<|begin|>"}}, "EOS of .* is unknown: none of"),
        ({"special_tokens_map.json": {"bos_token": "<|start|>"}}, "says '<|start|>', which is no token"),
        ({"config.json": {"bos_token_id": 99_999}}, "says 99999, which is no token"),
        ({"generation_config.json": {"bos_token_id": [3, 4]}}, r"says \[3, 4\], which has several"),
        ({"tokenizer_config.json": []}, "tokenizer_config.json holds no keys"),
    ],
)
def test_a_bos_or_eos_that_cannot_be_known_is_refused_by_name(folder, files, message):
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        Tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "generation_config.json", "config.json"])
def test_bos_and_eos_come_from_whichever_file_names_them(folder, name):
    whole = Tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").unlink()
    said = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    if "config" in name:
        said = {"bos_token_id": whole.bos_id, "eos_token_id": [whole.eos_id]}
    (folder / name).write_text(json.dumps(said))
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (whole.bos_id, whole.eos_id)


def test_a_vocabulary_in_which_text_spells_a_control_token_is_refused(tmp_path):
    model = tokenizers.Tokenizer(models.WordLevel({"<|end|>": 0, "a": 1}, unk_token="a"))
    model.add_special_tokens(["<|end|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"turns the text '<\|end\|>' into the control token 0"):
        Tokenizer(tmp_path / "tokenizer.json", bos_id=0, eos_id=0)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"model": 1}', b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json (is not a tokenizer.json|has an empty vocabulary)"):
        Tokenizer(path)


def test_shards_keep_the_file_and_its_bos_and_eos(made, tmp_path):
    data = write_scienceqa(tmp_path / "data", {"1": record(), "2": record(question="Is it <|end|>?")})
    config = small_config(vocab_size=1000)
    report = pipeline.prepare(ScienceQA(data, "train"), made / "tokenizer.json", tmp_path / "shards", config)
    reader, tokenizer = ShardReader(report.out, "train"), Tokenizer(made / "tokenizer.json")
    assert (report.out / "tokenizer.json").read_bytes() == tokenizer.path.read_bytes()
    assert (reader.tokenizer.bos_id, reader.tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    texts = [reader.tokenizer.decode(reader.row(i).token_ids) for i in range(2)]
    assert "Is it <|end|>?" in texts[1] and texts[0].startswith("Question: Which colour is it?\n")
    (report.out / "tokenizer.json").write_bytes(tokenizer.path.read_bytes() + b" ")
    with pytest.raises(UserError, match="is not the file .* was prepared with"):
        _ = ShardReader(report.out, "train").tokenizer


@pytest.mark.slow
def test_the_tokenizer_of_a_real_base_is_that_of_transformers(smollm2):
    ours, theirs = Tokenizer(smollm2 / "tokenizer.json"), AutoTokenizer.from_pretrained(smollm2)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, 49152)
    texts = [*NASTY, "three  spaces before 12345 and\n 6 lines"]
    want = [theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    assert ours.encode_batch(texts) == want
    assert [ours.decode(ids) for ids in want] == texts
    assert [ours.piece(i) for i in ours.encode("in 1945")] == ["in", " ", "1", "9", "4", "5"]
