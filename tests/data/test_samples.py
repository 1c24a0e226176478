import re

import pytest
from data_helpers import golden, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavin_ds.data.layout import Frame, room
from lavin_ds.data.prompts import Instruction, Question, QuestionTurn, build_prompt, build_response
from lavin_ds.data.samples import make_samples
from lavin_ds.data.schema import PromptSettings
from lavin_ds.data.tokenizer import Tokenizer

text = st.text(alphabet="aB z\n.é日", max_size=60)


def make(question, tokenizer, has_image=True, **data):
    config = PromptSettings.of(small_config(**data))
    turn = QuestionTurn(question, None, config.format, config.compat is not None)
    return make_samples([[turn]], [has_image], tokenizer, Frame.of(tokenizer), config)[0]


def question_of(hint="", lecture="Maps have directions.", solution=""):
    return Question("Which one?", ("red", "blue"), 1, hint, lecture, solution)


def test_compat_gives_the_authors_ids_and_labels(shared):
    tokenizer = Tokenizer(shared / "data/tokenizer/llama-32k.model")
    for case, question, caption in golden(shared):
        config = PromptSettings.of(small_config(compat="lavin-official", prompt_format=case["format"]))
        turn = QuestionTurn(question, caption, case["format"], compat=True)
        [sample] = make_samples([[turn]], [False], tokenizer, Frame.of(tokenizer), config)
        labels = [0] * len(sample.token_ids)
        start, end = sample.label_spans
        labels[start:end] = sample.token_ids[start:end]
        pad = [0] * 64
        assert [tokenizer.bos_id, *sample.token_ids, *pad][:64] == case["ids64"]
        assert [0, *labels, *pad][:64] == case["labels64"]


def test_compat_cuts_at_the_end_and_keeps_the_whole_prompt_for_evaluation(tokenizer):
    question = question_of(hint="north " * 60)
    sample = make(question, tokenizer, compat="lavin-official", max_length=40)
    assert sample.outcome == "cut" and sample.label_count == 0
    assert len(sample.token_ids) == room(40, True, Frame.of(tokenizer), 2)
    prompt = build_prompt(question, "QCM-ALE", question.hint.strip(), compat=True)
    assert sample.prompt_ids == tokenizer.encode(prompt)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hint=text, lecture=text, max_length=st.integers(40, 260), has_image=st.booleans())
def test_no_response_token_is_lost_whatever_the_limit(tokenizer, hint, lecture, max_length, has_image):
    question = question_of(hint * 3, lecture)
    limit = room(max_length, has_image, Frame.of(tokenizer), 2)
    [response] = tokenizer.encode_continuation_batch([build_response(question, "QCM-ALE")])
    sample = make(question, tokenizer, has_image, max_length=max_length)
    assert len(sample.token_ids) <= limit
    if sample.outcome in ("whole", "shortened"):
        start, end = sample.label_spans
        assert list(sample.token_ids[start:end]) == [*response, tokenizer.eos_id]
        assert end == len(sample.token_ids)
    else:
        assert sample.label_count == 0 and sample.reason
    if sample.outcome == "dropped":
        assert not sample.token_ids


def test_the_ids_spell_prompt_and_response(tokenizer):
    question = question_of("Look at the map.\nIt is red.", "Maps.\nRoses.", "Blue.")
    sample = make(question, tokenizer)
    text = build_prompt(question, "QCM-ALE", question.hint) + build_response(question, "QCM-ALE")
    assert tokenizer.decode(sample.token_ids) == text


def test_shorten_cuts_the_context_at_a_word_and_nothing_else(tokenizer):
    question = question_of(hint="north " * 30)
    whole = make(question, tokenizer)
    sample = make(question, tokenizer, max_length=len(whole.token_ids) - 20)
    prompt = tokenizer.decode(sample.token_ids[: sample.prompt_length])
    assert sample.outcome == "shortened"
    pattern = r"Question: Which one\?\nContext: (north )+north\nOptions: \(A\) red \(B\) blue\nResponse:"
    assert re.fullmatch(pattern, prompt)


