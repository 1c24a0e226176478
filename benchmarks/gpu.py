"""Checks on one GPU what was built without one. Ten minutes, no network, no files: weights are random.

    pip install -r benchmarks/gpu-requirements.txt
    python benchmarks/gpu.py --json | tee gpu.jsonl
    python benchmarks/gpu.py --sections speed,memory --budget 300

Each section compares with a named baseline in the same run:

    numerics    loss and gradients in bf16 against fp32, with the same weights
    attention   packed rows in one attention call, in a loop over samples, and padded rows: kernels, step time,
                gradients; then reading from a cache in one call and in a loop
    speed       tokens per second of our step and of the authors'; share of the peak rate against the prediction
    decoding    the generation engine against transformers' generate
    memory      measured peak against the simulated one, for eight settings, one of them the authors' step

Every result is printed as one JSON line as soon as it is known, so an interrupted run keeps its results. A section that
fails prints a line, and the next section starts. Each section has its share of the time budget. Without a GPU, small
shapes run on the CPU, so that on a GPU only the device is new. The exit code is 1 if a section failed or a result is
outside its bound.
"""

from __future__ import annotations

import gc
import json
import re
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

from harness import environment, interleaved

import numpy as np
import torch
import typer
from samples import FRAME, MICRO_BATCH, make_samples, real_lengths
from torch.utils.flop_counter import FlopCounterMode

import lavin_ds
from lavin_ds.config import ModelConfig, RunConfig, load_recipe
from lavin_ds.data.collate import Batch, collate
from lavin_ds.data.layout import IGNORE
from lavin_ds.data.sampler import assign
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.devices import find_device
from lavin_ds.generation.engine import Engine
from lavin_ds.generation.request import Request
from lavin_ds.models.cache import KVCache, Reads
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.meta import build_on_meta
from lavin_ds.profiling.calibration import roofline_seconds
from lavin_ds.profiling.published.model import PublishedLavin, PublishedOptions, published_model
from lavin_ds.profiling.simulation import simulate, summarise, trace_step
from lavin_ds.profiling.step_time import DEFAULT_EFFICIENCY
from lavin_ds.profiling.workload import Workload, make_batch, worst_case

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LENGTH = 512 if CUDA else 64
PUBLISHED = PublishedOptions(pad_to=LENGTH)
BF16_LOSS, BF16_GRADIENT = 0.01, 0.10  # allowed relative difference from fp32: of the loss, of the gradients' norm
MEMORY_OFF = 0.10  # allowed relative difference of the measured peak from the simulated one
SHARES = {"numerics": 0.1, "attention": 0.1, "speed": 0.3, "decoding": 0.15, "memory": 0.35}  # of the budget
DECODED = {"prompt_tokens": 256, "new_tokens": 64} if CUDA else {"prompt_tokens": 12, "new_tokens": 4}

Results = Iterator[dict]


def recipe(size: str, *overrides: str) -> RunConfig:
    """The recipe lavin-SIZE on a GPU; on a CPU the tiny recipe, also in bf16."""
    if CUDA:
        return load_recipe(f"lavin-{size}", ["deepspeed=zero0", *overrides])
    small = ["model.frozen_dtype=bf16", "model.llm.n_layers=2", f"data.max_length={LENGTH}", "training.micro_batch=4"]
    overrides = [word for word in overrides if "n_layers" not in word]
    return load_recipe("tiny", ["deepspeed=zero0", "training.packing=true", *small, *overrides])


def sizes() -> tuple[str, ...]:
    return ("7b", "13b") if CUDA else ("tiny",)


def drawn(config: RunConfig, make: Callable[..., Lavin] = Lavin) -> Lavin:
    """The model with random weights, made on the device from seed 0."""
    model = build_on_meta(config, make).to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_("norm.weight" in name or ".ln_" in name and name.endswith("weight"))
    return model


def micro_batches(model: ModelConfig, samples: int, packing: bool, in_order: bool = False) -> list[Batch]:
    """The micro-batches of `samples` samples with ScienceQA's lengths, dealt as in training or in the given order."""
    scale = LENGTH / 512
    lengths = [max(16, round(length * scale)) for length in real_lengths(samples)]
    rows, images = make_samples(model, lengths, image_fraction=0.49)
    ids = np.array([len(row.token_ids) + len(FRAME.head(row.has_image, model.visual_tokens)) for row in rows])
    shown = np.array([row.has_image for row in rows])
    dealt = assign(np.arange(samples), ids, shown, 1, MICRO_BATCH, packing=packing)[0]
    if in_order:
        dealt = np.arange(samples).reshape(-1, MICRO_BATCH)
    return [
        collate([rows[i] for i in part], images.__getitem__, FRAME, model.visual_tokens, packing).to(DEVICE)
        for part in dealt
    ]


