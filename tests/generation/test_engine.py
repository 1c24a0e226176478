"""The generation engine on a small random LaVIN, against passes without cache, batch or packing."""

import dataclasses

import numpy as np
import pytest
import torch
from generation_helpers import (
    IMAGES,
    VOCABULARY,
    Letters,
    forward_logits,
    is_greedy,
    one_by_one,
    random_requests,
    small_lavin,
)

from lavin_ds.errors import UserError
from lavin_ds.generation.engine import Engine
from lavin_ds.generation.request import Request, Sampling
from lavin_ds.parallel import initialize_single_process


@pytest.fixture(scope="module")
def model():
    initialize_single_process()
    return small_lavin()


def answers_of(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    return {answer.id: answer.ids for answer in engine.run(requests)}


def test_answers_equal_passes_without_cache_for_300_requests_that_come_and_go(model):
    requests = random_requests(300)
    engine, random = Engine(model, Letters(), slots=7, capacity=80), np.random.default_rng(1)
    arriving, answers = list(requests), {}
    while arriving or engine.busy:
        for _ in range(min(len(arriving), random.integers(0, 4))):
            engine.submit(arriving.pop(0))
        answers |= {answer.id: answer for answer in engine.step() if answer.finish}
    assert all(is_greedy(model, request, answers[request.id]) for request in requests)
    assert len({tuple(answer.ids) for answer in answers.values()}) > 200  # the prompts matter
    assert len(engine.free) == 7 and not engine.running
    for request in requests[:12]:
        assert answers[request.id].ids == one_by_one(model, request)


def test_long_prompts_are_read_in_parts(model, monkeypatch):
    monkeypatch.setattr("lavin_ds.generation.engine.READ_AT_ONCE", 5)
    requests = {request.id: request for request in random_requests(20, seed=2)}
    for answer in Engine(model, Letters(), slots=3, capacity=80).run(requests.values()):
        assert is_greedy(model, requests[answer.id], answer)


def count_tokens(model, monkeypatch) -> list[int]:
    """A list to which each pass of the model adds the number of tokens that it reads."""
    read, counts = model.read, []
    monkeypatch.setattr(model, "read", lambda ids_N, *rest: counts.append(len(ids_N)) or read(ids_N, *rest))
    return counts


def test_a_beginning_that_requests_share_is_read_once(model, monkeypatch):
    counts = count_tokens(model, monkeypatch)
    preset = np.arange(9, 59)
    requests = [Request(f"r{n}", np.append(preset, 60 + n), max_new_tokens=1) for n in range(6)]
    expected = {request.id: one_by_one(model, request) for request in requests}
    engine = Engine(model, Letters(), slots=6, capacity=80)
    counts.clear()
    assert answers_of(engine, requests) == expected
    head = len(engine.frame.head(False, 0))
    assert counts == [head + 51, 5]  # all of the first request, then the last token of each other


def test_a_conversation_goes_on_from_what_its_slot_holds(model, monkeypatch):
    engine = Engine(model, Letters(), slots=2, capacity=200)
    first = Request("turn-1", np.arange(9, 60), IMAGES[0], max_new_tokens=8)
    (answer,) = engine.run([first])
    second = dataclasses.replace(first, id="turn-2", prompt_ids=np.append(first.prompt_ids, [*answer.ids, 70, 71]))
    expected = one_by_one(model, second)
    counts = count_tokens(model, monkeypatch)
    assert answers_of(engine, [second]) == {"turn-2": expected}
    assert counts[0] <= 4  # the last token of the first answer, which nothing has read, and what is new


def test_the_same_words_over_another_image_or_none_share_nothing(model):
    prompt = np.arange(9, 60)
    requests = [Request(f"r{n}", prompt, image, max_new_tokens=9) for n, image in enumerate([*IMAGES, None])]
    expected = {request.id: one_by_one(model, request) for request in requests}
    assert len({tuple(ids) for ids in expected.values()}) > 2
    assert answers_of(Engine(model, Letters(), slots=1, capacity=90), requests) == expected


def test_an_image_is_seen_once(model, monkeypatch):
    seen, see = [], model.visual_tokens
    monkeypatch.setattr(model, "visual_tokens", lambda images: seen.append(len(images)) or see(images))
    requests = [Request(f"r{n}", np.arange(9, 12 + n), IMAGES[n % 2], max_new_tokens=2) for n in range(8)]
    answers_of(Engine(model, Letters(), slots=4, capacity=80), requests)
    assert seen == [2]


@pytest.mark.parametrize("slots", [1, 4, 40])
def test_what_is_drawn_depends_on_seed_and_request_alone(model, slots):
    requests = random_requests(40, sampling=Sampling(temperature=1.0, top_p=0.9, seed=3))
    expected = answers_of(Engine(model, Letters(), slots=9, capacity=80), requests[::-1])
    assert answers_of(Engine(model, Letters(), slots=slots, capacity=80), requests) == expected
    other = [dataclasses.replace(r, sampling=Sampling(temperature=1.0, top_p=0.9, seed=4)) for r in requests]
    assert answers_of(Engine(model, Letters(), slots=9, capacity=80), other) != expected


def test_scored_tokens_have_the_probabilities_of_the_whole_pass(model):
    scored = np.array([20, 30, 40, 50])
    requests = [dataclasses.replace(r, scored_ids=scored, max_new_tokens=0) for r in random_requests(30)]
    engine = Engine(model, Letters(), slots=4, capacity=80)
    for answer in engine.run(requests):
        request = next(r for r in requests if r.id == answer.id)
        logits_TV = forward_logits(model, request, list(scored))[-5:-1]
        expected = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(scored)[:, None])[:, 0]
        assert answer.scored_logprobs == pytest.approx(expected.tolist(), rel=1e-5)
        assert answer.finish == "length" and not answer.ids


