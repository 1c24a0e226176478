"""`lavin-ds prep inspect`: what is in a shard directory, on one screen, and one sample as the model will see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lavin_ds.cli import console
from lavin_ds.config import load_recipe

if TYPE_CHECKING:
    import numpy as np

    from lavin_ds.data_prep.shard_report import Report, SampleView

STYLES = {
    "modality token": "bold magenta",
    "BOS": "bold yellow",
    "prefix": "yellow",
    "visual slot": "bold cyan",
    "prompt": "",
    "label": "green",
}
IMAGE_COLUMNS = 48  # width of a picture in the terminal; a character shows two pixels, one above the other


def inspect_shards(
    data: Annotated[Path, typer.Option(help="Shard directory.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe to compare the shards with.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the histogram and the sample; default: train, or the first.")
    ] = None,
    sample: Annotated[str | None, typer.Option(help="An id or a row's number; default: one with an image.")] = None,
    png: Annotated[Path | None, typer.Option(help="File for histograms of the lengths.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what is in a shard directory: counts, lengths, padding, the manifest, and a sample."""
    from lavin_ds.data.schema import check_manifest
    from lavin_ds.data_prep.shard_report import make_report, plot, view

    config = load_recipe(recipe, overrides or []) if recipe else None
    visual = config.model.visual_tokens if config else None
    batches = (config.training.global_batch, config.training.micro_batch) if config else (32, 4)
    report = make_report(data, visual, *batches)
    shown = view(data, split or ("train" if "train" in report.splits else next(iter(report.splits))), sample, visual)
    disagreements = check_manifest(report.manifest, config) if config else []
    if png:
        plot(report, png)
    if as_json:
        print(json.dumps(report.as_dict() | {"disagreements": disagreements, "sample": _as_dict(shown)}, indent=2))
        return
    out = console.out
    _show_manifest(report, out)
    out.print(_splits_table(report))
    _show_histogram(report, shown.split, out)
    out.print(
        Text.assemble(
            ("\ntokens that are not padding, per token computed", "bold"),
            f", global batch {report.global_batch}, micro-batches of {report.micro_batch}",
        )
    )
    out.print(_padding_table(report))
    _show_sample(shown, out)
    for clause in disagreements:
        console.err.print(
            f"disagrees with {recipe}: {clause}", style="red", highlight=False, soft_wrap=not console.err.is_terminal
        )
    if png:
        console.err.print(f"wrote {png}", highlight=False)


def _show_manifest(report: Report, out: Console) -> None:
    manifest, prompt = report.manifest, report.manifest.prompt
    images, features = manifest.images, manifest.features
    lines = {
        "made by": f"{manifest.created_by}, {manifest.kind}, schema {manifest.schema_version}",
        "size": f"{report.bytes / 1e6:,.1f} MB in {len(manifest.all_files())} files",
        "prompts": f"{prompt.format}, captions {'on' if prompt.captions else 'off'}, max_length {prompt.max_length}, "
        f"overlength {prompt.overlength}" + (f", compat {prompt.compat}" if prompt.compat else ""),
        "images": f"{images.rows:,} of {images.size} x {images.size}, {images.resize}" if images else "none",
        "features": f"{features.rows_per_image} x {features.width} an image, computed in {features.computed_in}, "
        f"CLIP {features.clip_sha256[:12]}"
        if features
        else "none",
        "tokenizer": f"{manifest.tokenizer.vocab_size:,} pieces, {manifest.tokenizer.sha256[:12]}",
        "rejects": ", ".join(f"{count:,} for {key}" for key, count in report.rejects.items()) or "none",
    }
    out.print(Text(str(report.directory), style="bold"))
    for name, line in lines.items():
        out.print(Text.assemble((f"  {name:<10}", "dim"), line), soft_wrap=True)


