"""Records a run's metrics, measures its peak memory and plots its loss."""

from __future__ import annotations

import itertools
import json
import math
import resource
from dataclasses import asdict
from pathlib import Path

import deepspeed
import matplotlib
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lavin_ds.errors import UserError
from lavin_ds.files import write_atomically, write_json
from lavin_ds.run import read_metrics
from lavin_ds.training.loop import StepResult
from lavin_ds.training.validation import Scores


class MetricsFile:
    """RUN/metrics.jsonl: one line per optimizer step, with the keys of Scores if the step was validated.

    If a run resumes, the lines after the resumed step are dropped. A number that is not finite becomes null.
    """

    def __init__(self, path: Path, done_steps: int):
        self.path = path
        self._rewrite([line for line in read_metrics(path) if line["step"] <= done_steps])

    def _rewrite(self, lines: list[dict]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()

    def add(self, result: StepResult, scores: Scores | None) -> None:
        record = asdict(result) | (asdict(scores) if scores else {})
        if not result.skipped:
            del record["suspects"]
        try:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Free space and go on with --resume auto."
            ) from None

    def add_scores(self, step: int, scores: Scores) -> None:
        """Adds validation scores to the line of a step that was written without them."""
        self._file.close()
        added = _finite(asdict(scores))
        self._rewrite([line | added if line["step"] == step else line for line in read_metrics(self.path)])

    def close(self) -> None:
        self._file.close()


def _finite(record: dict) -> dict:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def write_suspects(run: Path) -> Path:
    """Writes RUN/suspects.json: for each of the skipped steps at the end, the samples that may be the cause."""
    metrics = read_metrics(run / "metrics.jsonl")
    in_a_row = itertools.takewhile(lambda m: m["skipped"], reversed(metrics))
    write_json(run / "suspects.json", {str(m["step"]): m["suspects"] for m in reversed(list(in_a_row))})
    return run / "suspects.json"


def write_to_monitors(
    engine: deepspeed.DeepSpeedEngine, step: int, result: StepResult | None, scores: Scores | None
) -> None:
    """Sends a step's values to the monitors that the DeepSpeed configuration enables, such as tensorboard or wandb."""
    if not engine.monitor.enabled:
        return
    values = {}
    if result:
        values |= {
            "train/loss": result.loss,
            "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.gradient_norm,
            "train/labelled_tokens_per_second": result.labelled_tokens / result.seconds,
            "train/skipped": float(result.skipped),
        }
    if scores:
        values["val/loss"] = scores.val_loss
        if scores.val_answer_accuracy is not None:
            values["val/answer_accuracy"] = scores.val_answer_accuracy
    engine.monitor.write_events([(name, value, step) for name, value in values.items()])


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Peak bytes so far: the largest resident set of a rank, the sum over all ranks, and the largest use of a device.

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
    """Draws the loss curve, with the learning rate behind it, as a PNG."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    validated = [m for m in metrics if "val_loss" in m]
    metrics = [m for m in metrics if not m["skipped"]]
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    rate_axis = axis.twinx()
    rate_axis.fill_between(steps, [m["learning_rate"] for m in metrics], color="0.92")
    rate_axis.set_ylabel("learning rate", color="0.5")
    axis.set_zorder(1)
    axis.patch.set_visible(False)
    axis.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axis.plot(steps, _smooth(losses), color="tab:blue", linewidth=2, label="moving average")
    if validated:
        steps, losses = [m["step"] for m in validated], [m["val_loss"] for m in validated]
        axis.plot(steps, losses, color="tab:orange", linewidth=2, marker="o", markersize=4, label="validation")
    axis.set(xlabel="optimizer step", ylabel="loss per labelled token (nats)", ylim=(0, None))
    axis.legend(loc="upper right")
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    plt.close(figure)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for the bias at its start."""
    smooth, average, mass = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smooth.append(average / mass)
    return smooth
