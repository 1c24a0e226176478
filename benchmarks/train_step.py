"""Compares the authors' training step with ours, on the same weights and samples, at three distributions of lengths.

    python benchmarks/train_step.py                            # under 5 minutes on two idle cores
    python benchmarks/train_step.py --shares --plot docs/speed.png     # also each technique alone
    python benchmarks/train_step.py --quick                    # only checks that it runs, with small shapes

The model is a LLaMA of width 512 with 8 layers, a ViT with 3% of its arithmetic (ViT-L has 2% of LLaMA-7B's), and
adapters in both, in fp32. Micro-batches have 4 samples. 49% of the samples have an image, as in ScienceQA's train
split. The last 70% of a sample's positions are labelled. There are three cases of lengths:

    real      ScienceQA's, by the quantiles in samples.py; our claim is about these
    assumed   log-normal, median 171: an earlier assumption, too short
    worst     one micro-batch of 4 samples of 512 positions, all with an image

The baseline is PublishedLavin, in the same run: the authors' step, with samples in the given order. Our step is Lavin
on the micro-batches that the sampler deals and packs, as in recipe lavin-7b.

Time is that of one optimizer step (forward, backward, AdamW) on one thread. All variants take turns, and the fastest
repetition counts. Memory is the most that torch's CPU allocator holds, without weights and optimizer state.

The exit code is 1 if, at real lengths, our step is less than 2 times as fast or needs more than 0.4 of the memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from harness import MALLOC_THAT_KEEPS, interleaved, restart_with, show, table

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from memory_use import highest_allocation
from rich.console import Console
from rich.table import Table
from samples import FRAME, IMAGE_FRACTION, MICRO_BATCH, make_samples, real_lengths
from torch.profiler import ProfilerActivity, profile

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.data.collate import Batch, collate
from lavin_ds.data.layout import IGNORE
from lavin_ds.data.sampler import assign
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.profiling.published.model import SAVINGS, PublishedLavin, PublishedOptions

FASTER, LESS_MEMORY = 2.0, 0.4  # the claim, at real lengths
LONGEST = 512
ASSUMED_MEDIAN, ASSUMED_SPREAD = 171, 0.5  # the spread is the standard deviation of the logarithm
PUBLISHED = PublishedOptions(pad_to=LONGEST)

TECHNIQUES = {
    "pad_to": "similar lengths, not padded to 512",
    "full_logits": "only labelled logits, in chunks",
    "zero_images": "no ViT for text-only samples",
    "eager_attention": "attention without scores and mask",
    "per_sample_routing": "routing once per batch",
    "separate_paths": "both adapter paths in one product",
    "plain_autograd": "norms, SwiGLU keep one tensor",
}
OPTIONS = {  # off in lavin-7b; recipes do not offer the last one, because it gains nothing
    "ViT recomputed *": "padded, ViT recomputed",
    "ViT, half the layers recomputed *": "padded, half recomputed",
    "every block recomputed *": "padded, every block recomputed",
    "LLaMA blocks by torch.compile *": "padded, compiled",
}


def assumed_lengths(count: int) -> list[int]:
    quantile = statistics.NormalDist(np.log(ASSUMED_MEDIAN), ASSUMED_SPREAD).inv_cdf
    return [min(LONGEST, round(np.exp(quantile((i + 0.5) / count)))) for i in range(count)]


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


@dataclass(frozen=True)
class Variant:
    """One way to compute the step, on the micro-batches `batches`."""

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
        """The most bytes held during a micro-batch, without weights and optimizer state."""
        most_tokens = max(batch.ids_BT.numel() for batch in self.batches)
        longest = [batch for batch in self.batches if batch.ids_BT.numel() == most_tokens]
        # The largest is the one with the most tokens (and of those, the most images) or the one with the most images.
        images = lambda batch: int((batch.image_B >= 0).sum())  # noqa: E731
        largest = {id(batch): batch for batch in (max(longest, key=images), max(self.batches, key=images))}
        peak = max(allocated_peak(lambda b=batch: self.model(b)[0].backward()) for batch in largest.values())
        self.model.zero_grad()
        return peak


class Bench:
    """Variants on the same samples and weights. They share the tensors, so the learning rate is 0."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int], image_fraction: float = IMAGE_FRACTION):
        self.config = config
        visual, count = config.visual_tokens, len(lengths)
        rows, images = make_samples(config, lengths, image_fraction)
        ids = np.array([len(row.token_ids) + len(FRAME.head(row.has_image, visual)) for row in rows])
        shown = np.array([row.has_image for row in rows])
        dealt = assign(np.arange(count), ids, shown, 1, MICRO_BATCH)[0]
        in_order = np.arange(count).reshape(-1, MICRO_BATCH)
        packed = assign(np.arange(count), ids, shown, 1, MICRO_BATCH, packing=True)[0]
        self.dealt, self.in_order, self.packed = (
            [collate([rows[i] for i in part], images.__getitem__, FRAME, visual, packing) for part in parts]
            for parts, packing in ((dealt, False), (in_order, False), (packed, True))
        )
        self.weights = fill(Lavin(config)).state_dict()

    def ours(self) -> Variant:
        return self._variant(Lavin(self.config), self.packed)

    def padded(self, **options) -> Variant:
        return self._variant(Lavin(self.config, **options), self.dealt)

    def published(self, options: PublishedOptions = PUBLISHED) -> Variant:
        batches = self.dealt if options.pad_to is None else self.in_order
        return self._variant(PublishedLavin(self.config, options), batches)

    def _variant(self, model: Lavin, batches: list[Batch]) -> Variant:
        model.load_state_dict(self.weights, assign=True)
        trainable = model.trainable()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        return Variant(model, torch.optim.AdamW(trainable.values(), lr=0.0), batches)

    def every_technique(self) -> dict[str, Variant]:
        """The baseline with each technique, our padded step without each, and options that trade time for memory."""
        every = PUBLISHED.without(*SAVINGS)
        variants = {"published": self.published(), "ours": self.ours(), "padded": self.padded()}
        for name in SAVINGS:
            variants[f"published, {name} saved"] = self.published(PUBLISHED.without(name))
            costly = replace(every, **{name: getattr(PUBLISHED, name)})
            variants[f"padded, {name} as published"] = self.published(costly)
        with_gradients = variants["padded, frozen weights with gradients"] = self.padded()
        with_gradients.model.requires_grad_(True)
        for name, value in (("ViT", "vision"), ("half", self.config.llm.n_layers // 2), ("every block", True)):
            variants[f"padded, {name} recomputed"] = self.padded(activation_checkpointing=value)
        compiled = variants["padded, compiled"] = self.padded()
        for block in compiled.model.llm.layers:
            block.compile(dynamic=True)
        compiled.step()  # compiles here, which takes a minute
        return variants


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
    """The most bytes that torch's CPU allocator holds during `work`, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return highest_allocation(profiler)


@torch.no_grad()
def check_same_function(variants: dict[str, Variant], batch: Batch) -> None:
    """Checks that all variants have the same loss on the same padded samples, without dropout."""
    losses = {}
    for name, variant in variants.items():
        losses[name] = float(variant.model.eval()(batch)[0])
        variant.model.train()
    for name, loss in losses.items():
        if abs(loss / losses["ours"] - 1) > 1e-5:
            raise RuntimeError(f"{name} has loss {loss}, ours {losses['ours']}: they do not compute the same step")


def measure(bench: Bench, variants: dict[str, Variant], repetitions: int, console: Console) -> dict[str, dict]:
    """By variant: seconds of the fastest step, and peak bytes without weights and optimizer state."""
    with console.status("") as status:
        status.update("checking that all variants have the same loss")
        check_same_function(variants, bench.dealt[-1])
        peaks = {}
        for name, variant in variants.items():
            status.update(f"memory, {name}")
            peaks[name] = variant.peak_bytes()
        steps = {name: variant.step for name, variant in variants.items()}
        seconds = interleaved(steps, repetitions, lambda name: status.update(f"time, {name}"))
    return {name: {"seconds": min(seconds[name]), "every_step": seconds[name], "bytes": peaks[name]} for name in steps}


def compare(case: str, bench: Bench, repetitions: int, console: Console) -> dict:
    """The published step and ours at one distribution of lengths."""
    console.print(f"lengths: {case}")
    measured = measure(bench, {"published": bench.published(), "ours": bench.ours()}, repetitions, console)
    published, ours = measured["published"], measured["ours"]
    return {
        "case": case,
        "times_as_fast": published["seconds"] / ours["seconds"],
        "share_of_memory": ours["bytes"] / published["bytes"],
        "measured": measured,
    }


def shares(measured: dict[str, dict]) -> list[dict]:
    """By technique: the ratio of our padded step without it to our padded step ("without"), and the ratio of the
    baseline to the baseline with it ("alone").

    A ratio is a pair (time, memory), the costlier step over the cheaper one; None if it makes no sense.
    """

    def ratio(costly: str, cheap: str) -> tuple[float, float]:
        return tuple(measured[costly][unit] / measured[cheap][unit] for unit in ("seconds", "bytes"))

    rows = [{"technique": "packed: no padding at all", "without": ratio("padded", "ours"), "alone": None}]
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
    rows += [{"technique": words, "without": ratio("padded", key), "alone": None} for words, key in OPTIONS.items()]
    return rows


def shares_table(rows: list[dict]) -> Table:
    def cells(row: dict) -> list[str]:
        values = [*row["without"], *(row["alone"] or (None, None))]
        return [row["technique"], *("" if value is None else f"{value:.2f}" for value in values)]

    return table(
        "What each technique is worth, 8 samples of real lengths",
        ("", "without\ntime", "without\nmemory", "alone\ntime", "alone\nmemory"),
        list(map(cells, rows)),
        caption="without: our padded step without the technique (with it = 1); alone: the baseline (with only this "
        "technique = 1). First row: padded (packed = 1). * off in lavin-7b: padded without it (with it = 1)",
    )


def cases_table(cases: list[dict], vocabulary: int) -> Table:
    def cells(case: dict) -> list[str]:
        published, ours = case["measured"]["published"], case["measured"]["ours"]
        seconds = [f"{one['seconds']:.2f}" for one in (published, ours)]
        megabytes = [f"{one['bytes'] / 1e6:,.0f}" for one in (published, ours)]
        return [case["case"], *seconds, f"{case['times_as_fast']:.2f}", *megabytes, f"{case['share_of_memory']:.2f}"]

    columns = (
        "lengths",
        "published\ns a step",
        "ours\ns a step",
        "times\nas fast",
        "published\nMB",
        "ours\nMB",
        "share",
    )
    caption = f"claim: at real lengths, at least {FASTER} times as fast with at most {LESS_MEMORY} of the memory"
    return table(f"A step as published and ours, vocabulary {vocabulary:,}", columns, list(map(cells, cases)), caption)


def plot(rows: list[dict], path: Path) -> None:
    """Bars of time and memory without each technique, divided by those with it."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    rows = [row for row in rows if row["technique"] not in OPTIONS]
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
    figure.savefig(path, dpi=150)


def main(
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 32000,
    samples: Annotated[int, typer.Option(help="Samples per step, a multiple of 4.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Timed steps per variant.")] = 2,
    with_shares: Annotated[bool, typer.Option("--shares", help="Also measure what each technique is worth.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Use small shapes, only to check that it runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Write a PNG of what each technique is worth.")
    ] = None,
) -> None:
    """Compare the published step with ours."""
    initialize_single_process()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    if quick:
        vocabulary, samples, repetitions = 256, MICRO_BATCH, 1
    config = config_of(vocabulary, dim=64, layers=1) if quick else config_of(vocabulary)
    cases = [
        compare("real", Bench(config, real_lengths(samples)), repetitions, console),
        compare("assumed", Bench(config, assumed_lengths(samples)), repetitions, console),
        compare("worst", Bench(config, [LONGEST] * MICRO_BATCH, image_fraction=1.0), repetitions, console),
    ]
    result, parts = {"vocabulary": vocabulary, "samples": samples, "cases": cases}, [cases_table(cases, vocabulary)]
    if with_shares:
        bench = Bench(config, real_lengths(min(samples, 8)))
        result["shares"] = shares(measure(bench, bench.every_technique(), repetitions, console))
        parts.append(shares_table(result["shares"]))
        if plot_file:
            plot(result["shares"], plot_file)
    result["passed"] = cases[0]["times_as_fast"] >= FASTER and cases[0]["share_of_memory"] <= LESS_MEMORY
    show(result, as_json, *parts)
    raise typer.Exit(0 if quick or result["passed"] else 1)


if __name__ == "__main__":
    restart_with(MALLOC_THAT_KEEPS)
    typer.run(main)
