"""Text to token ids and back, with the tokenizer of the base model.

It reads two kinds of file: a SentencePiece model (LLaMA's tokenizer.model) and the tokenizer.json of Hugging Face's
`tokenizers` (LLaMA-3, SmolLM2, TinyLlama and others). A name that ends in .json means the second kind.

Text is data. If it contains the name of a control token, such as "</s>" or "<|im_end|>", the name is encoded letter by
letter like any other text, and never becomes the id that ends a sequence.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import sentencepiece
import tokenizers

from lavin_ds.errors import UserError

# The files beside tokenizer.json that can name BOS and EOS, in the order they are read: by text, then by id.
NAMED_BY_TEXT = ("tokenizer_config.json", "special_tokens_map.json")
NAMED_BY_ID = ("generation_config.json", "config.json")
SPACE_MARKS = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE write a space inside a piece


class Tokenizer:
    """Encodes and decodes text with the tokenizer in a file.

    Attributes:
        path: the file.
        sha256: hash of the file's bytes.
        vocab_size: one more than the largest id.
        bos_id, eos_id: the ids that begin and end a sequence. A SentencePiece model holds them; for a
            tokenizer.json they come from the files beside it, or from the caller (shards record them).
        adds_space: whether every text is encoded as if a space stood before it, as LLaMA-1 and 2 do.

    Raises:
        UserError: the file is missing or of another kind, or its BOS or EOS is unknown or can be spelled by text.
    """

    def __init__(self, path: str | Path, bos_id: int | None = None, eos_id: int | None = None):
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"Tokenizer {self.path} cannot be read ({error.strerror}): "
                "give the base's tokenizer.model or tokenizer.json."
            ) from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        is_json = self.path.suffix == ".json"
        self._file = _TokenizerJson(content, self.path) if is_json else _SentencePiece(content, self.path)
        self.vocab_size = self._file.vocab_size
        self.bos_id = self._file.special_id("bos") if bos_id is None else bos_id
        self.eos_id = self._file.special_id("eos") if eos_id is None else eos_id
        self._file.keep_out_of_text(self.bos_id, self.eos_id)
        self.adds_space = self._file.piece(self.encode("a")[0]).startswith(SPACE_MARKS)

    @property
    def shard_name(self) -> str:
        """The file's name in a shard directory, which holds a copy."""
        return "tokenizer.json" if self.path.suffix == ".json" else "tokenizer.model"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS."""
        return self._file.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes every text on one thread, because several worker processes do this at once."""
        return self._file.encode_batch(texts)

    def encode_continuation_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that follow other text: prompt ids + these ids decode to prompt + text.

        If the tokenizer adds a space itself, that space replaces the text's leading one: " The" after "Response:"
        becomes one piece, as in running text, and not a space followed by "The".
        """
        if self.adds_space:
            texts = [text.removeprefix(" ") for text in texts]
        return self.encode_batch(texts)

    def piece(self, token: int) -> str:
        """One id as text, with its leading space. Bytes that are not a whole character stay as <0xE2>."""
        return self._file.shown(int(token))

    def decode(self, ids) -> str:
        """Text of a whole sequence of ids. Control tokens vanish; broken UTF-8 becomes the replacement character."""
        return self._file.decode([int(i) for i in ids])


class _SentencePiece:
    """A SentencePiece model. Its encoder never yields control ids, whatever the text."""

    def __init__(self, content: bytes, path: Path):
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.vocab_size() if content else 0
        except (RuntimeError, ValueError, OSError):
            self.vocab_size = 0
        if not self.vocab_size:
            raise UserError(
                f"Tokenizer {path} is not a SentencePiece model: give the tokenizer.model of LLaMA-1 or 2, or "
                "the tokenizer.json of a newer base (LLaMA-3's own tokenizer.model has another format)."
            )

    def special_id(self, name: str) -> int:
        token = self._model.bos_id() if name == "bos" else self._model.eos_id()
        if token < 0:
            raise UserError(f"Tokenizer {self.path} has no {name.upper()} piece: LLaMA's tokenizer.model has one.")
        return token

    def keep_out_of_text(self, bos_id: int, eos_id: int) -> None:
        """Nothing to do: no text is encoded to a control piece."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def piece(self, token: int) -> str:
        return self._model.id_to_piece(token)

    def shown(self, token: int) -> str:
        return _shown(self.piece(token), self._model.is_byte(token))


