"""`lavin-ds generate` on files: what is refused before a model is loaded, and what a killed job leaves."""

import json

import pytest
from generation_helpers import ASSETS
from typer.testing import CliRunner

from lavin_ds.cli.main import app
from lavin_ds.errors import UserError
from lavin_ds.generation.prompt_file import AnswerFile, read_prompts

BASE = ["--recipe", "tiny-base", "--llama", str(ASSETS / "llama")]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line, said",
    [
        ("x\n", "line 2: is not JSON"),
        ("[1]\n", "line 2: is not a JSON object"),
        ({"prompt": "a", "imgae": "b"}, "line 2: has unknown keys imgae; known are id, image, prompt"),
        ({"id": "1"}, "line 2: has no prompt that is text"),
        ({"id": True, "prompt": "a"}, "line 2: has an id that is neither"),
        ({"id": "first", "prompt": "a"}, "line 2: id first is already on line 1"),
        ({"prompt": "a", "image": "none.png"}, "line 2: has image none.png, which does not exist"),
        ({"prompt": "a", "image": "../p.png"}, r"line 2: has image ../p.png, which is outside"),
        ({"prompt": "a", "image": 5}, "line 2: has an image that is not a path"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    (tmp_path / "in").mkdir()
    (tmp_path / "p.png").touch()
    with pytest.raises(UserError, match=said):
        read_prompts(write(tmp_path / "in" / "prompts.jsonl", {"id": "first", "prompt": "a"}, line))


def test_an_answer_file_goes_on_behind_its_last_whole_line(tmp_path):
    records = read_prompts(write(tmp_path / "p.jsonl", *({"prompt": f"{n}"} for n in range(3))))
    whole = {"id": "1", "text": "one", "finish": "eos", "tokens": 1}
    out = write(tmp_path / "a.jsonl", whole, '{"id": "2", "te')
    assert AnswerFile(out, records).done == {"1"}
    assert out.read_text() == json.dumps(whole) + "\n"


def test_an_answer_file_of_other_prompts_is_refused(tmp_path):
    records = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a"}))
    with pytest.raises(UserError, match="an answer to 7, which is not in --prompts"):
        AnswerFile(write(tmp_path / "a.jsonl", {"id": "7"}), records)
    with pytest.raises(UserError, match="holds lines that are not answers"):
        AnswerFile(write(tmp_path / "b.jsonl", "hello\n"), records)


def test_a_file_of_prompts_is_answered_and_a_second_time_goes_on(tmp_path):
    prompts = write(tmp_path / "p.jsonl", *({"id": f"q{n}", "prompt": f"Which? (A) {n} (B) {n + 1}"} for n in range(5)))
    out = tmp_path / "a.jsonl"
    command = ["generate", "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "6", *BASE]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    answers = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert answers.keys() == {f"q{n}" for n in range(5)}
    assert all(answer["text"].startswith("The answer is") for answer in answers.values())

    first = out.read_text().splitlines(keepends=True)
    out.write_text("".join(first[:2]) + first[2][:9])  # as a kill leaves it
    again = CliRunner().invoke(app, command)
    assert "2 of 5 are already answered" in again.output
    assert {line["id"]: line for line in map(json.loads, out.read_text().splitlines())} == answers


def test_one_prompt_is_answered_on_the_screen():
    result = CliRunner().invoke(app, ["generate", "Which? (A) one (B) two", "--max-new-tokens", "5", *BASE])
    assert result.exit_code == 0 and result.stdout.startswith("The answer is")
