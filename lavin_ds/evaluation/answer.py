"""Answers the requests of a task with a model: generates responses, or scores given continuations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lavin_ds.evaluation.requests import Answer, Request, RequestSet
from lavin_ds.generation import request as generation
from lavin_ds.generation.engine import Engine
from lavin_ds.models.lavin import Lavin


def answer(
    model: Lavin,
    asked: RequestSet,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answer]:
    """Answers every request of `asked`. Returns the answers by id, in the order of the requests.

    A model without vision reads every prompt as text.

    batch_size: requests or continuations at a time; always 1 for compat models.
    on_progress: called with (answered, total) each time a request is complete.

    Raises:
        UserError: the device has no memory for so many requests at a time.
    """
    needs = {request.id: _tokens(request, asked, model.visual_count) for request in asked.requests}
    # max_length also counts the modality token, which takes no place in a slot.
    fitting = [request for request in asked.requests if needs[request.id] < asked.max_length]
    answers = {request.id: Answer(request.id, ending="no_room") for request in asked.requests if request not in fitting}
    if fitting:
        wanted = max(needs[r.id] + (r.generation.max_new_tokens - 1 if r.generation else 0) for r in fitting)
        capacity = min(asked.max_length - 1, wanted)
        engine = Engine(model, asked.tokenizer, 1 if model.compat else batch_size, capacity, asked.frame)
        for request, found in _answered(engine, fitting, asked):
            answers[request.id] = found
            if on_progress:
                on_progress(len(answers), len(asked.requests))
    return {request.id: answers[request.id] for request in asked.requests}


def _tokens(request: Request, asked: RequestSet, visual_tokens: int) -> int:
    """The least number of tokens that a request needs: its prompt, and one token or the longest continuation."""
    prompt = len(asked.frame.head(request.image >= 0, visual_tokens)) + len(request.prompt_ids)
    return prompt + max(map(len, request.continuations), default=1)


def _answered(engine: Engine, requests: list[Request], asked: RequestSet) -> Iterator[tuple[Request, Answer]]:
    """Each request with its answer, as they are completed."""
    by_id = {request.id: request for request in requests}
    scores: dict[str, dict[int, float]] = {request.id: {} for request in requests}
    for found in engine.run(parts for request in requests for parts in _parts(request, asked)):
        id, _, number = found.id.rpartition("#")
        request = by_id[id]
        if request.generation:
            # "length": the answer reached its limit before EOS.
            yield request, Answer(id, found.text.strip(), ending="cut" if found.finish == "length" else "done")
            continue
        scores[id][int(number)] = sum(found.scored_logprobs)
        if len(scores[id]) == len(request.continuations):
            ordered = tuple(scores[id][n] for n in range(len(request.continuations)))
            yield request, Answer(id, log_likelihoods=ordered)


def _parts(request: Request, asked: RequestSet) -> Iterator[generation.Request]:
    """The engine's requests: the request itself, or one per continuation. The engine reads a shared prompt once."""
    image = asked.image(request.image) if request.image >= 0 else None
    if request.generation:
        settings = request.generation
        yield generation.Request(
            f"{request.id}#0", request.prompt_ids, image, settings.max_new_tokens, settings.sampling
        )
    for number, continuation in enumerate(request.continuations):
        yield generation.Request(f"{request.id}#{number}", request.prompt_ids, image, 0, scored_ids=continuation)