def test_a_long_response_does_not_change_the_question_asked_in_evaluation(tokenizer):
    question = question_of(hint="Look at the map. " * 8, lecture="directions " * 40)
    full_prompt = tokenizer.encode(build_prompt(question, "QCM-ALE", question.hint.strip()))
    whole = make(question, tokenizer)
    shortened = make(question, tokenizer, max_length=len(whole.token_ids))
    assert shortened.outcome == "shortened" and shortened.prompt_ids == full_prompt
    longer = question_of(question.hint, "directions " * 200)
    hopeless = make(longer, tokenizer, max_length=len(whole.token_ids))
    assert hopeless.outcome == "evaluation_only" and list(hopeless.token_ids) == full_prompt


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_other_policies_leave_the_prompt_alone(tokenizer, policy):
    question = question_of(hint="Look at the map.", lecture="directions " * 40)
    whole = make(question, tokenizer)
    sample = make(question, tokenizer, overlength=policy, max_length=len(whole.token_ids))
    assert sample.outcome == "evaluation_only" and f"overlength is {policy}" in sample.reason


def test_a_prompt_that_never_fits_is_dropped(tokenizer):
    question = Question("north " * 200, ("red", "blue"), 0)
    sample = make(question, tokenizer, max_length=100)
    assert sample.outcome == "dropped" and "no room for an answer" in sample.reason


def converse(tokenizer, turns, **data):
    settings = PromptSettings.of(small_config(prompt_format="conversation", **data))
    return make_samples([turns], [True], tokenizer, Frame.of(tokenizer), settings)[0]


TURNS = [Instruction("Which colour is it?", "", "It is red."), Instruction("And north?", "", "Maps have directions.")]


def test_every_reply_of_a_conversation_is_learnt_and_nothing_else(tokenizer):
    sample = converse(tokenizer, TURNS)
    spans = list(zip(sample.label_spans[::2], sample.label_spans[1::2], strict=True))
    learnt = [tokenizer.decode(sample.token_ids[start:end]) for start, end in spans]
    assert learnt == ["It is red.", "Maps have directions."]
    assert [sample.token_ids[end - 1] for _, end in spans] == [tokenizer.eos_id] * 2
    asked = [sample.token_ids[: spans[0][0]], sample.token_ids[spans[0][1] : spans[1][0]]]
    prompts = ["Instruction: Which colour is it?\nResponse:", "Instruction: And north?\nResponse:"]
    assert [tokenizer.decode(ids) for ids in asked] == prompts
    assert sample.label_count == sum(end - start for start, end in spans)


def test_a_long_conversation_loses_its_last_turns_and_keeps_the_others_whole(tokenizer):
    whole, first = converse(tokenizer, TURNS), converse(tokenizer, TURNS[:1])
    head = len(Frame.of(tokenizer).head(True, 2)) + 1
    sample = converse(tokenizer, TURNS, max_length=head + len(whole.token_ids) - 1)
    assert (sample.outcome, sample.token_ids) == ("shortened", first.token_ids)
    kept = converse(tokenizer, TURNS, max_length=head + len(whole.token_ids) - 1, overlength="drop")
    assert kept.outcome == "evaluation_only" and list(kept.token_ids) == first.token_ids[: first.prompt_length]


def test_an_instruction_loses_the_end_of_its_input_alone(tokenizer):
    turn = Instruction("Look at the map.", "north " * 30, "It is red.")
    settings = {"prompt_format": "single-turn", "max_length": 110}
    config = PromptSettings.of(small_config(**settings))
    [sample] = make_samples([[turn]], [False], tokenizer, Frame.of(tokenizer), config)
    assert sample.outcome == "shortened"
    text = tokenizer.decode(sample.token_ids)
    assert re.fullmatch(r"Instruction: Look at the map\. (north )+north\nResponse: It is red\.", text)


def test_compat_words_an_instruction_as_the_authors_do():
    turn = Instruction("Name  it.", "A rose.", " Red. ", compat=True)
    assert turn.prompt(turn.context) == "Instruction: Name it. A rose.\nResponse:" and turn.response == "Red."
