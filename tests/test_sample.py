"""The generated data set: same bytes for the same seed, the official schema, no answer in the text."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from lavin_ds.data_prep.sample import KINDS, SIZE, generate, make_sample

FIELDS = [
    *("question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category"),
    *("skill", "lecture", "solution", "split"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample")
    generate(out, seed=3, train=42, val=14, test=140)
    return out


def read(data: Path, name: str) -> dict:
    return json.loads((data / name).read_text(encoding="utf-8"))


def files(data: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}


def picture_samples(count: int, seed: int = 0):
    samples = (make_sample(seed, "train", i) for i in range(2 * count))
    return [sample for sample in samples if sample.picture is not None]


def test_same_seed_same_bytes(data, tmp_path):
    generate(tmp_path, seed=3, train=42, val=14, test=140)
    assert files(tmp_path) == files(data)


def test_other_seeds_and_splits_have_other_records():
    def drawn(seed, split):
        return [make_sample(seed, split, i).problem | {"split": ""} for i in range(14)]

    assert drawn(0, "train") != drawn(1, "train")
    assert drawn(0, "train") != drawn(0, "test")


def test_a_record_does_not_depend_on_the_size_of_the_set(tmp_path, data):
    generate(tmp_path, seed=3, train=14, val=0, test=0)
    small, large = read(tmp_path, "problems.json"), read(data, "problems.json")
    assert all(small[pid] == large[pid] for pid in small)


def test_follows_the_official_schema(data):
    problems, splits = read(data, "problems.json"), read(data, "pid_splits.json")
    assert {split: len(pids) for split, pids in splits.items()} == {"train": 42, "val": 14, "test": 140}
    for split, pids in splits.items():
        for pid in pids:
            problem = problems[pid]
            assert list(problem) == FIELDS
            assert problem["split"] == split
            assert 2 <= len(problem["choices"]) <= 5
            assert len(set(problem["choices"])) == len(problem["choices"])
            assert 0 <= problem["answer"] < len(problem["choices"])
            assert 1 <= int(problem["grade"].removeprefix("grade")) <= 12


def test_has_the_schema_of_the_real_data(data, shared):
    real = json.loads((shared / "data" / "scienceqa" / "problems.json").read_text(encoding="utf-8"))
    assert list(next(iter(real.values()))) == FIELDS


def test_pictures_decode_and_have_captions(data):
    problems, captions = read(data, "problems.json"), read(data, "captions.json")["captions"]
    pictured = {pid for pid, problem in problems.items() if problem["image"]}
    assert set(captions) == pictured
    assert len(pictured) == len(problems) / 2
    for pid in pictured:
        with Image.open(data / "images" / problems[pid]["split"] / pid / "image.png") as image:
            assert image.convert("RGB").size == (SIZE, SIZE)


def test_every_score_column_is_filled(data):
    test = [p for p in read(data, "problems.json").values() if p["split"] == "test"]
    assert {p["subject"] for p in test} == {"natural science", "social science", "language science"}
    assert {(bool(p["image"]), bool(p["hint"])) for p in test} == {(a, b) for a in (True, False) for b in (True, False)}
    assert {int(p["grade"].removeprefix("grade")) <= 6 for p in test} == {True, False}


def test_the_answer_is_what_the_caption_and_the_solution_say():
    for sample in picture_samples(700):
        right = sample.problem["choices"][sample.problem["answer"]]
        assert right in sample.caption.split()
        assert right in sample.problem["solution"].rstrip(".").split()


def test_question_and_hint_name_no_choice():
    lectures = defaultdict(set)
    for sample in picture_samples(700):
        problem = sample.problem
        words = f"{problem['question']} {problem['hint']}".replace("?", "").replace(".", "").split()
        assert not set(words) & set(problem["choices"])
        lectures[problem["skill"]].add(problem["lecture"])
    assert all(len(constant) == 1 for constant in lectures.values())


@pytest.mark.parametrize("feature", ["position", "content"])
def test_no_feature_of_the_text_beats_chance(feature):
    """The commonest answer for each (kind, number of choices, feature), learnt from half, scored on the other half.

    A leak in a position or in a word of the choices, for example values drawn around the answer, would show as
    an accuracy away from chance by more than 4 of chance's own standard deviations.
    """
    tallies, scored = defaultdict(Counter), []
    for i, sample in enumerate(picture_samples(5000)):
        problem = sample.problem
        choices = problem["choices"]
        if feature == "position":
            key, value = (problem["question"], len(choices), problem["hint"]), problem["answer"]
        else:
            # Among these very choices, whatever their order: which of them is right?
            key, value = (problem["question"], frozenset(choices)), choices[problem["answer"]]
        if i % 2 == 0:
            tallies[key][value] += 1
        elif tallies[key]:
            guess = tallies[key].most_common(1)[0][0]
            scored.append((guess == value, 1 / len(choices)))
    right, chance = (sum(column) / len(scored) for column in zip(*scored, strict=True))
    spread = (chance * (1 - chance) / len(scored)) ** 0.5
    assert len(scored) > 1500
    assert abs(right - chance) < 4 * spread


def test_every_choice_is_right_equally_often():
    """A value is right as often as its being one of so many choices says, whatever the value."""
    offered, right = Counter(), Counter()
    for sample in picture_samples(5000):
        problem = sample.problem
        for position, choice in enumerate(problem["choices"]):
            offered[problem["question"][:12], choice] += 1 / len(problem["choices"])
            right[problem["question"][:12], choice] += position == problem["answer"]
    for key, expected in offered.items():
        assert abs(right[key] - expected) < 4.5 * expected**0.5, key


def test_texts_are_short():
    for i in range(len(KINDS) * 20):
        problem = make_sample(0, "train", i).problem
        assert len(problem["question"].split()) < 12
        assert len(problem["lecture"].split()) + len(problem["solution"].split()) < 12
