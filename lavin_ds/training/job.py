"""A training run from its arguments to its exported adapters; what every rank executes."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from lavin_ds.config import RunConfig
from lavin_ds.data.schema import manifest_sha256
from lavin_ds.data.shards import ShardReader
from lavin_ds.files import write_json
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.run import RunRecord
from lavin_ds.training import checkpoint
from lavin_ds.training.arguments import TrainArguments
from lavin_ds.training.console import TrainingConsole
from lavin_ds.training.engine import build_engine, start_distributed
from lavin_ds.training.loop import Loop, StepResult, StopSignal, TrainingStopped
from lavin_ds.training.metrics import MetricsFile, peak_memory, plot_loss, read_metrics
from lavin_ds.training.preflight import SPLIT, preflight
from lavin_ds.weights.adapter import fill_trainable, save_adapter
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


def train(arguments: TrainArguments) -> int:
    """Runs the training on this rank and returns the process's exit code.

    Raises:
        UserError: from `preflight`, on every rank alike.
    """
    config = preflight(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    stop = StopSignal()
    device = start_distributed()
    initialize_tensor_parallel(config.tensor_parallel)
    console = TrainingConsole(enabled=dist.get_rank() == 0)
    try:
        return _train(arguments, config, device, stop, console)
    finally:
        console.close()


def _train(arguments, config, device, stop: StopSignal, console: TrainingConsole) -> int:
    out, checkpoints = arguments.out, arguments.out / "checkpoints"
    is_first = dist.get_rank() == 0
    if is_first:
        out.mkdir(parents=True, exist_ok=True)
        _record(arguments, config).save(out)
    console.say(f"Loading {config.name} on {dist.get_world_size()} {device.type} rank(s)")
    model = build_model(config, arguments.llama, arguments.clip, device=device)
    start = checkpoint.load_newest(checkpoints, console.warn) if arguments.resume == "auto" else None
    trainable = model.trainable()
    first_step = 0
    if start:
        fill_trainable(model, start.values(), where=f"The checkpoint of step {start.step}")
        first_step = start.step
        console.say(f"Resuming behind step {first_step}")
    engine = build_engine(model, config)
    if start:
        checkpoint.load_optimizer(engine, trainable, start)
    reader = ShardReader(arguments.data, SPLIT)
    loop = Loop(engine, config, reader, device)
    metrics = MetricsFile(out / "metrics.jsonl", first_step) if is_first else None

    def save(step: int) -> None:
        checkpoint.save(checkpoints, engine, trainable, step, config.training.keep_checkpoints)

    def on_step(result: StepResult) -> None:
        if metrics:
            metrics.add(result)
        console.step(result, loop.total_steps)
        if result.step % config.training.checkpoint_every == 0 and result.step < loop.total_steps:
            save(result.step)
        on_step.done = result.step

    on_step.done = first_step
    console.begin(first_step, loop.total_steps)
    try:
        loop.run(first_step, stop, on_step)
    except TrainingStopped:
        save(on_step.done)
        console.warn(f"Stopped behind step {on_step.done}, state saved: go on with --resume auto")
        _end(metrics)
        return EXIT_STOPPED
    save(loop.total_steps)
    values = checkpoint.gather_values(engine, trainable)
    memory = peak_memory(device)
    if is_first:
        features = loop.reader.manifest.features if config.model.vision_source == "cached" else None
        source = features.clip_sha256 if features else None
        save_adapter(out / "adapter.safetensors", values, config, arguments.llama, arguments.clip, source)
        summary = _summary(out, loop, values, memory)
        plot_loss(read_metrics(out / "metrics.jsonl"), out / "loss.png")
        write_json(out / "summary.json", summary)
        console.finish(summary, out)
    _end(metrics)
    return 0


def _end(metrics: MetricsFile | None) -> None:
    """Leaves together: a rank that tears gloo down while others still use it takes them with it."""
    if metrics:
        metrics.close()
    dist.barrier()
    dist.destroy_process_group()


def _summary(out: Path, loop: Loop, values: dict, memory: dict) -> dict:
    metrics = read_metrics(out / "metrics.jsonl")
    return {
        "steps": loop.total_steps,
        "samples": loop.total_steps * loop.config.training.global_batch,
        "tokens": sum(m["tokens"] for m in metrics),
        "labelled_tokens": sum(m["labelled_tokens"] for m in metrics),
        "padded_tokens": sum(m["padded_tokens"] for m in metrics),
        "final_loss": metrics[-1]["loss"],
        "trainable_parameters": sum(v.numel() for v in values.values()),
        "adapter_bytes": (out / "adapter.safetensors").stat().st_size,
        "ranks": dist.get_world_size(),
        "seconds": sum(m["seconds"] for m in metrics),  # in steps, over all starts of the run
        **memory,
    }


def _record(arguments: TrainArguments, config: RunConfig) -> RunRecord:
    return RunRecord(
        config=config,
        inputs=arguments.inputs(),
        data_sha256=manifest_sha256(arguments.data),
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
