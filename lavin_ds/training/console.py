"""What a person sees of a run: one line that stays on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lavin_ds.training.loop import StepResult

PLAIN_LINE_SECONDS = 10
MIB = 2**20


class TrainingConsole:
    """Silent unless enabled, which is so on rank 0 alone."""

    def __init__(self, enabled: bool):
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self.progress: Progress | None = None
        self.task = None
        self.last_line = self.began = time.monotonic()
        self.first_step = 0

    def say(self, text: str) -> None:
        self.console.print(text)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning:[/] {text}")

    def begin(self, first_step: int, total_steps: int) -> None:
        self.first_step, self.began = first_step, time.monotonic()
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=total_steps, completed=first_step, status="")
        self.progress.start()

    def step(self, result: StepResult, total_steps: int) -> None:
        rate = result.labelled_tokens / result.seconds
        status = f"epoch {result.epoch:.2f}  loss {result.loss:.4f}  lr {result.learning_rate:.2e}"
        if result.gradient_norm is not None:
            status += f"  |g| {result.gradient_norm:.2g}"
        status += f"  {rate:,.0f} labels/s"
        if self.progress:
            self.progress.update(self.task, completed=result.step, status=status)
            return
        now, last = time.monotonic(), result.step == total_steps
        if last or now - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = now
            left = (total_steps - result.step) * (now - self.began) / (result.step - self.first_step)
            self.console.print(f"step {result.step}/{total_steps}  {status}  about {left:.0f} s left", soft_wrap=True)

    def finish(self, summary: dict, out: Path) -> None:
        self.close()
        table = Table(title="Training", show_header=False, title_justify="left")
        rows = [
            ("optimizer steps", f"{summary['steps']:,} ({summary['samples']:,} samples)"),
            ("last loss", f"{summary['final_loss']:.4f} nats a labelled token"),
            ("labels per second", f"{summary['labelled_tokens'] / summary['seconds']:,.0f}"),
            ("padding", f"{1 - summary['tokens'] / summary['padded_tokens']:.1%} of the tokens computed"),
            ("training time", f"{summary['seconds']:,.1f} s on {summary['ranks']} rank(s)"),
            ("peak memory", _memory(summary)),
            ("trainable parameters", f"{summary['trainable_parameters']:,}"),
            ("adapters", f"{out / 'adapter.safetensors'} ({summary['adapter_bytes'] / 1e6:.2f} MB)"),
            ("loss curve", str(out / "loss.png")),
        ]
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


def _memory(summary: dict) -> str:
    text = f"{summary['peak_rss_bytes'] / MIB:,.0f} MiB resident in the largest rank"
    if summary["peak_device_bytes"]:
        text += f", {summary['peak_device_bytes'] / MIB:,.0f} MiB on the device"
    return text
