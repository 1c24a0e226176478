"""Generation: the engine against transformers' `generate`, on the same weights and requests, in the same run.

Claim: at least 2.5 times the wanted tokens per second where answers end after 8 to 64 tokens, 1.6 times where all have
64, and 1.1 times one request at a time. The model is a random LLaMA of width 512, 8 layers and 32,000 pieces (or any
folder, by --llama); 128 requests have 16 to 300 tokens. transformers gets its best setting on a CPU: static batches
of 32, requests of similar length together, padded on the left, a static cache where that is faster. A batch runs until
its last answer ends; only the tokens that were asked for count, for both.

    python benchmarks/generate.py --json
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import harness

import numpy as np
import torch
import transformers
import typer

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig
from lavin_ds.data.layout import Frame
from lavin_ds.generation.engine import Engine
from lavin_ds.generation.request import Request
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.weights.llama import load_llama, open_llama

AT_ONCE = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AIMS = {"answers of 8 to 64": 2.5, "answers of 64": 1.6, "one at a time": 1.1}


class NoTokenizer:
    """What the engine needs of a tokenizer where nobody reads the text: no id ends an answer."""

    def __init__(self, vocab_size: int):
        self.bos_id, self.eos_id, self.vocab_size = 1, vocab_size, vocab_size

    def decode(self, ids) -> str:
        return ""


def random_llama(folder: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=32000)).save_pretrained(folder)


def our_model(folder: Path, dtype: str, adapter: str) -> Lavin:
    facts = open_llama(folder).described()
    facts = {key: value for key, value in facts.items() if value is not None and value is not False}
    adapters = AdapterConfig(kind=adapter)
    model = Lavin(ModelConfig(llm=LlamaConfig(**facts), llm_adapter=adapters, frozen_dtype=dtype))
    model.reset_trainable(0)
    load_llama(model.llm, folder)
    return model.eval()


def make_requests(vocab_size: int, count: int, shortest_answer: int) -> list[Request]:
    """Prompts of 16 to 300 random tokens, with answers of `shortest_answer` to 64 tokens."""
    random = np.random.default_rng(0)
    return [
        Request(
            str(number),
            random.integers(10, vocab_size, random.integers(16, 301)),
            max_new_tokens=int(random.integers(shortest_answer, 65)),
        )
        for number in range(count)
    ]


def ask_engine(model: Lavin, requests: list[Request], at_once: int) -> dict[str, list[int]]:
    capacity = max(len(request.prompt_ids) for request in requests) + 1 + 64
    frame = Frame(bos=1, prefix_image=(), prefix_text=())
    engine = Engine(model, NoTokenizer(model.config.llm.vocab_size), at_once, capacity, frame)
    return {answer.id: answer.ids for answer in engine.run(requests)}


@torch.inference_mode()
def ask_transformers(model, requests: list[Request], at_once: int, cache: str) -> dict[str, list[int]]:
    answers = {}
    ordered = sorted(requests, key=lambda request: -len(request.prompt_ids))
    for start in range(0, len(ordered), at_once):
        batch = ordered[start : start + at_once]
        longest = 1 + max(len(request.prompt_ids) for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            prompt = [1, *request.prompt_ids]
            ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), 1
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(request.max_new_tokens for request in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
        )
        for request, row in zip(batch, out[:, longest:].tolist(), strict=True):
            answers[request.id] = row[: request.max_new_tokens]
    return answers


def compare(folder: Path, dtype: str, cases: dict[str, tuple[list[Request], int]], repetitions: int, tell) -> dict:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    ours = {adapter: our_model(folder, dtype, adapter) for adapter in ("none", "mm")}
    found: dict[str, Any] = {}
    for name, (requests, at_once) in cases.items():
        wanted = sum(request.max_new_tokens for request in requests)
        answers: dict[str, dict[str, list[int]]] = {}

        def keep(who: str, ask: Callable, *rest, answers=answers, requests=requests, at_once=at_once) -> Callable:
            return lambda: answers.__setitem__(who, ask(*rest, requests, at_once))

        work = {f"engine, {adapter}": keep(adapter, ask_engine, model) for adapter, model in ours.items()}
        for cache in ("dynamic", "static"):
            work[f"transformers, {cache}"] = lambda cache=cache, requests=requests, at_once=at_once, answers=answers: (
                answers.__setitem__(cache, ask_transformers(theirs, requests, at_once, cache))
            )
        seconds = harness.interleaved(work, repetitions, lambda who, name=name: tell(f"{dtype}, {name}: {who}"))
        best = {who: min(values) for who, values in seconds.items()}
        baseline = min(best["transformers, dynamic"], best["transformers, static"])
        equal = sum(answers["none"][id] == answers["dynamic"][id] for id in answers["none"])
        found[name] = {
            "requests": len(requests),
            "wanted_tokens": wanted,
            "tokens_per_second": {who: wanted / value for who, value in best.items()},
            "speedup": baseline / best["engine, none"],
            "speedup_with_mm_adapters": baseline / best["engine, mm"],
            "equal_answers": equal,
        }
    return found


def main(
    llama: Annotated[Path | None, typer.Option(help="A folder in Hugging Face's layout; default: random.")] = None,
    requests: Annotated[int, typer.Option(min=8, help="How many, except one at a time.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1)] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; default: both.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    torch.set_num_threads(threads)
    initialize_single_process()
    transformers.logging.set_verbosity_error()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = llama or Path(temporary)
        if llama is None:
            random_llama(folder)
        vocab_size = open_llama(folder).described()["vocab_size"]
        cases = {
            "answers of 8 to 64": (make_requests(vocab_size, requests, 8), AT_ONCE),
            "answers of 64": (make_requests(vocab_size, requests, 64), AT_ONCE),
            "one at a time": (make_requests(vocab_size, min(requests, 8), 64), 1),
        }
        found = {}
        for name in [dtype] if dtype else DTYPES:
            found[name] = compare(folder, name, cases, repetitions, lambda said: print(said, file=harness.sys.stderr))
    rows = [
        [
            f"{name}, {case}",
            *(f"{result['tokens_per_second'][who]:,.0f}" for who in result["tokens_per_second"]),
            f"{result['speedup']:.2f}",
            f"{result['equal_answers']} of {result['requests']}",
        ]
        for name, results in found.items()
        for case, result in results.items()
    ]
    columns = ["", "engine", "with mm adapters", "transformers", "static cache", "times as fast", "equal answers"]
    harness.show(
        {"llama": str(llama or "random, 512 x 8"), "aims": AIMS, "cases": found, "seconds": time.monotonic() - began},
        as_json,
        harness.table("Wanted tokens per second", columns, rows),
    )


if __name__ == "__main__":
    typer.run(main)
