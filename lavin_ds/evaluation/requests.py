"""A task's requests to a model, and the answers. Imports no torch: questions are read before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lavin_ds.data.layout import Frame
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.generation.request import GREEDY, Sampling


@dataclass(frozen=True)
class Generation:
    """How a response is generated."""

    max_new_tokens: int = 64
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Request:
    """One question to a model: either a response is generated, or the given continuations are scored.

    id: unique within its RequestSet; the answer has the same id.
    prompt_ids: the prompt alone, without BOS, prefix and visual tokens.
    image: index that RequestSet.image reads, or -1 for text.
    continuations: ids of each text whose log-likelihood after the prompt is wanted. EOS counts if it is among them.
    """

    id: str
    prompt_ids: Sequence[int]
    image: int = -1
    generation: Generation | None = None
    continuations: Sequence[Sequence[int]] = ()

    def __post_init__(self):
        if bool(self.generation) == bool(self.continuations):
            raise ValueError(f"Request {self.id} must have generation settings or continuations, and not both.")
        if not all(len(ids) for ids in self.continuations):
            raise ValueError(f"Request {self.id} has an empty continuation.")


@dataclass(frozen=True)
class RequestSet:
    """The requests of one task to one model, and what they share.

    max_length: the most positions of prompt and response together, with the modality token and the frame.
    image: reads the image of a request for the model: uint8 pixels [size, size, 3], or float32 features [F, W].
    Requests with the same index share one pass through the ViT if they are in one batch.
    """

    requests: Sequence[Request]
    tokenizer: Tokenizer
    frame: Frame
    max_length: int
    image: Callable[[int], np.ndarray]

    def __post_init__(self):
        seen = set()
        for request in self.requests:
            if request.id in seen:
                raise UserError(f"Two questions have the id {request.id}: answers are matched by id.")
            seen.add(request.id)


@dataclass(frozen=True)
class Answer:
    """A model's answer to the request with the same id.

    text: the response, without blanks around it; empty if continuations were scored.
    log_likelihoods: of each continuation, in nats, summed over its tokens; empty if a response was generated.
    ending: "done"; "cut" if the response reached its limit before EOS; "no_room" if the prompt (with the longest
    continuation) does not fit into max_length, so nothing was generated or scored.
    """

    id: str
    text: str = ""
    log_likelihoods: tuple[float, ...] = ()
    ending: Literal["done", "cut", "no_room"] = "done"
