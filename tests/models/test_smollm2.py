"""A real base with grouped heads and tied embeddings: our logits are transformers', whole, cached and split."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from lavin_ds.config import load_recipe
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.models.cache import KVCache, Reads
from lavin_ds.models.llama import Llama
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.weights.llama import load_llama

TEXTS = ["Question: Which of these states is farthest north?\nOptions:", "The capital of France is Paris, and that of"]
PROMPTS = (4, 7)  # tokens of either that are read at once; the others are decoded one by one


def read(folder: Path) -> torch.Tensor:
    """Both texts as ids [2, T], cut to the shorter one."""
    tokenizer = Tokenizer(folder / "tokenizer.json")
    encoded = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(TEXTS)]
    length = min(map(len, encoded))
    return torch.tensor([ids[:length] for ids in encoded])


@torch.no_grad()
def logits_whole_and_cached(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, T, V] of one forward pass, and of a prompt followed by single tokens; as much as this rank loads."""
    model = Llama(load_recipe("smollm2-135m-captions").model.llm).eval()
    load_llama(model, folder)
    ids = read(folder)
    whole = model.logits(model(model.embed(ids)))
    cache = KVCache(model.config, 2, ids.shape[1], torch.float32, "cpu")
    prompts = torch.cat([ids[0, : PROMPTS[0]], ids[1, : PROMPTS[1]]])[None]
    read_at_once = model.logits(model(model.embed(prompts), reads=Reads(cache, (0, 1), PROMPTS)))[0]
    cached = [[rows] for rows in read_at_once.split(PROMPTS)]
    for b, prompt in enumerate(PROMPTS):
        for token in ids[b, prompt:].split(1):
            h = model(model.embed(token[None]), reads=Reads(cache, (b,), (1,)))
            cached[b].append(model.logits(h[0]))
    return whole, torch.stack([torch.cat(rows) for rows in cached])


def rank_of_three(rank: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(out / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=300))
    initialize_tensor_parallel(3)
    torch.save(logits_whole_and_cached(folder), out / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_logits_are_those_of_transformers_cached_or_not_on_one_rank_and_on_three(smollm2, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(read(smollm2)).logits
    del theirs
    torch.multiprocessing.spawn(rank_of_three, (smollm2, tmp_path), nprocs=3)
    found = {"one rank": logits_whole_and_cached(smollm2)}
    found |= {f"rank {rank} of 3": torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)}
    for where, (whole, cached) in found.items():
        for got, how in ((whole, "whole"), (cached, "cached")):
            off = ((got - want).abs().max() / want.abs().max()).item()
            assert off <= 1e-5, (where, how)
            print(f"{where}, {how}: {off:.1e}")
