"""Measures host memory while a sharded LLaMA checkpoint loads, and compares it with the bytes of the loaded model.

    python benchmarks/load.py [--layers N] [--folder DIR] [--json]

Writes a synthetic LLaMA (width 1024, bf16; 236 MB with 4 layers) as Meta's two shards and as Hugging Face's
safetensors, and loads each in new processes.

On a CPU: one rank, and two tensor-parallel ranks. The baseline is what most training scripts do: torch.load every
shard, concatenate, load_state_dict. We may hold the loaded weights and the mapped pages of the largest tensor.

On simulated GPUs: eight ranks that each load the whole model. The baseline builds and fills the model in host memory
and then moves it. There is no GPU here, so a rank's device is a mapped file. Its pages are removed from the resident
set after every tensor. So a peak counts up to one tensor that would be on the device, and one tensor of mapped source
pages, which all ranks share. We may hold no more than these two. A CUDA context and the copies of its driver are not
simulated.

The measurement is the peak resident set (VmHWM, reset before the load) minus the resident set before the model is
built. The exit code is 1 if our loading holds more than it may.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from harness import show, table

import torch
import torch.distributed as dist
import typer
from safetensors.torch import save_file

from lavin_ds.config import LlamaConfig
from lavin_ds.models.linear import STORAGES
from lavin_ds.models.llama import Llama
from lavin_ds.models.meta import OnMeta, allocate
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.weights.llama import HuggingFaceLlama, llama_shapes, load_llama
from lavin_ds.weights.tensor_files import give_back_pages

BESIDE = 16_000_000  # bytes that Python and the allocator may grow by during the load
META_SHARDS = 2
META_SPLIT = {"wo": 1, "w2": 1, "tok_embeddings": 1}  # dimension that a matrix is split along; 0 for all others
SAFETENSORS_BYTES = 150_000_000  # per file


def config_of(layers: int) -> LlamaConfig:
    return LlamaConfig(dim=1024, n_layers=layers, n_heads=16, ffn_dim=2816, vocab_size=32000)


def write_meta(folder: Path, config: LlamaConfig) -> None:
    folder.mkdir()
    for number in range(META_SHARDS):
        state = {}
        for name, shape in llama_shapes(config).items():
            shape = list(shape)
            if len(shape) == 2:
                shape[META_SPLIT.get(name.split(".")[-2], 0)] //= META_SHARDS
            state[name] = torch.ones(shape, dtype=torch.bfloat16)
        torch.save(state, folder / f"consolidated.{number:02d}.pth")
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
    (folder / "params.json").write_text(json.dumps(params))


def write_huggingface(folder: Path, config: LlamaConfig) -> None:
    folder.mkdir()
    names = {ours: theirs for theirs, ours in HuggingFaceLlama.NAMES.items()}
    layer_names = {ours: theirs for theirs, ours in HuggingFaceLlama.LAYER_NAMES.items()}
    weight_map, part, files = {}, {}, 0

    def write() -> None:
        nonlocal part, files
        file = f"model-{files:05d}.safetensors"
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
        part, files = {}, files + 1

    for name, shape in llama_shapes(config).items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            theirs = f"model.layers.{layer}.{layer_names[rest]}"
        else:
            theirs = names[name]
        part[theirs] = torch.ones(shape, dtype=torch.bfloat16)
        if sum(tensor.nbytes for tensor in part.values()) > SAFETENSORS_BYTES:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    described = {"hidden_size": config.dim, "num_attention_heads": config.n_heads}
    (folder / "config.json").write_text(json.dumps(described))


def load_naively(model: Llama, folder: Path) -> None:
    """The baseline: holds everything in memory at once."""
    shards = [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]
    state = {}
    for name, tensor in shards[0].items():
        dim = META_SPLIT.get(name.split(".")[-2], 0)
        state[name] = torch.cat([shard[name] for shard in shards], dim) if tensor.ndim == 2 else tensor
    model.load_state_dict(state)


@dataclass(frozen=True)
class Case:
    """One way of loading. device: whether the target is a simulated GPU."""

    name: str
    ranks: int
    tensor_parallel: int
    baseline: bool
    layout: str
    device: bool = False


CASES = [
    Case("CPU: torch.load, then load_state_dict (baseline)", 1, 1, True, "meta"),
    Case("CPU: lavin_ds, Meta's shards", 1, 1, False, "meta"),
    Case("CPU: lavin_ds, Meta's shards", 2, 2, False, "meta"),
    Case("CPU: lavin_ds, safetensors", 1, 1, False, "huggingface"),
    Case("CPU: lavin_ds, safetensors", 2, 2, False, "huggingface"),
    Case("simulated GPUs: loaded on the CPU, then moved (baseline)", 8, 1, True, "huggingface", device=True),
    Case("simulated GPUs: lavin_ds, Meta's shards", 8, 1, False, "meta", device=True),
    Case("simulated GPUs: lavin_ds, safetensors", 8, 1, False, "huggingface", device=True),
]


def build(layers: int) -> Llama:
    return Llama(config_of(layers), storage=STORAGES["bf16"])


def move(model: Llama, file: Path) -> torch.Tensor:
    """Moves every parameter to a mapped file, the simulated device. Meta parameters have no values to move."""
    size = sum(parameter.numel() for parameter in model.parameters())
    device = torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16)
    place = 0
    for name, parameter in list(model.named_parameters()):
        moved = device[place : place + parameter.numel()].view(parameter.shape)
        if not parameter.is_meta:
            moved.copy_(parameter.detach())
            give_back_pages(device)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, torch.nn.Parameter(moved, requires_grad=False))
        place += parameter.numel()
    return device


def measure(rank: int, case: Case, folder: Path, layers: int, work: Path) -> None:
    """One process: builds and loads, then writes the bytes it kept, its peak and its seconds."""
    store = dist.FileStore(str(work / "store"), case.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks, timeout=timedelta(minutes=5))
    initialize_tensor_parallel(case.tensor_parallel)
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    if case.baseline:
        model = build(layers)
        if case.device:
            load_llama(model, folder)
            move(model, work / f"device{rank}")
        else:
            load_naively(model, folder)
    else:
        with OnMeta():
            model = build(layers)
        if case.device:
            device = move(model, work / f"device{rank}")
            load_llama(model, folder, lambda done, total: give_back_pages(device))
        else:
            allocate(model, dict(model.named_parameters()), "cpu")
            load_llama(model, folder)
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    kept = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    found = {"kept_bytes": kept, "peak_bytes": peak, "largest_tensor_bytes": largest, "seconds": seconds}
    (work / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def run_case(case: Case, parent: Path, layers: int) -> dict:
    """Measures one way of loading. Reports the rank with the highest peak."""
    with tempfile.TemporaryDirectory(dir=parent) as work:
        arguments = (case, parent / case.layout, layers, Path(work))
        torch.multiprocessing.spawn(measure, arguments, nprocs=case.ranks)
        found = [json.loads((Path(work) / f"{rank}.json").read_text()) for rank in range(case.ranks)]
    worst = max(found, key=lambda one: one["peak_bytes"])
    largest = worst["largest_tensor_bytes"]
    allowed = 2 * largest if case.device else worst["kept_bytes"] + largest
    return {
        **asdict(case),
        **worst,
        "ratio": worst["peak_bytes"] / worst["kept_bytes"],
        "peak_bytes_of_all_ranks": sum(one["peak_bytes"] for one in found),
        "passed": case.baseline or worst["peak_bytes"] <= allowed + BESIDE,
    }


def main(
    layers: Annotated[int, typer.Option(help="Layers of the synthetic model, 26 MB each.")] = 4,
    folder: Annotated[Path | None, typer.Option(help="Where to write it; removed afterwards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure memory while loading."""
    parent = Path(tempfile.mkdtemp(dir=folder))
    try:
        write_meta(parent / "meta", config_of(layers))
        write_huggingface(parent / "huggingface", config_of(layers))
        cases = [run_case(case, parent, layers) for case in CASES]
    finally:
        shutil.rmtree(parent)
    passed = all(case["passed"] for case in cases)
    columns = ("", "ranks", "kept per rank", "peak per rank", "ratio", "sum of peaks", "seconds")
    rows = [
        (
            case["name"],
            str(case["ranks"]),
            f"{case['kept_bytes'] / 1e6:,.0f} MB",
            f"{case['peak_bytes'] / 1e6:,.0f} MB",
            f"{case['ratio']:.2f}",
            f"{case['peak_bytes_of_all_ranks'] / 1e6:,.0f} MB",
            f"{case['seconds']:.1f}",
        )
        for case in cases
    ]
    show({"passed": passed, "cases": cases}, as_json, table("Host memory while loading", columns, rows))
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
