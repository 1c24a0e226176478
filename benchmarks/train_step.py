"""A training step the authors' way and ours, on the same weights and samples, and what each difference is worth.

    python benchmarks/train_step.py [--vocabulary N] [--repetitions N] [--json] [--plot FILE]

The model: a LLaMA of width 512 with 8 layers, a ViT of 3% of its arithmetic (ViT-L has 2% of LLaMA-7B's), adapters in
both, fp32. The data: the paper's global batch of 32 samples in micro-batches of 4; lengths log-normal around 171
positions, cut at 512; 49% with an image, as in ScienceQA's train split; the last 70% of a sample's positions labelled.

The baseline, in the same run, is PublishedLavin (lavin_ds/profiling/published.py) with its samples in the order they
come. Ours is Lavin on the micro-batches that the sampler deals and packs, as in recipe lavin-7b; "padded" is the same
without packing. Every other difference is measured twice: taken out of padded, and put alone into the baseline.

Time is of one optimizer step (forward, backward, AdamW) on one thread: the fastest of repetitions in which all variants
take turns, as whatever else the machine does only adds. glibc keeps freed memory, as a GPU's allocator does. Memory is
the highest that torch's CPU allocator holds beside weights and optimizer state.

Exit code 1 if ours is less than 3 times as fast or needs more than 0.4 of the memory.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns on stdout that it found no other

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.data.collate import Batch, collate
from lavin_ds.data.layout import IGNORE, Frame
from lavin_ds.data.sampler import assign
from lavin_ds.data.shards import Row
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.profiling.measure import MALLOC_THAT_KEEPS, highest_allocation
from lavin_ds.profiling.published import SAVINGS, PublishedLavin, PublishedOptions

FASTER, LESS_MEMORY = 3.0, 0.4
LENGTH, MEDIAN_LENGTH, LENGTH_SPREAD = 512, 171, 0.5  # positions; the last is sigma of the logarithm
IMAGE_FRACTION, LABELLED_FRACTION = 0.49, 0.7
MICRO_BATCH = 4
FRAME = Frame(bos=1, prefix_image=(3, 4, 5), prefix_text=(3, 4, 5, 6, 7))  # as many as LLaMA's tokenizer makes
PUBLISHED = PublishedOptions(pad_to=LENGTH)

TECHNIQUES = {
    "pad_to": "like lengths, not padded to 512",
    "full_logits": "only labelled logits, in chunks",
    "zero_images": "no ViT for text-only samples",
    "eager_attention": "attention without scores and mask",
    "per_sample_routing": "routing once a batch",
    "separate_paths": "both adapter paths in one product",
    "plain_autograd": "norms, SwiGLU keep one tensor",
}


OPTIONS = {  # off in lavin-7b; the last one is no option of a recipe, as it gains nothing
    "ViT recomputed *": "padded, ViT recomputed",
    "ViT, half the layers recomputed *": "padded, half recomputed",
    "every block recomputed *": "padded, every block recomputed",
    "LLaMA blocks by torch.compile *": "padded, compiled",
}


def config_of(vocabulary: int, dim: int = 512, layers: int = 8) -> ModelConfig:
    adapter = AdapterConfig(kind="mm")
    ffn = 32 * round(dim * 8 / 3 / 32)
    return ModelConfig(
        llm=LlamaConfig(dim=dim, n_layers=layers, n_heads=dim // 64, ffn_dim=ffn, vocab_size=vocabulary),
        vision=VisionConfig(width=128, layers=8, heads=2, patch_size=14, image_size=224, readout={"every": 4}),
        llm_adapter=adapter,
        vision_adapter=adapter,
        frozen_dtype="fp32",
    )


def make_samples(model: ModelConfig, count: int) -> tuple[list[Row], np.ndarray]:
    """Samples as the shards would hold them, of random ids, and their images [count, S, S, 3].

    Lengths are the quantiles of the distribution, so that few samples have its spread.
    """
    draw = np.random.default_rng(0)
    quantile = statistics.NormalDist(np.log(MEDIAN_LENGTH), LENGTH_SPREAD).inv_cdf
    lengths = [min(LENGTH, round(np.exp(quantile((i + 0.5) / count)))) for i in range(count)]
    shown = draw.permutation(count) < round(IMAGE_FRACTION * count)
    rows = []
    for number, place in enumerate(draw.permutation(count)):
        has_image = bool(shown[number])
        own = lengths[place] - 1 - len(FRAME.head(has_image, model.visual_tokens))
        ids = draw.integers(10, model.llm.vocab_size, own, dtype=np.int32)
        start = max(1, own - round(LABELLED_FRACTION * lengths[place]))
        spans = np.array([[start, own]], dtype=np.int32)
        image = number if has_image else -1
        rows.append(Row(str(number), ids, spans, ids[:start], image, has_image, False, 0, 2, "", ""))
    size = model.vision.image_size
    return rows, draw.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Variant:
    """One way to compute the step. `batches` are its micro-batches."""

    key: str
    model: Lavin
    optimizer: torch.optim.Optimizer
    batches: list[Batch]

    def step(self) -> None:
        labels = sum(int((batch.labels_BT != IGNORE).sum()) for batch in self.batches)
        for batch in self.batches:
            loss_sum, _ = self.model(batch)
            (loss_sum / labels).backward()
        self.optimizer.step()
        self.model.zero_grad()

    def peak_bytes(self) -> int:
        """Bytes held at most during a micro-batch beside weights and optimizer state."""
        return max(allocated_peak(lambda batch=batch: self.model(batch)[0].backward()) for batch in self.largest())

    def largest(self) -> list[Batch]:
        """The micro-batches of which one sets the peak; padded ones have equally many tokens, not images."""
        if len({batch.ids_BT.numel() for batch in self.batches}) > 1:
            return self.batches
        return [max(self.batches, key=lambda batch: int((batch.image_B >= 0).sum()))]


class Bench:
    """The variants, on the same weights: they share the tensors, and the learning rate is 0."""

    def __init__(self, vocabulary: int, samples: int = 32, **shape: int):
        self.config = config_of(vocabulary, **shape)
        visual = self.config.visual_tokens
        rows, images = make_samples(self.config, samples)
        ids = np.array([len(row.token_ids) + len(FRAME.head(row.has_image, visual)) for row in rows])
        shown = np.array([row.has_image for row in rows])
        dealt = assign(np.arange(samples), ids, shown, 1, MICRO_BATCH)[0]
        in_order = np.arange(samples).reshape(-1, MICRO_BATCH)
        packed = assign(np.arange(samples), ids, shown, 1, MICRO_BATCH, packing=True)[0]
        self.positions = ids + 1
        self.dealt, self.in_order, self.packed = (
            [collate([rows[i] for i in part], images.__getitem__, FRAME, visual, packing) for part in parts]
            for parts, packing in ((dealt, False), (in_order, False), (packed, True))
        )
        self.weights = fill(Lavin(self.config)).state_dict()

    def ours(self) -> Variant:
        return self._variant("ours", Lavin(self.config), self.packed)

    def padded(self, key: str = "padded", **options) -> Variant:
        return self._variant(key, Lavin(self.config, **options), self.dealt)

    def published(self, key: str, options: PublishedOptions) -> Variant:
        batches = self.dealt if options.pad_to is None else self.in_order
        return self._variant(key, PublishedLavin(self.config, options), batches)

    def _variant(self, key: str, model: Lavin, batches: list[Batch]) -> Variant:
        model.load_state_dict(self.weights, assign=True)
        trainable = model.trainable()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        return Variant(key, model, torch.optim.AdamW(trainable.values(), lr=0.0), batches)

    def variants(self, shares: bool) -> list[Variant]:
        """The baseline, ours, ours padded, and with `shares` each technique alone put in or taken out."""
        every = PUBLISHED.without(*SAVINGS)
        variants = [self.published("published", PUBLISHED), self.ours(), self.padded()]
        if not shares:
            return variants
        for name in SAVINGS:
            variants.append(self.published(f"published, {name} saved", PUBLISHED.without(name)))
            costly = replace(every, **{name: getattr(PUBLISHED, name)})
            variants.append(self.published(f"padded, {name} as published", costly))
        variants.append(self.published("every saving", every))
        with_gradients = self.padded("padded, frozen weights with gradients")
        with_gradients.model.requires_grad_(True)
        recomputed = [
            self.padded(f"padded, {name} recomputed", activation_checkpointing=value)
            for name, value in (("ViT", "vision"), ("half", self.config.llm.n_layers // 2), ("every block", True))
        ]
        compiled = self.padded("padded, compiled")
        for block in compiled.model.llm.layers:
            block.compile(dynamic=True)
        compiled.step()  # compiles now, a minute
        return [*variants, with_gradients, *recomputed, compiled]


def fill(model: Lavin) -> Lavin:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_("norm.weight" in name or ".ln_" in name and name.endswith("weight"))
    return model


def allocated_peak(work: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator holds at most during `work`, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return highest_allocation(profiler)


def check_same_function(variants: list[Variant], batch: Batch) -> None:
    """All variants have the same loss on the same samples, without dropout."""
    losses = {}
    for variant in variants:
        with torch.no_grad():
            losses[variant.key] = float(variant.model.eval()(batch)[0])
        variant.model.train()
    for key, loss in losses.items():
        if abs(loss / losses["ours"] - 1) > 1e-5:
            raise RuntimeError(f"{key} has loss {loss}, ours {losses['ours']}: they do not compute the same step")


def measure(variants: list[Variant], repetitions: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Seconds of the fastest step, and peak bytes beside weights and optimizer state, by variant."""
    task = progress.add_task("the same loss from every variant", total=len(variants) * (1 + repetitions))
    check_same_function(variants, variants[2].batches[-1])
    peaks, seconds = {}, {variant.key: [] for variant in variants}
    for variant in variants:
        progress.update(task, description=f"memory, {variant.key}")
        peaks[variant.key] = variant.peak_bytes()
        variant.model.zero_grad()
        progress.advance(task)
    for _ in range(repetitions):
        for variant in variants:
            progress.update(task, description=f"time, {variant.key}")
            began = time.perf_counter()
            variant.step()
            seconds[variant.key].append(time.perf_counter() - began)
            progress.advance(task)
    progress.remove_task(task)
    return {key: {"seconds": min(seconds[key]), "every_step": seconds[key], "bytes": peaks[key]} for key in seconds}


