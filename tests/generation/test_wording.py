"""What a person types becomes the tokens that training reads."""

import json

import pytest
from generation_helpers import ASSETS

from lavin_ds.config import load_recipe
from lavin_ds.data.layout import Frame
from lavin_ds.data.prompts import Instruction
from lavin_ds.data.samples import make_samples
from lavin_ds.data.schema import PromptSettings
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.generation.wording import Exchange, Wording

TOKENIZER = Tokenizer(ASSETS / "llama" / "tokenizer.model")
TURNS = [("Name a colour.", "Red it is."), ("And another?", "Blue."), ("A third one, please.", "Green, then.")]


def test_a_typed_question_has_the_prompt_of_its_record(tiny_shards):
    reader = ShardReader(tiny_shards, "train")
    problems = json.loads((tiny_shards.parent / "source" / "problems.json").read_text())
    wording = Wording(load_recipe("tiny"), TOKENIZER)
    for index in range(len(reader)):
        row = reader.row(index)
        record = problems[row.id]
        choices = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDE", record["choices"], strict=False))
        typed = f"{record['question']} {choices}"
        if record["hint"]:
            typed += f"\nContext: {record['hint']}"
        assert wording.prompt_ids(typed, [], 500) == (list(row.prompt_ids), 0)


def test_turns_have_the_tokens_of_a_conversation_in_training():
    config = load_recipe("chatbot-7b", ["data.prompt_format=conversation"])
    conversation = [Instruction(asked, "", said) for asked, said in TURNS]
    (sample,) = make_samples([conversation], [False], TOKENIZER, Frame.of(TOKENIZER), PromptSettings.of(config))
    history = [Exchange(asked, said) for asked, said in TURNS[:2]]
    ids, earlier = Wording(config, TOKENIZER).prompt_ids(TURNS[2][0], history, 500)
    assert earlier == 2 and ids == list(sample.token_ids[: sample.label_spans[4]])


def test_the_oldest_turns_go_first_where_there_is_no_room():
    wording = Wording(load_recipe("chatbot-7b", ["data.prompt_format=conversation"]), TOKENIZER)
    history = [Exchange(asked, said) for asked, said in TURNS]
    whole, _ = wording.prompt_ids("More?", history, 1000)
    kept = {room: wording.prompt_ids("More?", history, room) for room in range(25, len(whole) + 2)}
    assert {earlier for _, earlier in kept.values()} == {0, 1, 2, 3}
    assert all(whole[-len(ids) :] == ids and len(ids) < room for room, (ids, _) in kept.items())
    with pytest.raises(UserError, match="room for 3 with the answer"):
        wording.prompt_ids("More?", history, 3)


def test_adapters_trained_on_single_turns_are_asked_single_turns():
    wording = Wording(load_recipe("chatbot-7b"), TOKENIZER)
    assert not wording.remembers and "asked alone" in wording.explain()
    assert wording.prompt_ids("More?", [Exchange(*TURNS[0])], 500) == (wording.prompt_ids("More?", [], 500)[0], 0)


def test_earlier_turns_leave_room_for_the_answer():
    wording = Wording(load_recipe("chatbot-7b", ["data.prompt_format=conversation"]), TOKENIZER)
    history = [Exchange(asked, said) for asked, said in TURNS]
    whole, _ = wording.prompt_ids("More?", history, 1000)
    room = len(whole) + 10
    assert wording.prompt_ids("More?", history, room, for_answer=10) == (whole, 3)
    assert wording.prompt_ids("More?", history, room, for_answer=11)[1] == 2
    ids, earlier = wording.prompt_ids("More?", history, room, for_answer=1000)
    assert earlier > 0 and room // 4 < len(ids) <= room // 2 + 1