def backward(model: Lavin, batches: list[Batch]) -> float:
    """Adds the gradients of a step's mean loss and returns the loss."""
    labels = sum(int((batch.labels_BT != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss_sum, _ = model(batch)
        (loss_sum / labels).backward()
        total += loss_sum.detach() / labels
    return float(total)


@dataclass
class Step:
    """An optimizer step that can be timed: it returns when the device has finished."""

    model: Lavin
    batches: list[Batch]

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.model.trainable().values(), lr=0.0)

    def __call__(self) -> None:
        backward(self.model.train(), self.batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def positions(batches: list[Batch]) -> int:
    """Positions of all samples, with modality tokens and without padding."""
    return sum(int((batch.lengths_B + 1).sum()) for batch in batches)


def numerics() -> Results:
    """bf16 against fp32 with the same weights, without dropout, at 7B's width with 8 layers."""
    config = recipe("7b", "model.llm.n_layers=8")
    batches = micro_batches(config.model, MICRO_BATCH, packing=True)
    half = drawn(config).eval()
    loss = {"bf16": backward(half, batches)}
    gradients = {"bf16": _gradients(half)}
    state = {name: tensor.float() for name, tensor in half.state_dict().items()}
    del half
    whole = drawn(recipe("7b", "model.llm.n_layers=8", "model.frozen_dtype=fp32")).eval()
    whole.load_state_dict(state)
    loss["fp32"] = backward(whole, batches)
    gradients["fp32"] = _gradients(whole)
    off = _off(gradients["bf16"], gradients["fp32"])
    cosine = float(torch.cosine_similarity(gradients["bf16"], gradients["fp32"], dim=0))
    loss_off = abs(loss["bf16"] / loss["fp32"] - 1)
    yield {
        "loss": loss,
        "loss_off": loss_off,
        "gradients_off": off,
        "gradients_cosine": cosine,
        "layers": config.model.llm.n_layers,
        "ok": loss_off <= BF16_LOSS and off <= BF16_GRADIENT,
    }


def _gradients(model: Lavin) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten().double() for parameter in model.trainable().values()])


def attention() -> Results:
    """One attention call for all sequences against a loop over them: a training step at 7B and 8 layers, with padded
    rows as the baseline, then reading from a cache."""
    config = recipe("7b", "model.llm.n_layers=8")
    model = drawn(config)
    packed = micro_batches(config.model, 8, packing=True)
    steps = {
        "packed": Step(model, packed),
        "packed, loop": in_a_loop(Step(model, packed)),
        "padded": Step(model, micro_batches(config.model, 8, packing=False)),
    }
    kernels = {}
    for name, step in steps.items():
        step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            step()
        named = {event.key for event in profiler.key_averages() if re.search("attention|attn", event.key)}
        kernels[name] = sorted(named - {"aten::scaled_dot_product_attention"})  # it only chooses one of the others
    seconds = {name: min(all) for name, all in interleaved(steps, 5 if CUDA else 1).items()}

    def gradients() -> torch.Tensor:
        model.zero_grad()
        backward(model.eval(), packed)
        return _gradients(model)

    off = _off(gradients(), in_a_loop(gradients)())
    fused = all(found and not any("math" in kernel for kernel in found) for found in kernels.values())
    one_call = any("varlen_attn" in kernel for kernel in kernels["packed"])
    yield {
        "kernels": kernels,
        "seconds": seconds,
        "packed_times_as_fast": seconds["padded"] / seconds["packed"],
        "one_call_times_as_fast_as_loop": seconds["packed, loop"] / seconds["packed"],
        "gradients_off": off,
        "ok": fused and off <= BF16_GRADIENT and one_call == CUDA,
    }
    yield _cached_attention(config)


def _cached_attention(config: RunConfig) -> dict:
    """A layer's attention for 16 sequences: one token each, and with the prompts of 4 others."""
    slots, held, prompt = 16, LENGTH // 2, LENGTH // 4
    llm = config.model.llm.model_copy(update={"n_layers": 1})
    cache = KVCache(llm, slots + 4, LENGTH, torch.bfloat16, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(generator=generator)
    cache.lengths = [held - slot for slot in range(slots)] + [0] * 4
    result, ok = {}, True
    for name, lengths in {"tokens": [1] * slots, "tokens and prompts": [1] * slots + [prompt] * 4}.items():
        reads = Reads(cache, range(len(lengths)), lengths)
        q_NHK, k_NGK, v_NGK = (
            torch.randn(sum(lengths), heads, llm.head_dim, generator=generator, device=DEVICE).bfloat16()
            for heads in (llm.n_heads, llm.kv_heads, llm.kv_heads)
        )

        def attend(reads=reads, qkv=(q_NHK, k_NGK, v_NGK)) -> torch.Tensor:
            for _ in range(20):
                attended_NHK = reads.attend(0, *qkv)
            wait()
            return attended_NHK

        ways = {"one call": attend, "loop": in_a_loop(attend)}
        off = _off(*(way() for way in ways.values()))
        seconds = {way: min(all) / 20 for way, all in interleaved(ways, 5 if CUDA else 1).items()}
        result[name] = {"seconds": seconds, "off": off}
        ok &= off <= BF16_LOSS
    return {"cached": result, "ok": ok}


def in_a_loop(work: Callable) -> Callable:
    """The work with a loop over sequences where their attention would be one call."""

    def looped(*args):
        with patch("lavin_ds.models.attention.takes_one_call", lambda q_NHK: False):
            return work(*args)

    return looped


def _off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).double().norm() / want.double().norm())


