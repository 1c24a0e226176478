"""From texts to the tokens of a sample, under the length limit.

In training a sample is prompt, response and EOS; in evaluation it is the prompt. The two are shortened separately,
because a long response must not change the question that evaluation asks. So a row stores evaluation's prompt
separately (`prompt_ids`) if training had to shorten the prompt further. A sample whose response does not fit keeps its
prompt for evaluation.

A sample may be a whole conversation: several turns, each with prompt, response and EOS. Every response is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lavin_ds.data.layout import Frame, room
from lavin_ds.data.prompts import Turn
from lavin_ds.data.schema import PromptSettings
from lavin_ds.data.tokenizer import Tokenizer

ANSWER_ROOM = 64  # tokens left for the answer after an evaluation prompt; the authors' max_gen_len


@dataclass(frozen=True)
class Sample:
    """Tokens of one row (see data/schema.py). `outcome` is a field name of LengthCounts.

    A `dropped` sample has no tokens. `reason` is set if the sample is not trained on.
    """

    outcome: str
    token_ids: Sequence[int] = ()
    label_spans: Sequence[int] = ()
    prompt_ids: Sequence[int] = ()
    reason: str = ""

    @property
    def label_count(self) -> int:
        return sum(self.label_spans[1::2]) - sum(self.label_spans[::2])

    @property
    def prompt_length(self) -> int:
        return self.label_spans[0] if self.label_spans else len(self.token_ids)


@dataclass(frozen=True)
class _Encoded:
    """A turn and its ids. response_ids end with EOS."""

    turn: Turn
    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def total(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def make_samples(
    conversations: Sequence[Sequence[Turn]],
    has_image: Sequence[bool],
    tokenizer: Tokenizer,
    frame: Frame,
    settings: PromptSettings,
) -> list[Sample]:
    """Tokenises conversations (most have a single turn) and fits each into settings.max_length."""
    turns = [turn for conversation in conversations for turn in conversation]
    prompts, responses = [turn.prompt(turn.context) for turn in turns], [turn.response for turn in turns]
    prompt_ids = tokenizer.encode_batch(prompts)
    limits = [room(settings.max_length, has, frame, settings.visual_tokens) for has in has_image]
    if settings.compat:
        joint_ids = tokenizer.encode_batch([p + r for p, r in zip(prompts, responses, strict=True)])
        triples = zip(prompt_ids, joint_ids, limits, strict=True)  # the authors' code has single turns only
        return [_cut_at_the_end(p, [*joint, tokenizer.eos_id], limit) for p, joint, limit in triples]
    response_ids = tokenizer.encode_continuation_batch(responses)
    encoded = iter(
        _Encoded(turn, p, [*r, tokenizer.eos_id]) for turn, p, r in zip(turns, prompt_ids, response_ids, strict=True)
    )
    samples = []
    for conversation, limit in zip(conversations, limits, strict=True):
        own = [next(encoded) for _ in conversation]
        samples.append(_fit(own, limit, tokenizer, settings))
    return samples


def _cut_at_the_end(prompt_ids: list[int], joint_ids: list[int], limit: int) -> Sample:
    """compat: cuts the end off at the limit, EOS first. Labels begin after as many ids as the prompt has by itself."""
    token_ids = joint_ids[:limit]
    start = min(len(prompt_ids), len(token_ids))
    same_prompt = token_ids[:start] == prompt_ids
    return Sample(
        outcome="whole" if len(joint_ids) <= limit else "cut",
        token_ids=token_ids,
        label_spans=[start, len(token_ids)] if start < len(token_ids) else [],
        prompt_ids=[] if same_prompt else prompt_ids,
    )


def _fit(turns: list[_Encoded], limit: int, tokenizer: Tokenizer, settings: PromptSettings) -> Sample:
    """A sample of at most `limit` ids: the whole, or shortened, or only the first prompt, or dropped."""
    total = sum(turn.total for turn in turns)
    if total <= limit:
        return _training_sample("whole", turns)
    may_shorten = settings.overlength == "shorten"
    if may_shorten and turns[0].total <= limit:
        return _training_sample("shortened", _first_that_fit(turns, limit))
    over = f"{total - limit} tokens over max_length {settings.max_length}"
    turn, prompt_ids, response_ids = turns[0].turn, turns[0].prompt_ids, turns[0].response_ids
    answer_room = min(ANSWER_ROOM, settings.max_length // 4, len(response_ids))
    asked_ids = _shorten(turn, prompt_ids, limit - answer_room, tokenizer, may_shorten)
    if asked_ids is None:
        return Sample("dropped", reason=f"{over} (its prompt leaves no room for an answer)")
    if may_shorten:
        shorter_ids = _shorten(turn, asked_ids, limit - len(response_ids), tokenizer)
        if shorter_ids is not None:
            return _training_sample("shortened", [_Encoded(turn, shorter_ids, response_ids)], asked_ids)
    why = "too long even without its context" if may_shorten else f"overlength is {settings.overlength}"
    return Sample("evaluation_only", token_ids=asked_ids, reason=f"{over} ({why})")


def _first_that_fit(turns: list[_Encoded], limit: int) -> list[_Encoded]:
    """As many of a conversation's first turns as fit into `limit`."""
    kept, total = [], 0
    for turn in turns:
        total += turn.total
        if total > limit:
            break
        kept.append(turn)
    return kept


def _training_sample(outcome: str, turns: list[_Encoded], asked_ids: Sequence[int] = ()) -> Sample:
    token_ids, label_spans = [], []
    for turn in turns:
        token_ids += turn.prompt_ids
        label_spans += [len(token_ids), len(token_ids) + len(turn.response_ids)]
        token_ids += turn.response_ids
    same_prompt = asked_ids == turns[0].prompt_ids
    return Sample(outcome, token_ids, label_spans, () if same_prompt else asked_ids)


def _shorten(
    turn: Turn, prompt_ids: list[int], limit: int, tokenizer: Tokenizer, may_shorten: bool = True
) -> list[int] | None:
    """Ids of the prompt with as many of the context's first words as fit into `limit`. None if even none fit."""
    if len(prompt_ids) <= limit:
        return prompt_ids
    context = turn.context
    context_ids = tokenizer.encode(context) if may_shorten else []
    keep = len(context_ids)
    while keep and len(prompt_ids) > limit:
        keep = max(0, keep - (len(prompt_ids) - limit))
        shorter = _whole_words(context, tokenizer.decode(context_ids[:keep]))
        prompt_ids = tokenizer.encode(turn.prompt(shorter))
    return prompt_ids if len(prompt_ids) <= limit else None


def _whole_words(text: str, start: str) -> str:
    """`start` without a broken character or word at its end; `start` is the beginning of `text` up to some token."""
    start = start.rstrip("\ufffd")
    inside_a_word = text.startswith(start) and not text[len(start) : len(start) + 1].isspace()
    if inside_a_word and len(start) < len(text) and any(map(str.isspace, start)):
        while not start[-1].isspace():
            start = start[:-1]
    return start.strip()