def shares(measured: dict[str, dict[str, float]]) -> list[dict]:
    """By technique: how many times the time and memory of padded is needed without it, and what it alone saves.

    A ratio is a pair (time, memory) of the costlier to the cheaper; None where it makes no sense.
    """

    def ratio(costly: str, cheap: str) -> tuple[float, float]:
        return tuple(measured[costly][unit] / measured[cheap][unit] for unit in ("seconds", "bytes"))

    rows = [{"technique": "no padding at all: packed", "without": ratio("padded", "ours"), "alone": None}]
    rows += [
        {
            "technique": words,
            "without": ratio(f"padded, {name} as published", "padded"),
            "alone": ratio("published", f"published, {name} saved"),
        }
        for name, words in TECHNIQUES.items()
    ]
    without = ratio("padded, frozen weights with gradients", "padded")
    rows.append({"technique": "frozen weights without gradients", "without": without, "alone": None})
    for words, key in OPTIONS.items():
        rows.append({"technique": words, "without": ratio("padded", key), "alone": None})
    return rows


def table(result: dict) -> Table:
    table = Table(
        title=f"Vocabulary {result['vocabulary']:,}: what each technique is worth",
        caption="without: of padded without it, padded = 1; alone: of the baseline, that with it alone = 1; "
        "* off in lavin-7b, padded with it = 1; of packing: padded, ours = 1",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for where in ("without", "alone"):
        for unit in ("time", "memory"):
            table.add_column(f"{where}\n{unit}", justify="right")
    for row in result["shares"]:
        cells = [*row["without"], *(row["alone"] or (None, None))]
        if row["technique"] == next(iter(OPTIONS)):
            table.add_section()
        table.add_row(row["technique"], *("" if cell is None else f"{cell:.2f}" for cell in cells))
    return table


def plot(result: dict, path: Path) -> None:
    """Bars: time and memory without each technique, as multiples of what they are with it."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    rows = [row for row in result["shares"] if row["technique"] not in OPTIONS]
    for number, (axes, unit) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("time", "memory"), strict=True)):
        values = [row["without"][number] for row in rows]
        axes.barh([row["technique"] for row in rows], [value - 1 for value in values], left=1, color=f"C{number}")
        for y, value in enumerate(values):
            axes.text(max(value, 1), y, f" {value:.2f}", va="center")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlim(min(0.9, min(values) - 0.05), max(values) * 1.15)
        axes.set_title(f"{unit} of a step without it, with it = 1", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis() if number == 0 else None
    faster, memory = result["times_as_fast"], result["share_of_memory"]
    figure.suptitle(
        f"vocabulary {result['vocabulary']:,}: as published takes {faster:.2f} times our time, "
        f"ours {memory:.2f} of its activation memory",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150)


def main(
    vocabulary: Annotated[int, typer.Option(help="Rows of the output matrix.")] = 32000,
    layers: Annotated[int, typer.Option(help="LLaMA layers; the claim is for 8.")] = 8,
    samples: Annotated[int, typer.Option(help="Samples of a step, a multiple of 4.")] = 32,
    repetitions: Annotated[int, typer.Option(help="Timed steps of every variant.")] = 3,
    with_shares: Annotated[bool, typer.Option("--shares/--no-shares", help="Every technique's own worth too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Where to draw the techniques' worth, PNG.")] = None,
) -> None:
    """Measure a step as published against ours."""
    initialize_single_process()
    torch.set_num_threads(1)
    bench = Bench(vocabulary, samples, layers=layers)
    with Progress(console=Console(stderr=True), disable=as_json, transient=True) as progress:
        measured = measure(bench.variants(with_shares), repetitions, progress)
    published, ours, padded = (measured[key] for key in ("published", "ours", "padded"))
    result = {
        "vocabulary": vocabulary,
        "layers": layers,
        "positions": sorted(bench.positions.tolist()),
        "times_as_fast": published["seconds"] / ours["seconds"],
        "share_of_memory": ours["bytes"] / published["bytes"],
        "shares": shares(measured) if with_shares else [],
        "measured": measured,
    }
    result["passed"] = result["times_as_fast"] >= FASTER and result["share_of_memory"] <= LESS_MEMORY
    if plot_file and with_shares:
        plot(result, plot_file)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        console = Console()
        if with_shares:
            console.print(table(result))
        console.print(
            f"As published: {published['seconds']:.2f} s and {published['bytes'] / 1e6:.0f} MB a step; ours: "
            f"{ours['seconds']:.2f} s and {ours['bytes'] / 1e6:.0f} MB. [bold]{result['times_as_fast']:.2f} times as "
            f"fast (at least {FASTER}), {result['share_of_memory']:.2f} of the memory (at most {LESS_MEMORY})[/bold]. "
            f"Padded: {published['seconds'] / padded['seconds']:.2f} times and "
            f"{padded['bytes'] / published['bytes']:.2f}."
        )
    raise typer.Exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    if not set(MALLOC_THAT_KEEPS.items()) <= set(os.environ.items()):  # glibc reads them as a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC_THAT_KEEPS)
    typer.run(main)
