"""Answering prompts, a batch at a time: greedy, or top-p sampling that does not depend on the batch.

Dimensions: B samples, S decoding steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lavin_ds.data.collate import Batch
from lavin_ds.errors import UserError
from lavin_ds.evaluation.requests import Sampling, random_of
from lavin_ds.models.lavin import Lavin


def generate(
    model: Lavin,
    batch: Batch,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling | None = None,
    max_length: int | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt of `batch` (right padded, on the model's device), without EOS.

    A response ends at EOS or when it has filled its `room`: a response as long as its room was cut off, a
    shorter one ended by itself. Decoding stops as soon as the last response has ended.

    Greedy unless `sampling` is given. A response depends on its own sample (and, sampling, on the seed and
    its id), not on the others of its batch, as far as rounding allows. Compat models are the exception: their
    batches mix in the forward pass itself.

    Raises:
        UserError: a prompt leaves no room for a single token; `room` tells beforehand which do.
    """
    rooms = [room(length, max_new_tokens, max_length) for length in batch.lengths_B.tolist()]
    _check_rooms(rooms, batch, max_new_tokens, max_length)
    steps = max(rooms)
    rooms_B = torch.tensor(rooms, device=batch.ids_BT.device)
    uniform_BS = _uniform(batch.row_ids, steps, sampling.seed).to(rooms_B.device) if sampling else None
    done_B = torch.zeros_like(rooms_B, dtype=torch.bool)
    chosen = []
    with torch.inference_mode(), eval_mode(model):
        logits_BV, cache, modality_B = model.prefill(batch, steps)
        for step in range(steps):
            if sampling:
                ids_B = sample_top_p(logits_BV, sampling.temperature, sampling.top_p, uniform_BS[:, step])
            else:
                ids_B = logits_BV.argmax(-1)
            chosen.append(ids_B)
            done_B |= (ids_B == eos_id) | (rooms_B <= step + 1)
            if done_B.all():
                break
            logits_BV = model.decode(ids_B, cache, modality_B)
    ids_BS = torch.stack(chosen, dim=1).tolist()
    return [_until(eos_id, ids[:limit]) for ids, limit in zip(ids_BS, rooms, strict=True)]


def room(prompt_length: int, max_new_tokens: int, max_length: int | None = None) -> int:
    """How many tokens may follow a laid-out prompt of `prompt_length` ids; 0 or less if none.

    `max_length` counts positions, and the modality token, which is not among the ids, takes one of them.
    """
    return max_new_tokens if max_length is None else min(max_new_tokens, max_length - 1 - prompt_length)


def sample_top_p(logits_BV: torch.Tensor, temperature: float, top_p: float, uniform_B: torch.Tensor) -> torch.Tensor:
    """One id a sample [B], from the fewest likeliest tokens that hold `top_p` of the probability together.

    uniform_B: a number in [0, 1) a sample; the same number picks the same id whatever else is in the batch.
    """
    probability_BV = torch.softmax(logits_BV.float() / temperature, -1)
    probability_BV, order_BV = probability_BV.sort(descending=True, stable=True)
    cumulative_BV = probability_BV.cumsum(-1)
    kept_B = (cumulative_BV - probability_BV < top_p).sum(-1)  # the likeliest one always
    mass_B = cumulative_BV.gather(1, kept_B[:, None] - 1)[:, 0]
    rank_B = (cumulative_BV <= (uniform_B * mass_B)[:, None]).sum(-1)
    rank_B = torch.minimum(rank_B, kept_B - 1)  # uniform * mass can round up to mass
    return order_BV.gather(1, rank_B[:, None])[:, 0]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; the model's mode is put back, so that training can look at samples."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _uniform(sample_ids: list[str], steps: int, seed: int) -> torch.Tensor:
    """[B, S] numbers in [0, 1); more steps continue the same rows."""
    rows = [random_of(seed, "top-p", i).random(steps, dtype=np.float32) for i in sample_ids]
    return torch.from_numpy(np.stack(rows))


def _check_rooms(rooms: list[int], batch: Batch, max_new_tokens: int, max_length: int | None) -> None:
    for row_id, length, limit in zip(batch.row_ids, batch.lengths_B.tolist(), rooms, strict=True):
        if limit < 1:
            raise UserError(
                f"Prompt {row_id} takes {length + 1} positions with its modality token, which leaves no room "
                f"for an answer (max_new_tokens {max_new_tokens}, max_length {max_length}): shorten it."
            )


def _until(eos_id: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