class _TokenizerJson:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, content: bytes, path: Path):
        self.path = path
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"Tokenizer {path} is not a tokenizer.json of Hugging Face's tokenizers ({error}): "
                "is its download complete?"
            ) from None
        self._model.no_truncation()  # some files hold the settings of the person who saved them
        self._model.no_padding()
        self._model.encode_special_tokens = True  # encode their names as text
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise UserError(f"Tokenizer {path} has an empty vocabulary: is its download complete?")
        self._is_byte_level = '"ByteLevel"' in json.dumps(json.loads(content).get("decoder"))

    def special_id(self, name: str) -> int:
        """Id of "bos" or "eos", from the first file beside the tokenizer that names it."""
        for file in NAMED_BY_TEXT:
            text = _read_json(self.path.with_name(file)).get(f"{name}_token")
            text = text.get("content") if isinstance(text, dict) else text
            if text is not None:
                token = self._model.token_to_id(text) if isinstance(text, str) else None
                return self._known(token, name, file, text)
        for file in NAMED_BY_ID:
            token = _read_json(self.path.with_name(file)).get(f"{name}_token_id")
            if isinstance(token, list) and len(token) == 1:
                token = token[0]
            if token is not None:
                return self._known(token, name, file, token)
        raise UserError(
            f"The {name.upper()} of {self.path} is unknown: none of {', '.join(NAMED_BY_TEXT + NAMED_BY_ID)} beside it "
            f"names one. Copy them from the base's folder, or write {name}_token into tokenizer_config.json."
        )

    def _known(self, token: object, name: str, file: str, said: object) -> int:
        if isinstance(token, int) and 0 <= token < self.vocab_size:
            return token
        problem = "has several" if isinstance(said, list) else "is no token of its vocabulary"
        raise UserError(
            f"The {name.upper()} of {self.path} is unknown: {self.path.with_name(file)} says {said!r}, which "
            f"{problem}. Write the right {name}_token into tokenizer_config.json."
        )

    def keep_out_of_text(self, bos_id: int, eos_id: int) -> None:
        """Makes BOS and EOS control tokens, and refuses a vocabulary in which text can still spell a control token."""
        self._model.add_special_tokens([self._model.id_to_token(token) for token in (bos_id, eos_id)])
        control = {i: token.content for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        for token, ids in zip(control, self.encode_batch(list(control.values())), strict=True):
            if not control.keys().isdisjoint(ids):
                raise UserError(
                    f"Tokenizer {self.path} turns the text {control[token]!r} into the control token {token}, so a "
                    "question could end its own sequence: mark it as special in added_tokens, and take it out of "
                    "model.vocab."
                )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One text at a time: the library's own batches start one thread per core.
        return [self._model.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._model.id_to_token(token)

    def shown(self, token: int) -> str:
        piece = self.piece(token)
        if self._is_byte_level:
            text = self._model.decode([token], skip_special_tokens=False)
            return piece if "\ufffd" in text else text
        return _shown(piece, len(piece) == 6 and piece.startswith("<0x"))


def _shown(piece: str, is_byte: bool) -> str:
    """A SentencePiece piece with its spaces as spaces, or a byte piece (<0x0A>) as its character if it has one."""
    if not is_byte:
        return piece.replace("\u2581", " ")
    byte = int(piece[3:5], 16)
    return chr(byte) if byte in (9, 10) or 32 <= byte < 127 else piece


def _read_json(path: Path) -> dict:
    """What a JSON file holds; {} where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): it may name the tokenizer's BOS and EOS.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys: it must be a JSON object.")
    return content
