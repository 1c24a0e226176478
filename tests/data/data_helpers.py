"""A small recipe, ScienceQA folders and the golden prompts, for the tests of the data's way."""

import json
import struct
import zlib
from pathlib import Path

from PIL import Image

from lavin_ds.config import RunConfig, parse_config
from lavin_ds.data.prompts import Question


def small_config(**data) -> RunConfig:
    """A recipe with 2 visual tokens and 8-pixel images; `data` goes into its data section."""
    compat = data.pop("compat", None)
    vision = {"width": 16, "layers": 8, "heads": 2, "patch_size": 4, "image_size": 8}
    if not data.pop("vision", True):
        vision = None
    llm = {"dim": 16, "n_layers": 1, "n_heads": 2, "ffn_dim": 32, "vocab_size": data.pop("vocab_size", 340)}
    model = {"llm": llm, "vision": vision}
    return parse_config({"name": "small", "model": model, "data": data, "compat": compat}, "the test")


def record(**changes) -> dict:
    return {
        "question": "Which colour is it?",
        "choices": ["red", "blue"],
        "answer": 1,
        "hint": "Look at the picture.",
        "image": None,
        "grade": "grade2",
        "subject": "natural science",
        "lecture": "Maps have directions.",
        "solution": "It is blue.",
        "split": "train",
        **changes,
    }


def write_scienceqa(folder: Path, problems: dict[str, dict], splits: dict[str, list[str]] | None = None) -> Path:
    """Writes problems, splits (by each record's own, if None), and a picture where a record names one."""
    folder.mkdir(parents=True, exist_ok=True)
    if splits is None:
        splits = {}
        for pid, problem in problems.items():
            splits.setdefault(problem["split"], []).append(pid)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for number, (pid, problem) in enumerate(problems.items()):
        if problem.get("image"):
            path = folder / "images" / problem["split"] / pid / problem["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (number, 100, 200)).save(path)
    return folder


def same_files(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = sorted(path.name for path in folder.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def golden(shared):
    """The golden cases as (case, question, caption)."""
    prompts = json.loads((shared / "golden/text/prompts.json").read_text())
    for case in prompts["cases"]:
        problem = dict(prompts["problems"][case["qid"]])
        caption = problem.pop("caption") if case["use_caption"] else problem.pop("caption") and None
        question = Question(**{**problem, "choices": tuple(problem["choices"])})
        yield case, question, caption


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says it is a black-and-white picture of that size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
