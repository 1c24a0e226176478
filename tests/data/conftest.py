"""A tokenizer in LLaMA's manner, made on the spot."""

import io
from pathlib import Path

import pytest
import sentencepiece

from lavin_ds.data.tokenizer import Tokenizer

TEXT = """Question: Which of these is farthest north? Context: N/A Options: (A) red (B) blue (C) green
Response: The answer is B. BECAUSE: Maps have four cardinal directions, or main directions. Image: N/A
Look at the picture. The compass rose shows which way is north. Figure: a map of the states.""".splitlines()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file) -> Tokenizer:
    return Tokenizer(tokenizer_file)
