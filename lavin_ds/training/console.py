"""What a run prints: a live status line on a terminal, else a line every ten seconds; and a table at the end."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lavin_ds.training.loop import StepResult
from lavin_ds.training.validation import Scores

PLAIN_LINE_SECONDS = 10
GAP = "  "
MIB, GIB = 2**20, 2**30


class TrainingConsole:
    """Prints on rank 0. On other ranks `enabled` is false, and it prints nothing."""

    def __init__(self, enabled: bool, peak_share: Callable[[StepResult], float | None] = lambda _: None):
        """peak_share: returns the share of the device's peak FLOP/s that a step reached; None if that is unknown."""
        self.peak_share = peak_share
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self.live: Live | None = None
        self.line: _Line | None = None
        self.last_printed = 0.0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        self.console.print(f"[red]error:[/] {escape(text)}", soft_wrap=True)

    def begin(self, first_step: int, total_steps: int) -> None:
        self.line = _Line(first_step, total_steps, self.peak_share)
        self.last_printed = time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            self.live = Live(self.line, console=self.console, refresh_per_second=4)
            self.live.start()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows `what` in the status line while the body runs between two steps."""
        self.line.doing = what
        yield
        self.line.doing = "training"

    def step(self, result: StepResult, scores: Scores | None) -> None:
        line = self.line
        line.result = result
        if scores:
            line.scores = scores
        if result.skipped:
            line.skipped += 1
            why = f"metrics.jsonl names {len(result.suspects)} suspected samples"
            if not result.suspects:
                why = "fp16 overflowed, so the loss scale is halved"
            self.warn(f"step {result.step} skipped: loss {result.loss}, gradient norm {result.gradient_norm}; {why}")
        if self.live:
            return
        now, last = time.monotonic(), result.step == line.total_steps
        if scores or last or now - self.last_printed > PLAIN_LINE_SECONDS:
            self.last_printed = now
            self.console.print(GAP.join(line.fields()), soft_wrap=True)

    def finish(self, summary: dict, out: Path) -> None:
        self.close()
        table = Table(title="Training", show_header=False, title_justify="left")
        rows = [
            ("optimizer steps", f"{summary['steps']:,} ({summary['samples']:,} samples)"),
            ("last loss", _loss(summary["final_loss"])),
        ]
        if summary["skipped_steps"]:
            rows.append(("skipped", f"{summary['skipped_steps']:,} steps without a finite loss or gradient"))
        if summary["validation"]:
            rows += [(f"{name} validation", _validated(summary["validation"][name])) for name in ("last", "best")]
        rows += [
            ("tokens per second", f"{summary['tokens'] / summary['seconds']:,.0f}"),
            ("padding", f"{1 - summary['tokens'] / summary['padded_tokens']:.1%} of the tokens computed"),
            ("training time", f"{_duration(summary['seconds'])} on {summary['ranks']} rank(s)"),
            ("peak memory", _memory(summary)),
            ("trainable parameters", f"{summary['trainable_parameters']:,}"),
            ("adapters", f"{out / 'adapter.safetensors'} ({summary['adapter_bytes'] / 1e6:.2f} MB)"),
        ]
        if (best := out / "adapter-best.safetensors").is_file():
            rows.append(("adapters, best validation", str(best)))
        rows.append(("loss curve", str(out / "loss.png")))
        for name, text in rows:
            table.add_row(name, Text(text, overflow="fold"))
        self.console.print(table)

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


class _Line:
    """The status line. On a terminal it shows as many of the first fields as fit the width."""

    def __init__(self, first_step: int, total_steps: int, peak_share: Callable[[StepResult], float | None]):
        self.peak_share = peak_share
        self.first_step, self.total_steps = first_step, total_steps
        self.began = time.monotonic()
        self.doing = "training"
        self.result: StepResult | None = None
        self.scores: Scores | None = None
        self.skipped = 0

    def fields(self) -> list[str]:
        r = self.result
        if r is None:
            return [f"{self.doing}: step {self.first_step}/{self.total_steps}"]
        left = (self.total_steps - r.step) * (time.monotonic() - self.began) / (r.step - self.first_step)
        fields = [
            f"step {r.step}/{self.total_steps}",
            f"loss {r.loss:.4f}",
            f"{_duration(left)} left",
            f"epoch {r.epoch:.2f}",
            f"lr {r.learning_rate:.2e}",
            f"|g| {r.gradient_norm:.2g}",
            f"{r.tokens / r.seconds:,.0f} tokens/s",
            f"{_peak_memory() / GIB:.1f} GiB",
        ]
        share = self.peak_share(r)
        if share is not None:
            fields.append(f"{share:.0%} of peak FLOP/s")
        if self.scores:
            fields.insert(2, f"val {self.scores.val_loss:.4f}" + _percent(self.scores.val_answer_accuracy))
        if self.skipped:
            fields.insert(1, f"{self.skipped} skipped")
        if self.doing != "training":
            fields.insert(0, self.doing)
        return fields

    def __rich_console__(self, console: Console, options):
        text = ""
        for field in self.fields():
            longer = f"{text}{GAP}{field}" if text else field
            if len(longer) > options.max_width:
                break
            text = longer
        yield Text(text, no_wrap=True, overflow="crop")


def _peak_memory() -> int:
    """Peak bytes on this rank's device; on a CPU, of its resident set."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f} nats per labelled token"


def _validated(record: dict) -> str:
    return f"{_loss(record['val_loss'])}{_percent(record['val_answer_accuracy'])}, step {record['step']:,}"


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f" ({accuracy:.1%} right)"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _memory(summary: dict) -> str:
    text = f"{summary['peak_rss_bytes'] / MIB:,.0f} MiB resident in the largest rank"
    if summary["peak_device_bytes"]:
        text += f", {summary['peak_device_bytes'] / MIB:,.0f} MiB on the device"
    return text
