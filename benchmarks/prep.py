"""Measures speed and memory of `lavin-ds prep` on sets of the real sizes.

    python benchmarks/prep.py --data ScienceQA --tokenizer tokenizer.model [--scale 0.1] [--json]

ScienceQA's size: 21,208 records and 10,332 images. The records and images of DATA are repeated, and every image file
has different bytes. Two baselines run on the same cores, in processes that are already warm: SentencePiece only encodes
the same texts, and Pillow only decodes and resizes the same images. The command's time includes its start. It must
reach at least 0.7 of the rate of the slower baseline.

The chatbot's size: 210,000 records, of which 158,000 have one of 81,000 images. The images are small, because this set
measures memory.

Memory is the proportional set size (PSS) of the command and its workers together, sampled every half second while
workers are running. The levels at 10%, 50% and 100% of that time are reported, as medians over a twentieth of it.
The exit code is 1 if a limit is exceeded. Memory may grow by a fifth after 10% of the time.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from lavin_ds.config import load_recipe
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep.scienceqa import ScienceQA

RECORDS, IMAGES = 21_208, 10_332
TEXT_RECORDS, IMAGE_RECORDS, CHAT_IMAGES = 52_000, 158_000, 81_000
SPEED_LIMIT, MEMORY_LIMIT = 0.7, 1.2
CHUNK = 256
PART_OF = 3  # baselines process every third text and image, before and after the command; the faster time counts
WORDS = "the a red blue map shows where north is and how water moves over two small hills near old towns"
CORES = len(os.sched_getaffinity(0))


def write_scienceqa(folder: Path, data: Path, records: int, images: int) -> Path:
    """A set of `records` records in the official layout, made from those of `data`. `images` of them have an image."""
    problems = json.loads((data / "problems.json").read_bytes())
    sources = {pid: data / "images" / p["split"] / pid / p["image"] for pid, p in problems.items() if p["image"]}
    with_image = [pid for pid in problems if pid in sources]
    without = [pid for pid in problems if pid not in sources]
    made = {}
    for number in range(records):
        has_image = number * images // records != (number + 1) * images // records  # spread evenly
        pids = with_image if has_image else without
        pid = pids[number % len(pids)]
        made[str(number)] = problems[pid] | {"split": "train"}
        if has_image:
            path = folder / "images" / "train" / str(number) / problems[pid]["image"]
            path.parent.mkdir(parents=True)
            path.write_bytes(sources[pid].read_bytes() + b"%d" % number)  # decoders ignore what is appended
    (folder / "problems.json").write_text(json.dumps(made))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(made)}))
    return folder


def write_chat(folder: Path, scale: float) -> None:
    """Writes Alpaca and LLaVA files of random sentences, and small pictures."""
    rng = random.Random(0)
    words = WORDS.split()

    def sentence(n: int) -> str:
        return " ".join(rng.choices(words, k=n)).capitalize() + "."

    alpaca = [
        {"instruction": sentence(12), "input": sentence(8), "output": sentence(50)}
        for _ in range(int(TEXT_RECORDS * scale))
    ]
    images = int(CHAT_IMAGES * scale)
    llava = []
    for number in range(int(IMAGE_RECORDS * scale)):
        said = [("human", f"<image>\n{sentence(10)}"), ("gpt", sentence(60))]
        turns = [{"from": who, "value": text} for who, text in said]
        name = number % images
        llava.append({"id": str(name), "image": f"{name % 100:02d}/{name}.png", "conversations": turns})
    pool = []
    for shade in range(50):
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 20 + shade).convert("RGB").save(buffer, "PNG")
        pool.append(buffer.getvalue())
    for name in range(images):
        path = folder / "images" / f"{name % 100:02d}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pool[name % len(pool)] + b"%d" % name)
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "llava.json").write_text(json.dumps(llava))


def texts_of(data: Path) -> list[str]:
    """Every prompt and response that the command encodes."""
    config = load_recipe("lavin-7b")
    source = ScienceQA(data, ("train",), config.data.prompt_format, False, False)
    texts = []
    for listed in source.listing().splits["train"]:
        [turn] = source.read(listed).texts[0].turns
        texts += [turn.prompt(turn.context), turn.response]
    return texts


def start(tokenizer: Path) -> None:
    """Initialises a baseline process, before the timing starts."""
    global model
    model = Tokenizer(tokenizer)


def encode(texts: list[str]) -> int:
    return sum(map(len, model.encode_batch(texts)))


def decode(paths: list[Path]) -> int:
    size, how = (224, 224), Image.Resampling.BICUBIC
    return sum(np.asarray(Image.open(path).convert("RGB").resize(size, how)).nbytes for path in paths)


def seconds_of(pool, work, items: list, chunk: int) -> float:
    parts = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    began = time.perf_counter()
    assert sum(pool.imap_unordered(work, parts)) > 0
    return time.perf_counter() - began


def baselines(pool, texts: list[str], paths: list[Path]) -> tuple[float, float]:
    """Seconds for all texts and for all images, extrapolated from one in PART_OF."""
    text_seconds = seconds_of(pool, encode, texts[::PART_OF], CHUNK)
    return PART_OF * text_seconds, PART_OF * seconds_of(pool, decode, paths[::PART_OF], 16)


def run(command: list[str]) -> tuple[float, dict, list[float]]:
    """Runs `lavin-ds prep ...`. Returns its seconds, its summary, and its MiB (with workers) every half second."""
    began, samples = time.perf_counter(), []
    prep = "from lavin_ds.cli.main import run; run()"
    process = subprocess.Popen([sys.executable, "-c", prep, *command, "--json"], stdout=subprocess.PIPE, text=True)
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        workers = parent.children()
        with suppress(psutil.Error):  # a process ended meanwhile
            pss = [one.memory_full_info().pss for one in (parent, *workers)]
            if workers or CORES == 1:
                samples.append(sum(pss) / 2**20)
        time.sleep(0.5)
    seconds = time.perf_counter() - began
    stdout = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, json.loads(stdout), samples


def memory(samples: list[float]) -> dict:
    """MiB at 10%, 50% and 100% of a run, the peak, and the growth after 10%."""
    width = max(1, len(samples) // 20)
    levels = {}
    for percent in (10, 50, 100):
        end = min(len(samples), max(width, len(samples) * percent // 100 + width // 2))
        levels[f"mib_at_{percent}"] = statistics.median(samples[max(0, end - width) : end])
    after = samples[len(samples) // 10 :]
    return levels | {"mib_peak": max(samples), "growth": max(after) / levels["mib_at_10"]}


def measure_scienceqa(work: Path, data: Path, tokenizer: Path, scale: float) -> dict:
    records, images = int(RECORDS * scale), int(IMAGES * scale)
    made = write_scienceqa(work / "scienceqa", data, records, images)
    paths = sorted(made.glob("images/*/*/*"))
    texts = texts_of(made)
    out = work / "shards"
    words = ["prep", "scienceqa", "--data", made, "--tokenizer", tokenizer, "--out", out]
    with multiprocessing.get_context("spawn").Pool(CORES, start, (tokenizer,)) as pool:
        pool.map(encode, [texts[:CHUNK]] * CORES * 2)
        pool.map(decode, [paths[:8]] * CORES * 2)
        before = baselines(pool, texts, paths)
        seconds, summary, samples = run([*map(str, words), "--workers", str(CORES)])
        after = baselines(pool, texts, paths)
    text_seconds, image_seconds = map(min, before, after)
    shutil.rmtree(out)
    shutil.rmtree(made)
    rates = {"sentencepiece": records / text_seconds, "pillow": records / image_seconds, "prep": records / seconds}
    return {
        "set": "ScienceQA's size",
        "records": records,
        "images": summary["images"],
        "seconds": seconds,
        "samples_per_second": rates,
        "ratio": rates["prep"] / min(rates["sentencepiece"], rates["pillow"]),
        **memory(samples),
    }


def measure_chat(work: Path, tokenizer: Path, scale: float) -> dict:
    folder, out = work / "chat", work / "chat-shards"
    write_chat(folder, scale)
    words = ["prep", "instruct", "--alpaca", folder / "alpaca.json", "--llava", folder / "llava.json"]
    words += ["--images", folder / "images", "--tokenizer", tokenizer, "--out", out, "--recipe", "chatbot-13b"]
    words += ["model.vision.image_size=56", "--workers", CORES]
    seconds, summary, samples = run([*map(str, words)])
    records = summary["splits"]["train"]["records"]
    shutil.rmtree(out)
    shutil.rmtree(folder)
    named = {"set": "the chatbot's size", "records": records, "images": summary["images"], "seconds": seconds}
    return named | {"samples_per_second": {"prep": records / seconds}, **memory(samples)}


def main(
    data: Annotated[Path, typer.Option(help="ScienceQA, or a part of it, in its official layout.")],
    tokenizer: Annotated[Path, typer.Option(help="LLaMA's tokenizer.model.")],
    scale: Annotated[float, typer.Option(help="Fraction of the real sizes, for a trial.")] = 1.0,
    sets: Annotated[str, typer.Option(help="Sets to run: scienceqa, chat, or both.")] = "scienceqa,chat",
    folder: Annotated[Path | None, typer.Option(help="Where to write, about 4 GB; removed afterwards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure speed and memory of prep."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        measured = []
        if "scienceqa" in sets:
            measured.append(measure_scienceqa(Path(work), data, tokenizer, scale))
        if "chat" in sets:
            measured.append(measure_chat(Path(work), tokenizer, scale))
    passed = all(one.get("ratio", 1) >= SPEED_LIMIT and one["growth"] <= MEMORY_LIMIT for one in measured)
    if as_json:
        print(json.dumps({"cores": CORES, "passed": passed, "sets": measured}, indent=2))
    else:
        show(measured)
    raise typer.Exit(0 if passed else 1)


def show(measured: list[dict]) -> None:
    console = Console()
    for one in measured:
        title = (
            f"{one['set']}: {one['records']:,} records, {one['images']:,} images, {CORES} cores, {one['seconds']:.0f} s"
        )
        speed = Table(title=title)
        for column in ("", "samples per second", f"prep's ratio (at least {SPEED_LIMIT} of the slower)"):
            speed.add_column(column, justify="left" if not column else "right")
        rates = one["samples_per_second"]
        for name, rate in rates.items():
            speed.add_row(name, f"{rate:,.0f}", f"{rates['prep'] / rate:.2f}" if name != "prep" else "")
        console.print(speed)
        levels = ", ".join(f"{one[f'mib_at_{percent}']:,.0f} at {percent}%" for percent in (10, 50, 100))
        growth = f"x {one['growth']:.2f} after 10% (limit {MEMORY_LIMIT})"
        console.print(f"MiB: {levels}; peak {one['mib_peak']:,.0f}; {growth}\n", highlight=False)


if __name__ == "__main__":
    typer.run(main)
