"""One training run, from its configuration to its exported adapters. Every rank executes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lavin_ds.config import RunConfig
from lavin_ds.data.shards import ShardReader
from lavin_ds.files import write_json
from lavin_ds.run import CHECKPOINTS, MONITORS, SPLIT, VALIDATION_SPLIT, Inputs, hold, read_metrics
from lavin_ds.training import checkpoint
from lavin_ds.training.console import TrainingConsole
from lavin_ds.training.engine import build_engine
from lavin_ds.training.flops import peak_flops, step_flops
from lavin_ds.training.journal import Journal
from lavin_ds.training.loop import Loop, StepResult, TrainingDiverged, TrainingStopped
from lavin_ds.training.metrics import peak_memory, plot_loss, write_suspects
from lavin_ds.training.stop import StopSignal
from lavin_ds.training.validation import Validation
from lavin_ds.weights.adapter import base_warning, fill_trainable, save_adapter
from lavin_ds.weights.base import build_model

EXIT_STOPPED = 143  # 128 + SIGTERM: the run was stopped on request and its state is saved
EXIT_DIVERGED = 3  # too many steps in a row had no finite loss or gradient


def train(config: RunConfig, inputs: Inputs, out: Path, resume: bool, device: torch.device, stop: StopSignal) -> int:
    """Runs the training on this rank and returns the process's exit code. Process groups must exist.

    out: the run directory. resume: continue from its newest checkpoint, if there is one.

    Raises:
        UserError: on rank 0, if the run directory is in use or cannot be written.
    """
    is_first = dist.get_rank() == 0
    console = TrainingConsole(is_first, peak_share=_peak_share(config, device))
    if device.type == "cuda" and peak_flops(device) is None:
        name = torch.cuda.get_device_name(device)
        console.say(f"lavin_ds/devices.py has no data sheet of {name}: the share of its peak FLOP/s is not shown.")
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
    is_first = dist.get_rank() == 0
    console.say(f"Loading {config.name} on {dist.get_world_size()} {device.type} rank(s)")
    start = checkpoint.load_newest_on_all_ranks(out / CHECKPOINTS, console.warn) if resume else None
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
    del start  # frees its tensors
    loop = Loop(engine, config, ShardReader(inputs.data, SPLIT), device, at)
    validation = None
    if config.training.validate_every:
        validation = Validation(engine, config, ShardReader(inputs.data, VALIDATION_SPLIT), device)
    journal = Journal(out, config, inputs, loop, trainable, validation, console, began)
    console.begin(at.step, loop.total_steps)
    try:
        journal.make_up_for_validation(stop)
        loop.run(stop, lambda result: journal.on_step(result, stop))
    except TrainingStopped:
        journal.save()
        console.warn(f"Stopped after step {journal.at.step}, state saved: go on with --resume auto")
        code = EXIT_STOPPED
    except TrainingDiverged as error:
        if is_first:
            suspects = write_suspects(out)
            console.close()
            console.error(f"{error} The samples are in {suspects}; {_newest(out / CHECKPOINTS)}")
        code = EXIT_DIVERGED
    else:
        _export(out, config, inputs, loop, trainable, device, console)
        code = 0
    journal.close()
    # All ranks leave together: if one rank closes gloo while others still use it, they fail.
    dist.barrier()
    stop.end()  # from here on, a rank may end before the others
    dist.destroy_process_group()
    return code


def _export(
    out: Path,
    config: RunConfig,
    inputs: Inputs,
    loop: Loop,
    trainable: dict[str, nn.Parameter],
    device: torch.device,
    console: TrainingConsole,
) -> None:
    """Writes the adapters, the summary and the loss curve of a complete run. Every rank must call it."""
    values = checkpoint.gather_values(loop.engine, trainable)
    memory = peak_memory(device)
    if dist.get_rank() != 0:
        return
    features = loop.reader.manifest.features if config.model.vision_source == "cached" else None
    base = (config, inputs.llama, inputs.clip, features.clip_sha256 if features else None)
    save_adapter(out / "adapter.safetensors", values, *base)
    if best := checkpoint.load_best(out / CHECKPOINTS, console.warn):
        save_adapter(out / "adapter-best.safetensors", best.values(), *base)
    summary = _summary(out, loop, values, memory)
    plot_loss(read_metrics(out / "metrics.jsonl"), out / "loss.png")
    write_json(out / "summary.json", summary)
    console.finish(summary, out)


def _peak_share(config: RunConfig, device: torch.device) -> Callable[[StepResult], float | None]:
    peak = peak_flops(device) if config.model.frozen_dtype != "fp32" else None

    def share(result: StepResult) -> float | None:
        if peak is None:
            return None
        flops = step_flops(config.model, result.tokens, result.labelled_tokens, result.images)
        return flops / result.seconds / (peak * dist.get_world_size())

    return share


def _newest(checkpoints: Path) -> str:
    steps = checkpoint.list_steps(checkpoints)
    return f"the newest checkpoint is that of step {steps[-1]}." if steps else "there is no earlier checkpoint."


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
        "seconds": sum(m["seconds"] for m in metrics),  # time in steps, over all starts of the run
        **memory,
    }


def _pick(record: dict, keys: tuple[str, ...]) -> dict:
    return {key: record[key] for key in keys}