def test_log_probabilities_of_an_answer_are_those_of_the_whole_pass(model):
    request = Request("r", np.arange(9, 30), max_new_tokens=6, top_logprobs=3)
    (answer,) = Engine(model, Letters(), slots=2, capacity=80).run([request])
    logits_TV = forward_logits(model, request, answer.ids)[-len(answer.logprobs) - 1 :]
    for logprob, logits_V in zip(answer.logprobs, logits_TV, strict=False):
        top = torch.log_softmax(logits_V, -1).topk(3)
        assert logprob.value == pytest.approx(float(top.values[0]), rel=1e-5)  # greedy
        assert [id for id, _ in logprob.top] == top.indices.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(top.values.tolist(), rel=1e-5)


def test_a_stop_string_ends_the_answer_before_it(model):
    request = Request("r", np.arange(9, 30), max_new_tokens=12)
    (whole,) = Engine(model, Letters(), slots=1, capacity=80).run([request])
    stop = whole.text[4:6]
    at = whole.text.index(stop)
    (answer,) = Engine(model, Letters(), slots=1, capacity=80).run([dataclasses.replace(request, stop=("zzzz", stop))])
    assert answer.text == whole.text[:at] and answer.finish == "stop"


def test_text_grows_and_never_shows_a_part_of_a_stop_string(model):
    request = Request("r", np.arange(9, 30), max_new_tokens=12)
    (whole,) = Engine(model, Letters(), slots=1, capacity=80).run([request])
    stop = whole.text[5:8]
    engine, seen = Engine(model, Letters(), slots=1, capacity=80), []
    engine.submit(dataclasses.replace(request, stop=(stop,)))
    while engine.busy:
        seen += [answer.text for answer in engine.step()]
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False))
    assert seen[-1] == whole.text[: whole.text.index(stop)]


def test_cancelling_frees_the_slot_at_once(model):
    engine = Engine(model, Letters(), slots=1, capacity=80)
    running, waiting = random_requests(2)
    kept = Request("kept", np.arange(9, 20), max_new_tokens=5)
    first = engine.submit(dataclasses.replace(running, max_new_tokens=20))
    second = engine.submit(waiting)
    engine.step()
    engine.cancel(first.id)
    engine.cancel(second.id)
    assert first.finish == second.finish == "cancelled" and len(engine.free) == 1 and not engine.busy
    assert answers_of(engine, [kept]) == {"kept": one_by_one(model, kept)}


def test_an_answer_ends_where_its_slot_is_full(model):
    request = Request("r", np.arange(9, 30), max_new_tokens=500)
    engine = Engine(model, Letters(), slots=1, capacity=40)
    (answer,) = engine.run([request])
    assert answer.finish == "length" and answer.prompt_tokens + len(answer.ids) == 40


def test_a_prompt_without_room_for_an_answer_is_refused_by_name(model):
    engine = Engine(model, Letters(), slots=1, capacity=40)
    with pytest.raises(UserError, match=r"Request long has a prompt of 4\d tokens.* room for only 40"):
        engine.submit(Request("long", np.arange(9, 45), max_new_tokens=1))
    assert not engine.busy


def test_compat_answers_one_request_at_a_time():
    initialize_single_process()
    compat = small_lavin(compat=True)
    with pytest.raises(UserError, match="use 1 slot"):
        Engine(compat, Letters(), slots=2)
    engine = Engine(compat, Letters(), slots=1, capacity=80)
    requests = random_requests(12)
    assert answers_of(engine, requests) == answers_of(engine, requests[::-1])


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}],
)
def test_sampling_settings_are_checked(settings):
    with pytest.raises(UserError):
        Sampling(**settings)


def test_ids_outside_the_vocabulary_are_refused(model):
    engine = Engine(model, Letters(), slots=1, capacity=40)
    for bad in ([VOCABULARY], [-1]):
        with pytest.raises(UserError, match="Request bad"):
            engine.submit(Request("bad", np.array(bad), max_new_tokens=1))
