"""A user's own conversations: one file of JSON Lines (one record per line) or one JSON list, in one of two layouts.

    messages        {"messages": [{"role": "user", "content": ..}, {"role": "assistant", "content": ".."}, ..]}, with
                    content a text, or a list of {"type": "text", "text": ..} and {"type": "image_url", "image_url":
                    {"url": PATH}} or {"type": "image", "image": PATH}; as OpenAI and Hugging Face write it
    conversations   {"image": PATH, "conversations": [{"from": "human", "value": "<image>\\n.."}, {"from": "gpt",
                    "value": ".."}, ..]}, as ShareGPT and LLaVA write it

Both may have the keys `image` or `images` (at most one image per record) and `split` (train, val or test). A system
message is put before the first instruction. docs/own-data.md is the guide.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavin_ds.data_prep.conversations import IMAGE_MARK, TURN_FORMATS, check_compat, texts_of, turns_of
from lavin_ds.data_prep.reading import is_unicode, path_below, read_json, read_json_lines
from lavin_ds.data_prep.records import Listed, Listing, Record, Refused, Source, option
from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.data.schema import PromptSettings

LAYOUT = "a record has messages (OpenAI) or conversations (ShareGPT, LLaVA)"
SPLITS = ("train", "val", "test")
ROLES = ("system", "user", "assistant")
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Own(Source):
    """Your own conversations, with or without images, as JSON Lines: see docs/own-data.md."""

    kind = "own"
    formats = TURN_FORMATS
    recipe = "own-7b"

    data: Path = option("JSON Lines, or one JSON list, of messages (OpenAI) or conversations (ShareGPT, LLaVA).")
    images: Path | None = option("Folder that image paths start from; default: the folder of --data.", None)
    val_fraction: float = option("Share of the records held out as split val, if no record has a `split`.", 0.05)
    seed: int = option("Seed of the choice of records held out.", 0)

    @property
    def where(self) -> str:
        return str(self.data)

    @property
    def root(self) -> Path:
        return self.images or self.data.parent

    def listing(self, prompt: PromptSettings) -> Listing:
        check_compat(prompt)
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction} must be at least 0 and below 1.")
        if self.images and not self.images.is_dir():
            raise UserError(f"--images {self.images} is not a folder: give the one that image paths start from.")
        listed, sha256 = self._read_file()
        splits = _given_splits(listed)
        if splits is None:
            splits = _drawn_splits(listed, [self._group(one, prompt) for one in listed], self.val_fraction, self.seed)
        return Listing({name: splits[name] for name in SPLITS if splits[name]}, {self.data.name: sha256})

    def read(self, listed: Listed, prompt: PromptSettings) -> Record:
        key, said, images = _said(listed.raw)
        images += _top_level_images(listed.raw)
        paths = list(dict.fromkeys(_path(*image) for image in images))
        marks = sum(text.count(IMAGE_MARK) for _, text in said)
        if max(len(paths), marks) > 1:
            raise Refused("image", f"is given {max(len(paths), marks)} times: a record may have one")
        turns = turns_of(key, _alternating(key, said), bool(paths), prompt.compat is not None)
        return Record(texts_of(listed.id, turns, prompt.format), paths[0] if paths else "")

    def _group(self, listed: Listed, prompt: PromptSettings) -> str | None:
        """The group of a record: its image, or its whole content if it has none. A group stays in one split.

        None for a bad record. Only good records are held out, so that leaving the bad ones out leaves no split empty.
        """
        if listed.fault:
            return None
        try:
            image = self.read(listed, prompt).image
        except Refused:
            return None
        if image:
            return image if os.path.isfile(self.root / image) else None
        return json.dumps(listed.raw, sort_keys=True)

    def _read_file(self) -> tuple[list[Listed], str]:
        """The records, named `FILE:LINE` (in a JSON list `FILE[INDEX]`), and the file's SHA-256."""
        name = self.data.name
        if self.data.is_dir():
            raise UserError(f"--data {self.data} is a folder: give the file that holds the records.")
        if _is_json_list(self.data):
            records, sha256 = read_json(self.data, list, LAYOUT)
            listed = [Listed(f"{name}[{number}]", raw) for number, raw in enumerate(records)]
        else:
            lines, sha256 = read_json_lines(self.data, LAYOUT)
            listed = [
                Listed(f"{name}:{number}", None, raw) if isinstance(raw, Refused) else Listed(f"{name}:{number}", raw)
                for number, raw in lines
            ]
        if not listed:
            raise UserError(f"{self.data} has no record: {LAYOUT}.")
        return listed, sha256