def speed() -> Results:
    """A step of 16 samples with real lengths: ours, the authors', and the cost model's prediction of ours."""
    for size in sizes():
        config = recipe(size)
        model, samples = drawn(config), 16 if CUDA else 4
        theirs = _as_published(config, model)
        steps = {
            "ours": Step(model, micro_batches(config.model, samples, packing=True)),
            "published": Step(theirs, micro_batches(config.model, samples, packing=False, in_order=True)),
        }
        for step in steps.values():
            step()  # warm-up: allocates memory and chooses kernels
        with FlopCounterMode(display=False) as counter:
            steps["ours"]()
        seconds = {name: statistics.median(all) for name, all in interleaved(steps, 3).items()}
        tokens = positions(steps["ours"].batches)
        result = {
            "model": size,
            "samples": samples,
            "seconds": seconds,
            "tokens_per_second": {name: tokens / value for name, value in seconds.items()},
            "times_as_fast_as_published": seconds["published"] / seconds["ours"],
            "flops": counter.get_total_flops(),
        }
        card = find_device(torch.cuda.get_device_name()) if CUDA else None
        if card:
            result["share_of_peak"] = result["flops"] / seconds["ours"] / (card.tflops * 1e12)
            mean = tokens / samples
            workload = Workload(MICRO_BATCH, round(mean), image_fraction=0.5, labelled_fraction=0.7)
            roofline = roofline_seconds(card, simulate(config, workload).operations) * samples / MICRO_BATCH
            result["predicted_seconds"] = roofline / DEFAULT_EFFICIENCY
            result["efficiency"] = roofline / seconds["ours"]  # the cost model assumes DEFAULT_EFFICIENCY
        yield result
        del model, theirs, steps, step
        free()


def _as_published(config: RunConfig, model: Lavin) -> PublishedLavin:
    """The authors' step on the same parameters."""
    theirs = build_on_meta(config, published_model(PUBLISHED))
    theirs.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    trainable = theirs.trainable()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trainable)
    return theirs


def decoding() -> Results:
    """Greedy answers to 8 prompts of random ids: our engine with adapters, transformers without."""
    llm, prompts = recipe("7b").model.llm, 8
    ids_BT = np.random.default_rng(0).integers(10, llm.vocab_size, (prompts, DECODED["prompt_tokens"]))
    rates = {}
    for name, work in {"ours": _engine_rate, "transformers": _transformers_rate}.items():
        rates[name] = work(ids_BT, DECODED["new_tokens"])
        free()
    yield {
        "prompts": prompts,
        **DECODED,
        "tokens_per_second": rates,
        "times_as_fast": rates["ours"] / rates["transformers"],
    }


def _engine_rate(ids_BT: np.ndarray, new_tokens: int) -> float:
    prompts, prompt_tokens = ids_BT.shape
    tokenizer = Tokenizer(Path(lavin_ds.__file__).parent / "assets" / "tiny" / "llama" / "tokenizer.model")
    engine = Engine(drawn(recipe("7b")), tokenizer, prompts, capacity=prompt_tokens + new_tokens + 16, frame=FRAME)

    def generate() -> int:
        requests = [Request(str(n), ids_T, max_new_tokens=new_tokens) for n, ids_T in enumerate(ids_BT)]
        return sum(len(answer.ids) for answer in engine.run(requests))

    return _tokens_per_second(generate)


