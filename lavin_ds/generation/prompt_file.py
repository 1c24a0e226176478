"""Reads prompts from a JSON Lines file and appends answers to another. A job that was killed continues that file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavin_ds.errors import UserError
from lavin_ds.generation.request import Answer, Request, Sampling

if TYPE_CHECKING:  # torch takes seconds to import, and files are checked without it
    from lavin_ds.generation.assistant import Assistant

KEYS = {"id", "prompt", "image"}
SHOWN = 5  # problems shown in an error


@dataclass(frozen=True)
class PromptRecord:
    id: str
    prompt: str
    image: Path | None
    line: int


def read_prompts(path: Path) -> list[PromptRecord]:
    """Reads records {"id", "prompt", "image"}. The default id is the line's number; images are in the file's folder.

    Raises:
        UserError: lines that are not JSON, unknown keys, repeated ids, images that are missing or outside the folder.
            The error shows the first of these, each with its line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path} is not UTF-8 text: it must be JSON Lines.") from None
    records: dict[str, PromptRecord] = {}
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _read(line, number, path.parent)
        if isinstance(record, str):
            wrong.append(f"line {number}: {record}")
        elif record.id in records:
            wrong.append(f"line {number}: id {record.id} is already on line {records[record.id].line}")
        else:
            records[record.id] = record
    if wrong:
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(f"{path} has {len(wrong)} bad lines:" + "".join(f"\n  {said}" for said in wrong[:SHOWN]) + more)
    if not records:
        raise UserError(f'{path} has no prompts: write lines such as {{"id": "1", "prompt": "What is this?"}}.')
    return list(records.values())


def _read(line: str, number: int, folder: Path) -> PromptRecord | str:
    """The record of a line, or what is wrong with it."""
    try:
        raw = json.loads(line)
    except ValueError:
        return "is not JSON"
    if not isinstance(raw, dict):
        return "is not a JSON object"
    unknown = set(raw) - KEYS
    if unknown:
        return f"has unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(KEYS))}"
    if not isinstance(raw.get("prompt"), str):
        return "has no prompt that is text"
    id, image = raw.get("id", str(number)), raw.get("image")
    if not isinstance(id, (str, int)) or isinstance(id, bool):
        return "has an id that is neither text nor a whole number"
    if image is None:
        return PromptRecord(str(id), raw["prompt"], None, number)
    if not isinstance(image, str):
        return "has an image that is not a path"
    file = (folder / image).resolve()
    if not file.is_relative_to(folder.resolve()):
        return f"has image {image}, which is outside {folder}"
    if not file.is_file():
        return f"has image {image}, which does not exist"
    return PromptRecord(str(id), raw["prompt"], file, number)


class AnswerFile:
    """A file of lines {"id", "text", "finish", "tokens"}. A line is appended when an answer is complete.

    `done` holds the ids that the file already has. If a crash cut the last line short, it is removed.
    """

    def __init__(self, path: Path, records: Sequence[PromptRecord]):
        """Raises UserError if the file cannot be written, or holds answers to other prompts."""
        self.path, self.done = path, set()
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"--out {path} must be a file in a folder that exists.")
        if not path.exists():
            return
        whole = 0
        known = {record.id for record in records}
        content = path.read_bytes()
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                id = json.loads(line)["id"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--out {path} holds lines that are not answers: give another file.") from None
            if id not in known:
                raise UserError(f"--out {path} has an answer to {id}, which is not in --prompts: give another file.")
            self.done.add(id)
            whole += len(line)
        if whole < len(content):
            os.truncate(path, whole)

    def __enter__(self) -> AnswerFile:
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def ask(
        self, assistant: Assistant, records: Sequence[PromptRecord], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[Answer]:
        """Yields answers in the order in which they are complete. A picture is read when its prompt is next.

        Raises:
            UserError: a picture cannot be used, or a prompt is too long. The error names the line.
        """

        def requests() -> Iterator[Request]:
            for record in records:
                try:
                    image = assistant.read_image(record.image) if record.image else None
                    prompt = assistant.prompt(record.prompt, image, max_new_tokens)
                except UserError as error:
                    raise UserError(f"Prompt {record.id}, line {record.line}: {error}") from None
                yield assistant.request(record.id, prompt, max_new_tokens, sampling)

        yield from assistant.engine.run(requests())

    def write(self, answer: Answer) -> None:
        line = {"id": answer.id, "text": answer.text.strip(), "finish": answer.finish, "tokens": len(answer.ids)}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
