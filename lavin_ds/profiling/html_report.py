"""The cost report as one HTML file. Its pictures are embedded, and it loads nothing from elsewhere."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO

from lavin_ds.devices import GB
from lavin_ds.profiling import paper
from lavin_ds.profiling.plots import plot_memory, plot_timeline
from lavin_ds.profiling.report import LEGEND, Report
from lavin_ds.profiling.simulation import COMPONENTS

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
        picture("peak of each phase", lambda to: plot_memory(report, to)),
        picture("memory over one step", lambda to: plot_timeline(report.memory, f"{report.config.name}: one step", to)),
    ]
    if report.published:
        from lavin_ds.profiling.published.section import html_section

        parts.append(html_section(report.published, report.config.name))
    parts += ["<h2>Parameters and files</h2>", _parameters(report)]
    parts += ["<h2>Notes</h2>", _list(report.notes())]
    parts += ["<h2>Where the sources disagree</h2>", _list(paper.DISAGREEMENTS), "</body></html>"]
    return "\n".join(parts) + "\n"


def table(caption: str, headings: list[str], rows: list[str]) -> str:
    head = "".join(f"<th{' class=text' if heading == 'What' else ''}>{escape(heading)}</th>" for heading in headings)
    return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{''.join(rows)}</table>"


def table_row(cells: list[str], kind: str = "") -> str:
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _costs(report: Report) -> str:
    rows = []
    for row in report.rows():
        cells = [
            escape(cell.text) + (f' <span class="mark">{cell.mark}</span>' if cell.mark else "")
            for cell in row.cells.values()
        ]
        is_ours = not all(cell.mark in (None, "quoted") for cell in row.cells.values())
        rows.append(table_row([escape(row.method), *cells], "ours" if is_ours else ""))
    legend = _list([f"{mark}: {meaning}" for mark, meaning in LEGEND.items()])
    caption = "Quoted rows: on 8 x A100; lite rows on one GPU"
    return table(caption, ["Method", "#T-Params", "Memory", "Time", "#Storage"], rows) + legend


def _components(report: Report) -> str:
    memory = report.memory
    unit, size = ("GB", GB) if memory.peak_bytes >= GB else ("MB", 1e6)
    rows = [
        f"<tr><td>{name}</td><td>{held / size:.2f}</td><td>{held / memory.peak_bytes:.1%}</td>"
        f'<td class="text">{escape(COMPONENTS[name])}</td></tr>'
        for name, held in memory.components.items()
    ]
    caption = f"At the peak, {memory.peak_bytes / size:.2f} {unit}, {memory.moment}"
    return table(caption, ["Component", unit, "Share", "What"], rows)


def _parameters(report: Report) -> str:
    count = report.parameters
    rows = [table_row([name.replace("_", " "), f"{number:,}"]) for name, number in count.components.items()]
    rows.append(table_row(["trainable", f"{count.trainable:,}"], "ours"))
    rows += [table_row([f"frozen {part}", f"{number:,}"]) for part, number in count.frozen.items()]
    rows.append(table_row(["adapter file, MB", f"{count.adapter_file_bytes / 1e6:.1f}"]))
    rows.append(table_row(["checkpoint to resume from, MB", f"{count.checkpoint_bytes / 1e6:.1f}"]))
    return table("Counted from the model", ["", "Parameters"], rows)


def picture(meaning: str, draw) -> str:
    image = BytesIO()
    draw(image)
    data = base64.b64encode(image.getvalue()).decode()
    return f'<p><img alt="{escape(meaning)}" src="data:image/png;base64,{data}"></p>'


def _list(items) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
