"""A training run from its arguments to its exported adapters; what every rank executes."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from lavin_ds.config import RunConfig
from lavin_ds.data.schema import manifest_sha256
from lavin_ds.data.shards import ShardReader
from lavin_ds.errors import UserError
from lavin_ds.files import write_json
from lavin_ds.run import MONITORS, SPLIT, VALIDATION_SPLIT, Inputs, RunRecord, Start, hold, load_run
from lavin_ds.training import checkpoint
from lavin_ds.training.console import TrainingConsole
from lavin_ds.training.engine import build_engine
from lavin_ds.training.flops import peak_flops, step_flops
from lavin_ds.training.loop import Loop, StepResult, TrainingDiverged, TrainingStopped
from lavin_ds.training.metrics import (
    MetricsFile,
    peak_memory,
    plot_loss,
    read_metrics,
    write_suspects,
    write_to_monitors,
)
from lavin_ds.training.stop import StopSignal
from lavin_ds.training.validation import Scores, Validation
from lavin_ds.weights.adapter import base_warning, fill_trainable, save_adapter
from lavin_ds.weights.base import build_model

PACKAGES = (
    "lavin_ds",
    "torch",
    "deepspeed",
    "fairscale",
    "open_clip_torch",
    "safetensors",
    "pyarrow",
    "numpy",
)
EXIT_STOPPED = 143  # 128 + SIGTERM: stopped on request, state saved
EXIT_DIVERGED = 3  # too many steps in a row without a finite loss or gradient


def train(config: RunConfig, inputs: Inputs, out: Path, resume: bool, device: torch.device, stop: StopSignal) -> int:
    """Runs the training on this rank and returns the process's exit code. Process groups must exist.

    out: the run directory. resume: go on from its newest checkpoint, if there is one.

    Raises:
        UserError: on rank 0, the run directory is in use or cannot be written.
    """
    is_first = dist.get_rank() == 0
    console = TrainingConsole(is_first, peak_share=_peak_share(config, device))
    if device.type == "cuda" and peak_flops(device) is None:
        name = torch.cuda.get_device_name(device)
        console.say(f"lavin_ds/devices.py has no data sheet of {name}: the share of its peak rate is not shown.")
    try:
        with hold(out, console.warn) if is_first else nullcontext():
            return _train(config, inputs, out, resume, device, stop, console)
    finally:
        console.close()


def _train(
    config: RunConfig,
    inputs: Inputs,
    out: Path,
    resume: bool,
    device: torch.device,
    stop: StopSignal,
    console: TrainingConsole,
) -> int:
    began = datetime.now(timezone.utc)
    checkpoints = out / "checkpoints"
    is_first = dist.get_rank() == 0
    training = config.training
    console.say(f"Loading {config.name} on {dist.get_world_size()} {device.type} rank(s)")
    start = checkpoint.load_newest_on_all_ranks(checkpoints, console.warn) if resume else None
    init = None if start else inputs.init_adapter
    if init and is_first and (warning := base_warning(init, inputs.llama, inputs.clip)):
        console.warn(warning)
    model = build_model(config, inputs.llama, inputs.clip, init, device)
    at = start.at if start else checkpoint.START
    trainable = model.trainable()
    if start:
        fill_trainable(model, start.values(), where=f"The checkpoint of step {at.step}")
        console.say(f"Resuming after step {at.step}")
    engine = build_engine(model, config, out / MONITORS)
    if start:
        checkpoint.load_optimizer(engine, trainable, start)
    del start  # its tensors
    loop = Loop(engine, config, ShardReader(inputs.data, SPLIT), device, at)
    validation = None
    if training.validate_every:
        validation = Validation(engine, config, ShardReader(inputs.data, VALIDATION_SPLIT), device)
    best = _on_all_ranks(lambda: checkpoint.best_loss(checkpoints))
    done_before = saved = at.step
    metrics: MetricsFile | None = None

    def open_records() -> None:
        """Called when there is something to record: a start that fails before leaves nothing behind."""
        nonlocal metrics
        if is_first and metrics is None:
            _record(out, config, inputs, _start(began, done_before)).save(out)
            metrics = MetricsFile(out / "metrics.jsonl", done_before)

    def is_due(step: int) -> bool:
        return validation is not None and (step == loop.total_steps or step % training.validate_every == 0)

    def validate() -> Scores | None:
        with console.doing("validating"):
            return validation.run(stop)

    def validate_again() -> None:
        """Makes up for a validation that was stopped: the parameters are still those that it was about."""
        nonlocal at, best
        scores = validate()
        if scores is None:
            raise TrainingStopped
        open_records()
        at = replace(at, val_loss=scores.val_loss)
        best = _least(best, scores.val_loss)
        if is_first:
            metrics.add_scores(at.step, scores)
            write_to_monitors(engine, at.step, None, scores)
            checkpoint.set_validation_loss(checkpoints, at.step, scores.val_loss)
        console.say(f"Validated step {at.step}: loss {scores.val_loss:.4f}")

    def save() -> None:
        nonlocal saved
        if at.step != saved:  # a stop may come after a step that was saved anyway
            checkpoint.save(checkpoints, engine, trainable, at, training.keep_checkpoints, console.warn)
            saved = at.step

    def on_step(result: StepResult) -> None:
        nonlocal at, best
        open_records()
        scores = validate() if is_due(result.step) else None
        at = replace(loop.at, val_loss=scores.val_loss if scores else None)
        if is_first:
            metrics.add(result, scores)
            write_to_monitors(engine, result.step, result, scores)
        console.step(result, scores)
        if is_due(result.step) and scores is None:
            raise TrainingStopped
        is_best = scores is not None and _least(best, scores.val_loss) != best
        if is_best:
            best = scores.val_loss
        if is_best or result.step == loop.total_steps or result.step % training.checkpoint_every == 0:
            save()

    console.begin(at.step, loop.total_steps)
    try:
        if at.step and is_due(at.step) and at.val_loss is None:
            validate_again()
        loop.run(stop, on_step)
    except TrainingStopped:
        save()
        console.warn(f"Stopped after step {at.step}, state saved: go on with --resume auto")
        _end(metrics, stop)
        return EXIT_STOPPED
    except TrainingDiverged as error:
        if is_first:
            suspects = write_suspects(out)
            console.close()
            console.error(f"{error} The samples are in {suspects}; {_newest(checkpoints)}")
        _end(metrics, stop)
        return EXIT_DIVERGED
    values = checkpoint.gather_values(engine, trainable)
    memory = peak_memory(device)
    if is_first:
        features = loop.reader.manifest.features if config.model.vision_source == "cached" else None
        base = (config, inputs.llama, inputs.clip, features.clip_sha256 if features else None)
        save_adapter(out / "adapter.safetensors", values, *base)
        if best_checkpoint := checkpoint.load_best(checkpoints, console.warn):
            save_adapter(out / "adapter-best.safetensors", best_checkpoint.values(), *base)
        summary = _summary(out, loop, values, memory)
        plot_loss(read_metrics(out / "metrics.jsonl"), out / "loss.png")
        write_json(out / "summary.json", summary)
        console.finish(summary, out)
    _end(metrics, stop)
    return 0


def _peak_share(config: RunConfig, device: torch.device) -> Callable[[StepResult], float | None]:
    peak = peak_flops(device) if config.model.frozen_dtype != "fp32" else None

    def share(result: StepResult) -> float | None:
        if peak is None:
            return None
        flops = step_flops(config.model, result.tokens, result.labelled_tokens, result.images)
        return flops / result.seconds / (peak * dist.get_world_size())

    return share


def _on_all_ranks(read: Callable[[], float | None]) -> float | None:
    """What rank 0 reads from a file, on all ranks; other nodes might see an older file."""
    value, trouble = None, None
    if dist.get_rank() == 0:
        try:
            value = read()
        except UserError as error:
            trouble = str(error)
    told = [(value, trouble)]
    dist.broadcast_object_list(told, src=0)
    value, trouble = told[0]
    if trouble:
        raise UserError(trouble)
    return value


def _least(best: float | None, loss: float) -> float | None:
    """The lower of two validation losses; one that is None or not finite does not count."""
    if not math.isfinite(loss) or (best is not None and best <= loss):
        return best
    return loss


def _newest(checkpoints: Path) -> str:
    steps = checkpoint.list_steps(checkpoints)
    return f"the last checkpoint is that of step {steps[-1]}." if steps else "there was no checkpoint before them."


def _end(metrics: MetricsFile | None, stop: StopSignal) -> None:
    """Leaves together: a rank that tears gloo down while others still use it takes them with it."""
    if metrics:
        metrics.close()
    dist.barrier()
    stop.end()  # from here on a rank may well be gone before the others
    dist.destroy_process_group()


def _summary(out: Path, loop: Loop, values: dict, memory: dict) -> dict:
    metrics = read_metrics(out / "metrics.jsonl")
    validated = [m for m in metrics if m.get("val_loss") is not None]
    best = min(validated, key=lambda m: m["val_loss"], default=None)
    keys = ("step", "val_loss", "val_answer_accuracy")
    return {
        "steps": loop.total_steps,
        "skipped_steps": sum(m["skipped"] for m in metrics),
        "samples": loop.total_steps * loop.config.training.global_batch,
        "tokens": sum(m["tokens"] for m in metrics),
        "labelled_tokens": sum(m["labelled_tokens"] for m in metrics),
        "padded_tokens": sum(m["padded_tokens"] for m in metrics),
        "final_loss": metrics[-1]["loss"],
        "validation": {"best": _pick(best, keys), "last": _pick(validated[-1], keys)} if best else None,
        "trainable_parameters": sum(v.numel() for v in values.values()),
        "adapter_bytes": (out / "adapter.safetensors").stat().st_size,
        "ranks": dist.get_world_size(),
        "seconds": sum(m["seconds"] for m in metrics),  # in steps, over all starts of the run
        **memory,
    }


def _pick(record: dict, keys: tuple[str, ...]) -> dict:
    return {key: record[key] for key in keys}


def _record(out: Path, config: RunConfig, inputs: Inputs, start: Start) -> RunRecord:
    earlier = load_run(out).starts if (out / "run.json").exists() else ()
    return RunRecord(
        config=config,
        inputs=inputs,
        data_sha256=manifest_sha256(inputs.data, config.model.vision_source),
        starts=(*earlier, start),
    )


def _start(began: datetime, step: int) -> Start:
    return Start(
        began=began.isoformat(timespec="seconds"),
        step=step,
        ranks=dist.get_world_size(),
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        git_revision=_git_revision(),
    )


def _git_revision() -> str | None:
    """The checkout's revision; None for an installed wheel."""
    try:
        done = subprocess.run(
            ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
