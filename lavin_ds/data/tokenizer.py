"""A SentencePiece tokenizer, and the two things data needs beyond it: its hash and how text goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import sentencepiece

from lavin_ds.errors import UserError


class Tokenizer:
    """Reads a SentencePiece model file.

    Attributes: path, bos_id, eos_id, vocab_size, sha256 (of the file's bytes).

    Raises:
        UserError: the file is missing, is not a SentencePiece model, or has no BOS or EOS.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"Tokenizer {self.path} cannot be read ({error.strerror}): give the base's tokenizer.model."
            ) from None
        self._model = _load(content, self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.vocab_size = self._model.vocab_size()
        for name, token in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if token < 0:
                raise UserError(f"Tokenizer {self.path} has no {name} piece: LLaMA's tokenizer.model has one.")
        # LLaMA's tokenizer puts a space before every text it is given ("dummy prefix").
        first = self._model.encode("a")[0]
        self._adds_space = self._model.id_to_piece(first).startswith("\u2581")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS."""
        return self._model.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text; one thread, so that workers do not fight over cores."""
        return self._model.encode(texts, num_threads=1)

    def encode_continuation_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that go on after others, so that the joined ids spell the joined text.

        Where the tokenizer adds a space of its own, the text's leading space is left to it: " The" after
        "Response:" becomes the one piece it has in running text, not a bare space and then "The".
        """
        if self._adds_space:
            texts = [text.removeprefix(" ") for text in texts]
        return self.encode_batch(texts)

    def piece(self, token: int) -> str:
        """How one id reads in running text: a piece's spaces as spaces, a byte piece as its character if it has one."""
        piece = self._model.id_to_piece(int(token))
        if self._model.is_byte(int(token)):
            byte = int(piece[3:5], 16)  # <0x0A>
            return chr(byte) if byte in (9, 10) or 32 <= byte < 127 else piece
        return piece.replace("\u2581", " ")

    def decode(self, ids) -> str:
        """Text of ids; control pieces vanish, broken UTF-8 becomes the replacement character."""
        return self._model.decode([int(i) for i in ids])


def _load(content: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        if content and model.vocab_size() > 0:
            return model
    except (RuntimeError, ValueError, OSError):
        pass
    raise UserError(f"Tokenizer {path} is not a SentencePiece model: give LLaMA's tokenizer.model.")