def _is_json_list(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError as error:
        raise UserError(f"--data {path} cannot be read ({error.strerror}).") from None


def _given_splits(listed: list[Listed]) -> dict[str, list[Listed]] | None:
    """The records by their key `split`; None if no record has it."""
    if not any(isinstance(one.raw, dict) and "split" in one.raw for one in listed):
        return None
    splits: dict[str, list[Listed]] = {name: [] for name in SPLITS}
    for one in listed:
        split = one.raw.get("split") if isinstance(one.raw, dict) else None
        if one.fault is None and split not in SPLITS:
            reason = "is missing, but other records have it" if split is None else f"is {_shown(split)}"
            one = Listed(one.id, one.raw, Refused("split", f"{reason}: it must be {', '.join(SPLITS[:2])} or test"))
        splits[split if split in SPLITS else "train"].append(one)
    return splits


def _drawn_splits(
    listed: list[Listed], groups: list[str | None], val_fraction: float, seed: int
) -> dict[str, list[Listed]]:
    """Holds out groups as val until these have `val_fraction` of all records. Records without a group stay in train."""
    sizes = Counter(group for group in groups if group is not None)
    drawn = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest())
    wanted = max(1, round(val_fraction * len(listed))) if val_fraction else 0
    held_out: set[str] = set()
    for group in drawn[:-1]:  # at least one group stays in train
        if wanted <= 0:
            break
        held_out.add(group)
        wanted -= sizes[group]
    splits: dict[str, list[Listed]] = {name: [] for name in SPLITS}
    for one, group in zip(listed, groups, strict=True):
        splits["val" if group in held_out else "train"].append(one)
    return splits


def _said(raw: Any) -> tuple[str, list[tuple[str, str]], list[tuple[str, Any]]]:
    """A record's layout, its messages as (role, text), and the images in them as (key, address)."""
    if not isinstance(raw, dict):
        raise Refused("record", "is not a JSON mapping")
    key = next((key for key in ("messages", "conversations") if raw.get(key) is not None), None)
    if key is None:
        raise Refused("record", f"has neither messages nor conversations, only {', '.join(raw) or 'no key'}")
    if not isinstance(raw[key], list) or not raw[key]:
        raise Refused(key, "is empty, or is not a list of messages")
    said, images = [], []
    for number, message in enumerate(raw[key]):
        where = f"{key}[{number}]"
        if not isinstance(message, dict):
            raise Refused(where, "is not a JSON mapping")
        read = _message if key == "messages" else _turn
        role, text, own_images = read(where, message)
        if not is_unicode(text):
            raise Refused(where, "holds half a character (a lone surrogate)")
        said.append((role, text))
        images += own_images
    return key, said, images


def _message(where: str, message: dict) -> tuple[str, str, list[tuple[str, Any]]]:
    """Role, text and images of an OpenAI message."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Refused(f"{where}.role", f"is {_shown(role)}: it must be {', '.join(ROLES[:2])} or assistant")
    if message.get("tool_calls") or message.get("function_call"):
        raise Refused(where, "calls a tool, which is not supported")
    if message.get("weight", 1) != 1:
        raise Refused(
            f"{where}.weight",
            f"is {_shown(message['weight'])}: every reply is learnt, so remove the weight or the reply",
        )
    if isinstance(content, str):
        return role, content, []
    if not isinstance(content, list):
        raise Refused(f"{where}.content", "is neither a text nor a list of parts")
    texts, images = [], []
    for number, part in enumerate(content):
        key = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url") and role != "assistant":
            address = part.get(kind)
            if isinstance(address, dict):
                address = address.get("url")
            if kind == "image" and address is None:  # a mark for the image that the key `image` names
                texts.append(IMAGE_MARK)
            else:
                images.append((key, address))
        else:
            raise Refused(key, f"is of type {_shown(kind)}: it must be text or, in a user's message, an image")
    return role, "\n".join(texts), images


def _turn(where: str, turn: dict) -> tuple[str, str, list[tuple[str, Any]]]:
    """Role and text of a ShareGPT turn."""
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise Refused(f"{where}.from", f"is {_shown(speaker)}: it must be human, gpt or system")
    if not isinstance(text, str):
        raise Refused(f"{where}.value", "is not a text")
    return SPEAKERS[speaker], text, []


def _top_level_images(raw: dict) -> Iterator[tuple[str, Any]]:
    for key in ("image", "images"):
        given = raw.get(key)
        for address in given if isinstance(given, list) else [given]:
            if address is not None and address != "":
                yield key, address


def _path(key: str, address: Any) -> str:
    """The path of an image below the image folder; raises Refused for anything else."""
    if not isinstance(address, str) or not address:
        raise Refused(key, "names no image: give a path as text")
    if address.startswith("data:"):
        raise Refused(key, "is a data URL: save the image as a file, and give its path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address):
        raise Refused(key, f"is a URL, {_shown(address)}: download the image, and give its path")
    if "\\" in address:
        raise Refused(key, f"has backslashes, {_shown(address)}: write / between folders")
    if address.startswith("/"):
        raise Refused(key, f"is an absolute path, {_shown(address)}: give it relative to --images")
    return path_below(key, re.sub(r"^(\./+)+", "", address))


def _alternating(key: str, said: list[tuple[str, str]]) -> list[str]:
    """The texts of user and assistant, alternating. A system message is put before the first one."""
    system = ""
    if said[0][0] == "system":
        (_, system), *said = said
    roles = [role for role, _ in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Refused(
            key, f"must alternate between user and assistant and end with assistant; the roles are {_brief(roles)}"
        )
    texts = [text for _, text in said]
    if system:
        texts[0] = f"{system}\n{texts[0]}"
    return texts


def _brief(roles: list[str]) -> str:
    return ", ".join(roles[:6] or ["none"]) + ", ..." * (len(roles) > 6)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:60]}.."
