"""The cost report as one HTML file that asks for nothing else: its pictures are in it."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO

from lavin_ds.devices import GB
from lavin_ds.profiling import paper
from lavin_ds.profiling.memory import COMPONENTS
from lavin_ds.profiling.plots import plot_memory, plot_savings, plot_timeline
from lavin_ds.profiling.report import LEGEND, Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 } caption { text-align: left; color: #666; padding-bottom: .3rem }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right } th:first-child, td:first-child
{ text-align: left } .text { text-align: left } td.text { color: #666 }
tr.ours { font-weight: 600; background: #f3f7fb }
.mark { font-size: .75rem; color: #888; font-weight: 400 } img { max-width: 100%; height: auto } li { margin: .3rem 0 }
"""


def html_report(report: Report) -> str:
    """The whole page."""
    name = escape(report.config.name)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>Cost of {name}</title><style>{STYLE}</style></head><body>',
        f"<h1>What {name} costs on {report.gpus} x {escape(report.device.name)}</h1>",
        f"<p>{escape(report.config.source)}</p>",
        _costs(report),
        "<h2>Memory of one rank</h2>",
        _components(report),
        _picture("peak of each phase", lambda to: plot_memory(report, to)),
        _picture(
            "memory over one step", lambda to: plot_timeline(report.memory, f"{report.config.name}: one step", to)
        ),
    ]
    if report.published:
        title = f"{report.config.name}: from the authors' way to ours"
        parts += ["<h2>Against the authors' way</h2>", _stages(report)]
        parts.append(_picture("what each saving takes off", lambda to: plot_savings(report.published, title, to)))
    parts += ["<h2>Parameters and files</h2>", _parameters(report)]
    parts += ["<h2>What must be known</h2>", _list(report.notes())]
    parts += ["<h2>Where the sources disagree</h2>", _list(paper.DISAGREEMENTS), "</body></html>"]
    return "\n".join(parts) + "\n"


def _table(caption: str, headings: list[str], rows: list[str]) -> str:
    head = "".join(f"<th{' class=text' if heading == 'What' else ''}>{escape(heading)}</th>" for heading in headings)
    return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{''.join(rows)}</table>"


def _row(cells: list[str], kind: str = "") -> str:
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _costs(report: Report) -> str:
    rows = []
    for row in report.rows():
        cells = [
            escape(cell.text) + (f' <span class="mark">{cell.mark}</span>' if cell.mark else "")
            for cell in row.cells.values()
        ]
        is_ours = not all(cell.mark in (None, "quoted") for cell in row.cells.values())
        rows.append(_row([escape(row.method), *cells], "ours" if is_ours else ""))
    legend = _list([f"{mark}: {meaning}" for mark, meaning in LEGEND.items()])
    caption = "Quoted rows: 8 x A100, lite on one GPU"
    return _table(caption, ["Method", "#T-Params", "Memory", "Time", "#Storage"], rows) + legend


def _components(report: Report) -> str:
    memory = report.memory
    unit, size = ("GB", GB) if memory.peak_bytes >= GB else ("MB", 1e6)
    rows = [
        f"<tr><td>{name}</td><td>{held / size:.2f}</td><td>{held / memory.peak_bytes:.1%}</td>"
        f'<td class="text">{escape(COMPONENTS[name])}</td></tr>'
        for name, held in memory.components.items()
    ]
    caption = f"At the peak, {memory.peak_bytes / size:.2f} {unit}, {memory.moment}"
    return _table(caption, ["Component", unit, "Share", "What"], rows)


def _stages(report: Report) -> str:
    rows = [
        _row(
            [
                escape(stage.name),
                f"{stage.full_bytes / GB:.2f}",
                f"{stage.average_bytes / GB:.2f}",
                f"{stage.average_flops / 1e12:.1f}",
            ]
        )
        for stage in report.published.stages
    ]
    headings = ["Each keeps those above it", "full micro-batch, GB", "average micro-batch, GB", "its TFLOP"]
    return _table("Tensors at the peak of a step, simulated", headings, rows)


def _parameters(report: Report) -> str:
    count = report.parameters
    rows = [_row([name.replace("_", " "), f"{number:,}"]) for name, number in count.components.items()]
    rows.append(_row(["trainable", f"{count.trainable:,}"], "ours"))
    rows += [_row([f"frozen {part}", f"{number:,}"]) for part, number in count.frozen.items()]
    rows.append(_row(["adapter file, MB", f"{count.adapter_file_bytes / 1e6:.1f}"]))
    rows.append(_row(["checkpoint to resume from, MB", f"{count.checkpoint_bytes / 1e6:.1f}"]))
    return _table("Exact", ["", "Parameters"], rows)


def _picture(meaning: str, draw) -> str:
    image = BytesIO()
    draw(image)
    data = base64.b64encode(image.getvalue()).decode()
    return f'<p><img alt="{escape(meaning)}" src="data:image/png;base64,{data}"></p>'


def _list(items) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
