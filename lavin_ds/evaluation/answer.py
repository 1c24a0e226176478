"""Any model's answers to any task's requests: responses are generated, given continuations are scored.

Dimensions: B samples, T tokens, D model width, N scored tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lavin_ds.data.collate import collate, prompt_batch
from lavin_ds.data.layout import IGNORE
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.evaluation.generate import eval_mode, generate, room
from lavin_ds.evaluation.requests import Answer, Generation, Request, RequestSet
from lavin_ds.models.lavin import Lavin

LOGITS_AT_ONCE = 1024  # scored tokens whose logits exist at a time: 1024 * 32000 * 4 bytes = 131 MB


def answer(
    model: Lavin,
    asked: RequestSet,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answer]:
    """Answers every request of `asked`; by id, in the order of the requests.

    A model without vision reads every prompt as text.

    batch_size: prompts, or prompts with a continuation each, in one forward pass.
    on_progress: called after every batch with the number of requests answered and of all.
    """
    answers: dict[str, Answer] = {}
    by_settings: dict[Generation | None, list[Request]] = {}
    for request in asked.requests:
        if _room(request, asked, model.config.visual_tokens) < 1:
            answers[request.id] = Answer(request.id, ending="no_room")
        else:
            by_settings.setdefault(request.generation, []).append(request)
    for generation, requests in by_settings.items():
        for indices in batches_by_length([len(r.prompt_ids) for r in requests], batch_size):
            batch = [requests[i] for i in indices]
            found = (
                _generate(model, batch, asked, generation) if generation else _score(model, batch, asked, batch_size)
            )
            answers.update((one.id, one) for one in found)
            if on_progress:
                on_progress(len(answers), len(asked.requests))
    return {request.id: answers[request.id] for request in asked.requests}


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that there is little padding.

    The longest come first: if memory is short, that shows in the first batch and not after an hour.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _room(request: Request, asked: RequestSet, visual_tokens: int) -> int:
    """Tokens that may be generated; of a request with continuations, 1 if the longest fits. Below 1: no room."""
    prompt = len(asked.frame.head(request.image >= 0, visual_tokens)) + len(request.prompt_ids)
    if request.generation:
        return room(prompt, request.generation.max_new_tokens, asked.max_length)
    longest = max(map(len, request.continuations))
    return int(room(prompt, longest, asked.max_length) == longest)


def _generate(model: Lavin, requests: list[Request], asked: RequestSet, generation: Generation) -> list[Answer]:
    visual_tokens, tokenizer = model.config.visual_tokens, asked.tokenizer
    batch = prompt_batch(requests, asked.image, asked.frame, visual_tokens).to(_device(model))
    responses = generate(
        model, batch, generation.max_new_tokens, tokenizer.eos_id, generation.sampling, asked.max_length
    )
    return [
        Answer(
            request.id,
            _text(tokenizer, ids),
            # `generate` leaves EOS out: a response as long as its room did not end by itself.
            ending="cut" if len(ids) == _room(request, asked, visual_tokens) else "done",
        )
        for request, ids in zip(requests, responses, strict=True)
    ]


@dataclass(frozen=True)
class _Sequence:
    """A prompt and one continuation, as `collate` wants a row: the continuation's tokens are the labels."""

    id: str
    token_ids: np.ndarray
    label_spans: np.ndarray
    image: int


def _score(model: Lavin, requests: list[Request], asked: RequestSet, batch_size: int) -> list[Answer]:
    sequences = [
        _Sequence(
            request.id,
            np.concatenate([request.prompt_ids, continuation]).astype(np.int32),
            np.array([[len(request.prompt_ids), len(request.prompt_ids) + len(continuation)]]),
            request.image,
        )
        for request in requests
        for continuation in request.continuations
    ]
    found: dict[str, tuple[float, ...]] = {request.id: () for request in requests}
    for start in range(0, len(sequences), batch_size):
        part = sequences[start : start + batch_size]
        for sequence, value in zip(part, _log_likelihoods(model, part, asked), strict=True):
            found[sequence.id] += (value,)
    return [Answer(id, log_likelihoods=values) for id, values in found.items()]


def _log_likelihoods(model: Lavin, sequences: list[_Sequence], asked: RequestSet) -> list[float]:
    """Sum of the log-probabilities of each sequence's labelled tokens, given all tokens before them."""
    batch = collate(sequences, asked.image, asked.frame, model.config.visual_tokens, packing=True).to(_device(model))
    # Position i - 1 predicts token i. No label stands at the start of a sequence, so none is predicted by another.
    target_N = batch.labels_BT[0, 1:]
    labelled_N = target_N != IGNORE
    target_N = target_N[labelled_N]
    with torch.inference_mode(), eval_mode(model):
        h_ND = model.hidden(batch)[0, :-1][labelled_N]
        log_probability_N = torch.cat(
            [
                -F.cross_entropy(model.llm.logits(h).float(), target, reduction="none")
                for h, target in zip(h_ND.split(LOGITS_AT_ONCE), target_N.split(LOGITS_AT_ONCE), strict=True)
            ]
        )
    counts = [int(end - start) for ((start, end),) in (sequence.label_spans for sequence in sequences)]
    return [float(part.sum()) for part in log_probability_N.double().cpu().split(counts)]


def _device(model: Lavin) -> torch.device:
    return next(model.parameters()).device


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids. A base's vocabulary may be padded beyond its tokenizer's: such ids have none."""
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size]).strip()
