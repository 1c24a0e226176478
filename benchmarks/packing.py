"""Seconds of a global batch's forward and backward passes: padded to 512, padded by work, packed.

    python benchmarks/packing.py [--rounds N] [--layers N] [--dim N] [--json]

A small LLaMA with MM-Adapters and random weights takes the same 32 text samples with ScienceQA's lengths in
micro-batches of 4, one rank. Ratios are of medians over the rounds, in which the ways take turns. The losses must agree
to 1e-5.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated

import numpy as np
import torch
import typer

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig
from lavin_ds.data.collate import Batch, collate
from lavin_ds.data.layout import Frame
from lavin_ds.data.sampler import assign, global_batch_indices
from lavin_ds.data.shards import Row
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.profiling.time import scienceqa

GLOBAL_BATCH, MICRO_BATCH, MAX_LENGTH, VOCABULARY = 32, 4, 512, 512
FRAME = Frame(bos=1, prefix_image=(5, 6, 7), prefix_text=(5, 6, 8, 9, 10))


def make_row(length: int, seed: int) -> Row:
    """A text sample of `length` ids once BOS and prefix stand before it."""
    own = length - len(FRAME.head(False, 0))
    tokens = np.random.default_rng(seed).integers(11, VOCABULARY, own).astype(np.int32)
    spans = np.array([[own // 3, own]], dtype=np.int32)
    return Row(str(seed), tokens, spans, tokens[: own // 3], -1, False, False, 0, 2, "", "")


def padded_to(batch: Batch, width: int) -> Batch:
    extra = (0, width - batch.ids_BT.shape[1])
    ids = torch.nn.functional.pad(batch.ids_BT, extra)
    labels = torch.nn.functional.pad(batch.labels_BT, extra, value=-100)
    return Batch(**{**vars(batch), "ids_BT": ids, "labels_BT": labels})


def batches(rows: list[Row], lengths: np.ndarray) -> dict[str, list[Batch]]:
    no_image, index = np.zeros(len(rows), dtype=bool), np.arange(len(rows))

    def made(pieces: list[np.ndarray], packing: bool = False) -> list[Batch]:
        return [collate([rows[i] for i in piece], lambda _: None, FRAME, 0, packing) for piece in pieces]

    return {
        "padded to 512 (authors)": [
            padded_to(batch, MAX_LENGTH - 1) for batch in made(np.split(index, len(rows) // MICRO_BATCH))
        ],
        "padded, equal work (default)": made(assign(index, lengths, no_image, 1, MICRO_BATCH)[0]),
        "packed": made(assign(index, lengths, no_image, 1, MICRO_BATCH, packing=True)[0], packing=True),
    }


def step(model: Lavin, parts: list[Batch]) -> tuple[float, float]:
    """Seconds and summed loss."""
    model.zero_grad()
    began, total = time.perf_counter(), 0.0
    for part in parts:
        loss, _ = model(part)
        loss.backward()
        total += loss.item()
    return time.perf_counter() - began, total


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    dim: Annotated[int, typer.Option(min=64)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure packing."""
    initialize_single_process()
    llm = LlamaConfig(dim=dim, n_layers=layers, n_heads=dim // 64, ffn_dim=dim * 11 // 4, vocab_size=VOCABULARY)
    model = Lavin(ModelConfig(llm=llm, llm_adapter=AdapterConfig(kind="mm", dropout=0.0), frozen_dtype="fp32"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02 + ("norm" in name))
    all_lengths = scienceqa(MAX_LENGTH).lengths - 1
    lengths = all_lengths[global_batch_indices(len(all_lengths), GLOBAL_BATCH, 0, 0)]
    ways = batches([make_row(int(n), seed) for seed, n in enumerate(lengths)], lengths)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, parts in ways.items():
            took, losses[name] = step(model, parts)
            seconds[name].append(took)
    medians = {name: statistics.median(took[1:]) for name, took in seconds.items()}
    computed = {name: sum(part.ids_BT.numel() for part in parts) for name, parts in ways.items()}
    slowest, agree = max(medians.values()), max(losses.values()) - min(losses.values()) < 1e-5 * max(losses.values())
    if as_json:
        print(json.dumps({"seconds": medians, "tokens_computed": computed, "losses": losses}, indent=2))
    else:
        for name, took in medians.items():
            print(f"{name:<30}{computed[name]:>8,} tokens {took:7.2f} s  {slowest / took:5.2f} times as fast")
    raise typer.Exit(0 if agree else 1)


if __name__ == "__main__":
    typer.run(main)
