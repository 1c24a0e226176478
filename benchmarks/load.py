"""Peak memory while a sharded LLaMA checkpoint loads, as a ratio to the bytes that stay.

    python benchmarks/load.py [--layers N] [--folder DIR] [--json]

Writes a synthetic LLaMA (width 1024, bf16; 536 MB with 16 layers) as Meta's two shards and as Hugging Face's
safetensors, and loads each in processes of its own: on one rank, and on two tensor-parallel ranks. The baseline, in
the same run, is what most training scripts do: torch.load every shard, concatenate, load_state_dict.

Measured is the resident set (VmHWM, reset before the load) above what the process held before building the model.
Exit code 1 if a ratio of ours is over 1.25.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from lavin_ds.config import LlamaConfig
from lavin_ds.models.linear import STORAGES
from lavin_ds.models.llama import Llama
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.weights.llama import HuggingFaceLlama, llama_shapes, load_llama

LIMIT = 1.25
META_SHARDS = 2
META_SPLIT = {"wo": 1, "w2": 1, "tok_embeddings": 1}  # the other matrices along dimension 0
SAFETENSORS_BYTES = 150_000_000  # a file


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
    """The baseline: everything in memory at once."""
    shards = [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]
    state = {}
    for name, tensor in shards[0].items():
        dim = META_SPLIT.get(name.split(".")[-2], 0)
        state[name] = torch.cat([shard[name] for shard in shards], dim) if tensor.ndim == 2 else tensor
    model.load_state_dict(state)


def measure(rank: int, ranks: int, method: str, folder: Path, layers: int, work: Path) -> None:
    """One process: builds and loads, and writes what it kept, its peak and its seconds."""
    store = dist.FileStore(str(work / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    initialize_tensor_parallel(ranks)
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident("VmRSS"), time.perf_counter()
    model = Llama(config_of(layers), storage=STORAGES["bf16"])
    if method == "baseline":
        load_naively(model, folder)
    else:
        load_llama(model, folder)
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    kept = sum(parameter.nbytes for parameter in model.parameters())
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    (work / f"{rank}.json").write_text(json.dumps({"kept_bytes": kept, "peak_bytes": peak, "seconds": seconds}))
    dist.barrier()
    dist.destroy_process_group()


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def run_case(name: str, ranks: int, method: str, folder: Path, layers: int) -> dict:
    """Measures one way of loading; of several ranks the one with the highest peak counts."""
    with tempfile.TemporaryDirectory() as work:
        torch.multiprocessing.spawn(measure, (ranks, method, folder, layers, Path(work)), nprocs=ranks)
        found = [json.loads((Path(work) / f"{rank}.json").read_text()) for rank in range(ranks)]
    worst = max(found, key=lambda one: one["peak_bytes"])
    return {"case": name, "ranks": ranks, "ratio": worst["peak_bytes"] / worst["kept_bytes"], **worst}


def main(
    layers: Annotated[int, typer.Option(help="Layers of the synthetic model; 26 MB each.")] = 16,
    folder: Annotated[Path | None, typer.Option(help="Where to write it; removed afterwards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure memory while loading."""
    parent = Path(tempfile.mkdtemp(dir=folder))
    try:
        write_meta(parent / "meta", config_of(layers))
        write_huggingface(parent / "huggingface", config_of(layers))
        cases = [run_case("torch.load, then load_state_dict (baseline)", 1, "baseline", parent / "meta", layers)]
        for name in ("meta", "huggingface"):
            for ranks in (1, 2):
                cases.append(run_case(f"lavin_ds, {name}", ranks, "ours", parent / name, layers))
    finally:
        shutil.rmtree(parent)
    passed = all(case["ratio"] <= LIMIT for case in cases[1:])
    if as_json:
        print(json.dumps({"limit": LIMIT, "passed": passed, "cases": cases}, indent=2))
    else:
        Console().print(table(cases))
    raise typer.Exit(0 if passed else 1)


def table(cases: list[dict]) -> Table:
    table = Table(title=f"Memory while loading (limit {LIMIT} x what stays)")
    for column in ("", "ranks", "kept a rank", "peak a rank", "ratio", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for case in cases:
        table.add_row(
            case["case"],
            str(case["ranks"]),
            f"{case['kept_bytes'] / 1e6:,.0f} MB",
            f"{case['peak_bytes'] / 1e6:,.0f} MB",
            f"{case['ratio']:.2f}",
            f"{case['seconds']:.1f}",
        )
    return table


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
