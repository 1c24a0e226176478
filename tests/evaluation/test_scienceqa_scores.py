"""Reading answers and scoring them, against the authors' numbers."""

import gzip
import json

import pytest

from lavin_ds.evaluation.tasks.scienceqa import (
    COLUMNS,
    Item,
    guess,
    read_answer,
    read_answer_official,
    score,
)


def item(subject="natural science", grade="grade3", hint=False, image=False, answer=0, n_choices=2) -> Item:
    return Item(subject, grade, hint, image, answer, n_choices)


def test_the_official_reading_is_the_authors(shared):
    for case in json.loads((shared / "golden/text/extract.json").read_text()):
        expected = case["index_with_3_choices"]
        read = read_answer_official(case["text"], 3)
        assert read == (expected if isinstance(expected, int) else None), case["text"]


def test_the_score_table_is_the_authors(shared):
    golden = json.loads(gzip.decompress((shared / "golden/text/scores.json.gz").read_bytes()))
    items = [
        Item(
            subject=problem["subject"],
            grade=problem["grade"],
            has_hint=problem["hint"] != "",
            has_image=problem["image"] is not None,
            answer=problem["answer"],
            n_choices=len(problem["choices"]),
        )
        for problem in golden["problems"].values()
    ]
    predicted = [golden["preds"][key] for key in golden["problems"]]
    table = score(items, predicted)
    assert len(items) == table["Avg"].count == 4241
    names = [
        "acc_natural",
        "acc_social",
        "acc_language",
        "acc_has_text",
        "acc_has_image",
        "acc_no_context",
        "acc_grade_1_6",
        "acc_grade_7_12",
        "acc_average",
    ]
    assert list(table) == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    ours = {name: f"{column.accuracy:.2f}" for name, column in zip(names, table.values(), strict=True)}
    assert ours == golden["scores"]


@pytest.mark.parametrize(
    ("response", "index"),
    [
        ("The answer is B. BECAUSE: the ball falls.", 1),
        ("The answer is B", 1),  # the authors fail this one
        ("The answer is A, no. The answer is C.", 2),  # and read an A here
        ("First the lecture. The answer is D!", 3),
        ("The answer is BC.", None),
        (
            "The answer is B. But in fact The answer is Z.",
            None,
        ),  # the last one counts, and it names no choice
        ("the answer is B.", None),
        ("Answer: C", None),
        ("The answer is", None),
        ("", None),
    ],
)
def test_the_last_answer_of_the_response_is_read(response, index):
    assert read_answer(response, 4) == index


def test_a_letter_outside_the_choices_is_no_answer():
    assert read_answer("The answer is C.", 3) == 2
    assert read_answer("The answer is C.", 2) is None
    assert read_answer_official("The answer is C.", 2) is None


def test_guesses_follow_seed_and_sample_and_cover_the_choices():
    guesses = [guess(4, 0, str(i)) for i in range(400)]
    assert guesses == [guess(4, 0, str(i)) for i in range(400)]
    assert guesses != [guess(4, 1, str(i)) for i in range(400)]
    assert all(60 < guesses.count(index) < 140 for index in range(4))


def test_columns_overlap_as_in_the_data_set():
    def columns(one: Item) -> set[str]:
        return {name for name, belongs in COLUMNS.items() if belongs(one)}

    assert columns(item(hint=True, image=True)) == {"NAT", "TXT", "IMG", "G1-6", "Avg"}
    assert columns(item("social science", "grade7")) == {"SOC", "NO", "G7-12", "Avg"}
    assert columns(item("language science", "grade12", image=True)) == {"LAN", "IMG", "G7-12", "Avg"}


def test_chance_counts_and_empty_columns():
    items = [item(n_choices=2), item(n_choices=4, answer=3), item(n_choices=4, image=True)]
    table = score(items, [0, None, 1])
    assert (table["Avg"].count, table["IMG"].count, table["SOC"].count) == (3, 1, 0)
    assert table["Avg"].accuracy == pytest.approx(100 / 3)
    assert table["Avg"].chance == pytest.approx(100 * (1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert (table["IMG"].accuracy, table["IMG"].chance) == (0.0, 25.0)
    assert (table["SOC"].accuracy, table["SOC"].chance) == (None, None)
