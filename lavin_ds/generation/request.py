"""The requests and answers of the generation engine."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lavin_ds.errors import UserError

# eos: the model ended its answer. stop: a stop string appeared. length: max_new_tokens were generated, or the slot is
# full.
Finish = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its probabilities.

    temperature 0 is greedy: the likeliest token, and the other settings have no effect. The authors evaluate with
    temperature 0.1 and top_p 0.75 (reference.md, section 1).
    """

    temperature: float = 0.0
    top_p: float = 1.0  # draw from the fewest likeliest tokens that hold this share of the probability
    top_k: int = 0  # draw from at most this many tokens; 0: all
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be a number from 0 (greedy) up.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1.")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be 0 (all tokens) or more.")


GREEDY = Sampling()


def random_stream(seed: int, request_id: str) -> np.random.Generator:
    """The random numbers of one request. They do not depend on the batch."""
    return np.random.default_rng([seed, zlib.crc32(request_id.encode())])


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

    prompt_ids: the prompt's own tokens, without BOS and prefix, which the engine puts before them.
    image: uint8 pixels [S, S, 3] as `data.images` makes them, cached features [F, W] in float32, or None.
    scored_ids: tokens whose log-probabilities after the prompt are wanted. They are read, not generated. Generated
        tokens come after them.
    """

    id: str  # seeds sampling, together with sampling.seed
    prompt_ids: np.ndarray
    image: np.ndarray | None = None
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    scored_ids: np.ndarray | None = None
    top_logprobs: int | None = None  # also return log-probabilities of each token and of this many likeliest

    def __post_init__(self):
        if self.max_new_tokens < 0:
            raise UserError(f"Request {self.id}: max_new_tokens {self.max_new_tokens} must not be negative.")
        if not self.max_new_tokens and self.scored_ids is None:
            raise UserError(f"Request {self.id} asks for no token: set max_new_tokens above 0.")
        if any(not text for text in self.stop):
            raise UserError(f"Request {self.id}: a stop string is empty.")


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability at temperature 1, and of the likeliest tokens in its place."""

    id: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Answer:
    """What has been generated for a request so far. It is complete when `finish` is set."""

    id: str
    prompt_tokens: int  # ids read before the answer: BOS, prefix, visual tokens, prompt, scored ids
    ids: list[int] = field(default_factory=list)  # without EOS
    text: str = ""  # without the stop string, and without an incomplete character at the end
    logprobs: list[Logprob] = field(default_factory=list)  # of `ids`, and of EOS if it ended the answer
    scored_logprobs: list[float] = field(default_factory=list)  # of the request's scored_ids
    finish: Finish | None = None
