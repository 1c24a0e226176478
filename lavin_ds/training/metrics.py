"""What a run writes down while it trains, and what it cost when it is done."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lavin_ds.files import write_atomically
from lavin_ds.training.loop import StepResult


class MetricsFile:
    """RUN/metrics.jsonl: one line an optimizer step. Lines behind the step a run resumes from are dropped."""

    def __init__(self, path: Path, done_steps: int):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= done_steps]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()

    def add(self, result: StepResult) -> None:
        self._file.write(json.dumps(asdict(result)) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The steps written down, in order; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Peak bytes so far: of the largest rank's resident set, of all ranks together, and of the fullest device.

    Every rank must call it.
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    allocated = 0 if device.type == "cpu" else get_accelerator().max_memory_allocated()
    largest = torch.tensor([resident, allocated], dtype=torch.int64, device=device)
    total = torch.tensor(resident, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {
        "peak_rss_bytes": int(largest[0]),
        "peak_rss_bytes_all_ranks": int(total),
        "peak_device_bytes": int(largest[1]) if device.type != "cpu" else None,
    }


def plot_loss(metrics: list[dict], path: Path) -> None:
    """The loss curve with the learning rate behind it, as a PNG."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    rate_axis = axis.twinx()
    rate_axis.fill_between(steps, [m["learning_rate"] for m in metrics], color="0.92")
    rate_axis.set_ylabel("learning rate", color="0.5")
    axis.set_zorder(1)
    axis.patch.set_visible(False)
    axis.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axis.plot(steps, _smooth(losses), color="tab:blue", linewidth=2, label="moving average")
    axis.set(xlabel="optimizer step", ylabel="loss a labelled token (nats)", ylim=(0, None))
    axis.legend(loc="upper right")
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    plt.close(figure)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smooth, average, mass = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smooth.append(average / mass)
    return smooth
