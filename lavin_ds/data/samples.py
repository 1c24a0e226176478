"""From the text of a question to its tokens, under the length limit.

In training a sample is prompt, response and EOS; in evaluation its prompt alone. A long lecture in the
response must not change the question that is asked in evaluation, so the two are fitted apart: a row carries
a prompt of its own (`prompt_ids`) wherever training had to shorten it, and a sample that cannot be trained on
without losing a part of the response is still kept to be answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lavin_ds.data.layout import Frame, room
from lavin_ds.data.prompts import Question, build_prompt, build_response
from lavin_ds.data.schema import PromptSettings
from lavin_ds.data.tokenizer import Tokenizer

ANSWER_ROOM = 64  # tokens left to generate after an evaluation prompt; the authors' max_gen_len


@dataclass(frozen=True)
class Sample:
    """Tokens of one row (see data/schema.py), and what became of it: a field name of LengthCounts.

    `dropped` samples have no tokens; `reason` says why for all that are not trained on.
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


def make_samples(
    questions: list[Question],
    contexts: list[str],
    has_image: list[bool],
    tokenizer: Tokenizer,
    frame: Frame,
    settings: PromptSettings,
) -> list[Sample]:
    """Tokenises questions, each with its context, and fits them into settings.max_length."""
    compat = settings.compat is not None
    prompts = [build_prompt(q, settings.format, c, compat) for q, c in zip(questions, contexts, strict=True)]
    responses = [build_response(q, settings.format, compat) for q in questions]
    prompt_ids = tokenizer.encode_batch(prompts)
    rooms = [room(settings.max_length, has, frame, settings.visual_tokens) for has in has_image]
    if compat:
        joint_ids = tokenizer.encode_batch([p + r for p, r in zip(prompts, responses, strict=True)])
        triples = zip(prompt_ids, joint_ids, rooms, strict=True)
        return [_cut_at_the_end(p, [*joint, tokenizer.eos_id], limit) for p, joint, limit in triples]
    response_ids = tokenizer.encode_continuation_batch(responses)
    rows = zip(questions, contexts, prompt_ids, response_ids, rooms, strict=True)
    return [
        _fit(question, context, prompt, [*response, tokenizer.eos_id], limit, tokenizer, settings)
        for question, context, prompt, response, limit in rows
    ]


def _cut_at_the_end(prompt_ids: list[int], joint_ids: list[int], limit: int) -> Sample:
    """compat: what passes the limit is lost, EOS first; the boundary is where the prompt alone would end."""
    token_ids = joint_ids[:limit]
    start = min(len(prompt_ids), len(token_ids))
    same_prompt = token_ids[:start] == prompt_ids
    return Sample(
        outcome="whole" if len(joint_ids) <= limit else "cut",
        token_ids=token_ids,
        label_spans=[start, len(token_ids)] if start < len(token_ids) else [],
        prompt_ids=[] if same_prompt else prompt_ids,
    )


def _fit(
    question: Question,
    context: str,
    prompt_ids: list[int],
    response_ids: list[int],
    limit: int,
    tokenizer: Tokenizer,
    settings: PromptSettings,
) -> Sample:
    """Whole if it fits; else by policy; and if the response cannot stay whole, the prompt alone."""
    total = len(prompt_ids) + len(response_ids)
    if total <= limit:
        return _training_sample("whole", prompt_ids, response_ids)
    over = f"{total - limit} tokens over max_length {settings.max_length}"
    may_shorten = settings.overlength == "shorten"
    answer_room = min(ANSWER_ROOM, settings.max_length // 4, len(response_ids))
    asked_ids = _shorten(question, context, prompt_ids, limit - answer_room, tokenizer, settings, may_shorten)
    if asked_ids is None:
        return Sample("dropped", reason=f"{over} (its prompt leaves no room for an answer)")
    if may_shorten:
        shorter_ids = _shorten(question, context, asked_ids, limit - len(response_ids), tokenizer, settings)
        if shorter_ids is not None:
            return _training_sample("shortened", shorter_ids, response_ids, asked_ids)
    why = "too long even without its context" if may_shorten else f"overlength is {settings.overlength}"
    return Sample("evaluation_only", token_ids=asked_ids, reason=f"{over} ({why})")


def _training_sample(outcome, prompt_ids, response_ids, asked_ids=()) -> Sample:
    n, total = len(prompt_ids), len(prompt_ids) + len(response_ids)
    same_prompt = asked_ids == prompt_ids
    return Sample(outcome, [*prompt_ids, *response_ids], [n, total], () if same_prompt else asked_ids)


def _shorten(
    question: Question,
    context: str,
    prompt_ids: list[int],
    limit: int,
    tokenizer: Tokenizer,
    settings: PromptSettings,
    may_shorten: bool = True,
) -> list[int] | None:
    """Ids of the prompt with as many of the context's first words as fit into `limit`, or None."""
    if len(prompt_ids) <= limit:
        return prompt_ids
    context_ids = tokenizer.encode(context) if may_shorten else []
    keep = len(context_ids)
    while keep and len(prompt_ids) > limit:
        keep = max(0, keep - (len(prompt_ids) - limit))
        shorter = _whole_words(context, tokenizer.decode(context_ids[:keep]))
        prompt_ids = tokenizer.encode(build_prompt(question, settings.format, shorter))
    return prompt_ids if len(prompt_ids) <= limit else None


def _whole_words(text: str, start: str) -> str:
    """`start`, a beginning of `text` cut at any token, without a broken last character or word."""
    start = start.rstrip("\ufffd")
    inside_a_word = text.startswith(start) and not text[len(start) : len(start) + 1].isspace()
    if inside_a_word and len(start) < len(text) and any(map(str.isspace, start)):
        while not start[-1].isspace():
            start = start[:-1]
    return start.strip()