def _transformers_rate(ids_BT: np.ndarray, new_tokens: int) -> float:
    import transformers

    llm, prompt_tokens = recipe("7b").model.llm, ids_BT.shape[1]
    shape = transformers.LlamaConfig(
        vocab_size=llm.vocab_size,
        hidden_size=llm.dim,
        intermediate_size=llm.ffn_dim,
        num_hidden_layers=llm.n_layers,
        num_attention_heads=llm.n_heads,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    prompt_BT = torch.from_numpy(ids_BT).to(DEVICE)
    mask_BT = torch.ones_like(prompt_BT)

    def generate() -> int:
        answer_BT = model.generate(prompt_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, do_sample=False)
        return answer_BT[:, prompt_tokens:].numel()

    return _tokens_per_second(generate)


def _tokens_per_second(generate: Callable[[], int]) -> float:
    """Generated tokens per second in the second of two runs, including the time to process the prompts."""
    for _ in range(2):
        began = time.perf_counter()
        tokens = generate()
        wait()
    return tokens / (time.perf_counter() - began)


def memory() -> Results:
    """Measured and simulated peak of an optimizer step on the worst micro-batch of eight settings."""
    settings = {
        "7b": ("7b", []),
        "7b, padded": ("7b", ["training.packing=false"]),
        "7b, 1 sample": ("7b", ["training.micro_batch=1"]),
        "7b, ViT recomputed": ("7b", ["training.activation_checkpointing=vision"]),
        "7b, 16 layers recomputed": ("7b", [f"training.activation_checkpointing={16 if CUDA else 1}"]),
        "7b, every block recomputed": ("7b", ["training.activation_checkpointing=true"]),
        "13b": ("13b", []),
        "7b, published": ("7b", ["training.packing=false"]),
    }
    for name, (size, overrides) in settings.items():
        config = recipe(size, *overrides)
        make = published_model(PUBLISHED) if name.endswith("published") else Lavin
        workload = worst_case(config)
        if not CUDA:
            workload = replace(workload, samples=min(workload.samples, MICRO_BATCH))
        measured = _peak(config, workload, make)
        free()
        simulated = simulate(config, workload, make=make).peak_bytes
        off = measured / simulated - 1
        result = {"setting": name, "samples": workload.samples, "length": workload.length}
        yield result | {"measured": measured, "simulated": simulated, "off": off, "ok": abs(off) <= MEMORY_OFF}


def _peak(config: RunConfig, workload: Workload, make: Callable[..., Lavin]) -> int:
    """Bytes of tensors at the peak of the second step. On a CPU torch does not count, so the tracker does.

    There are two micro-batches: the second is computed while the gradients of the first are held.
    """
    batch = make_batch(config.model, workload, config.training.packing)
    if not CUDA:
        return summarise(trace_step(drawn(config, make), batch), workload, accumulates=True).peak_bytes
    before = torch.cuda.memory_allocated()
    step = Step(drawn(config, make), [batch.to(DEVICE)] * 2)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


SECTIONS = {one.__name__: one for one in (numerics, attention, speed, decoding, memory)}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after `seconds`."""

    def stop(*_) -> None:
        raise TimeoutError(f"stopped after its {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def report(line: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line), flush=True)
        return
    words = ", ".join(f"{name} {_short(value)}" for name, value in line.items() if name != "section")
    print(f"{line['section']}: {words}", flush=True)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(one)}" for name, one in value.items()) + ")"
    return str(value)


def main(
    sections: Annotated[str, typer.Option(help="Sections to run, separated by commas.")] = ",".join(SECTIONS),
    budget: Annotated[float, typer.Option(help="Seconds for all sections.")] = 540,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Check on one GPU what was built without one."""
    chosen = sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; the sections are {', '.join(SECTIONS)}")
    if not CUDA:
        torch.set_num_threads(1)
    report({"section": "environment", **environment()}, as_json)
    failed, shares = False, sum(SHARES[name] for name in chosen)
    for name in chosen:
        began = time.perf_counter()
        try:
            with at_most(budget * SHARES[name] / shares):
                for result in SECTIONS[name]():
                    failed |= not result.get("ok", True)
                    report({"section": name, **result}, as_json)
        except Exception as error:  # a failure must not stop the next section
            failed = True
            trace = traceback.format_exc().splitlines()[-12:]
            report({"section": name, "ok": False, "error": f"{type(error).__name__}: {error}", "trace": trace}, as_json)
        free()
        report({"section": name, "seconds": round(time.perf_counter() - began, 1)}, as_json)
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