def _splits_table(report: Report) -> Table:
    """One row per split, at most 80 characters wide. Length outcomes that occur have a column."""
    from lavin_ds.data.schema import LengthCounts

    outcomes = [k for k in LengthCounts.model_fields if any(getattr(s.lengths, k) for s in report.splits.values())]
    outcomes = [outcome for outcome in outcomes if outcome != "whole"]
    headings = {"evaluation_only": "no labels"}
    caption = "median, mean, max: positions of a sample laid out for training"
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=caption)
    table.add_column("split", no_wrap=True)
    for heading in ("rows", "text", "image", "median", "mean", "max", "labels", *outcomes):
        table.add_column(headings.get(heading, heading), justify="right", no_wrap=True)
    for name, split in report.splits.items():
        counts = (split.rows, split.rows_text, split.rows_image, split.median, round(split.mean), split.longest)
        left = [getattr(split.lengths, outcome) for outcome in outcomes]
        cells = [f"{n:,}" for n in counts] + [f"{split.label_share:.0%}"] + [f"{n:,}" for n in left]
        table.add_row(name, *cells)
    return table


def _show_histogram(report: Report, split: str, out: Console) -> None:
    """One line per bin of lengths, from the first to the last with rows: a bar of text rows, then of image rows."""
    one, step = report.splits[split], report.bin_width
    limit = max(report.manifest.prompt.max_length, one.longest)
    totals = [t + i for t, i in zip(one.histogram_text, one.histogram_image, strict=True)]
    used = [k for k, total in enumerate(totals) if total]
    scale = max(10, min(60, out.width - 24)) / max(totals)
    out.print(Text.assemble((split, "bold"), " rows by positions: ", ("█ text ", "blue"), ("▒ image", "yellow")))
    for k in range(used[0], used[-1] + 1):
        text, image = one.histogram_text[k], one.histogram_image[k]
        bar = Text.assemble(("█" * round(text * scale), "blue"), ("▒" * round(image * scale), "yellow"))
        out.print(Text(f"  {k * step + 1:4}-{min((k + 1) * step, limit):<4} {totals[k]:>6,} ").append_text(bar))


def _padding_table(report: Report) -> Table:
    limit = report.manifest.prompt.max_length
    table = Table(box=box.SIMPLE, caption="with waiting: the time ranks wait for the slowest counts as computed tokens")
    for heading in ("ranks", f"padded to {limit}", "as training will", "with waiting", "packed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in report.padding:
        rest = (one.sampler, one.with_waiting, one.packed)
        table.add_row(str(one.ranks), f"{one.to_max_length:.2f}", *("-" if x is None else f"{x:.2f}" for x in rest))
    return table


def _show_sample(shown: SampleView, out: Console) -> None:
    out.print()
    out.print(
        Text.assemble(("sample ", "bold"), (shown.id, "bold"), f" of {shown.split}: {len(shown.tokens)} positions")
    )
    colored = out.color_system is not None
    for kind, first, last in shown.spans():
        where = f"{first}" if first == last else f"{first}-{last}"
        out.print(Text.assemble(f"  {where:>9}  ", (kind, STYLES[kind])))
    if shown.source:
        out.print(Text(f"  image {shown.source}"), soft_wrap=True)
    if shown.pixels is not None and colored:
        out.print(half_blocks(shown.pixels, min(IMAGE_COLUMNS, out.width)))
    out.print(token_text(shown, brackets=not colored), soft_wrap=not out.is_terminal)


def token_text(shown: SampleView, brackets: bool) -> Text:
    """The tokens as text, styled by kind. `brackets` mark the labels, for output without colours."""
    text = Text()
    for kind, first, last in shown.spans():
        special = kind in ("modality token", "BOS", "visual slot")
        pieces = [f"[{t.text}]" if special else t.text.replace("\n", "↵\n") for t in shown.tokens[first : last + 1]]
        joined = "".join(pieces)
        text.append(f"⟦{joined}⟧" if kind == "label" and brackets else joined, style=STYLES[kind])
    return text


def half_blocks(pixels_SS3: np.ndarray, columns: int) -> Text:
    """A picture with `columns` characters per line. Each character shows two pixels, one above the other."""
    import numpy as np
    from PIL import Image

    small = np.asarray(Image.fromarray(pixels_SS3).resize((columns, columns - columns % 2)))
    text = Text()
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for (r, g, b), (r2, g2, b2) in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", style=f"rgb({r},{g},{b}) on rgb({r2},{g2},{b2})")
        text.append("\n")
    return text


def _as_dict(shown: SampleView) -> dict:
    tokens = [{"position": i, "id": t.id, "text": t.text, "kind": t.kind} for i, t in enumerate(shown.tokens)]
    return {"id": shown.id, "split": shown.split, "image": shown.source, "tokens": tokens}
