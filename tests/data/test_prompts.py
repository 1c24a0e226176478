import pytest
from data_helpers import golden

from lavin_ds.data.prompts import SCIENCEQA_FORMATS, Question, build_prompt, build_response, context_of

QUESTION = Question(
    question="Which  one?",
    choices=("red", "blue"),
    answer=1,
    hint=" A map. \n\n\n\nTwo\tstates. ",
    lecture="Maps.\nRoses.",
    solution="It is blue.",
)


def test_compat_gives_the_authors_strings(shared):
    for case, question, caption in golden(shared):
        context = context_of(question, caption, compat=True)
        assert build_prompt(question, case["format"], context, compat=True) == case["prompt"]
        assert build_response(question, case["format"], compat=True) == case["response"]


def test_default_prompt_keeps_line_breaks_and_one_space_for_a_run():
    context = context_of(QUESTION, None)
    assert build_prompt(QUESTION, "QCM-ALE", context) == (
        "Question: Which one?\nContext: A map.\n\nTwo states.\nOptions: (A) red (B) blue\nResponse:"
    )


def test_default_response_starts_with_the_space_after_the_colon():
    assert build_response(QUESTION, "QCM-ALE") == " The answer is B. BECAUSE: Maps.\nRoses. It is blue."


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("A", " The answer is B."),
        ("AL", " The answer is B. BECAUSE: Maps.\nRoses."),
        ("AE", " The answer is B. BECAUSE: It is blue."),
        ("AEL", " The answer is B. BECAUSE: It is blue. Maps.\nRoses."),
        ("LA", " Maps.\nRoses. The answer is B."),
        ("EA", " It is blue. The answer is B."),
        ("LEA", " Maps.\nRoses. It is blue. The answer is B."),
        ("ELA", " It is blue. Maps.\nRoses. The answer is B."),
    ],
)
def test_each_output_has_what_its_letters_name(output, expected):
    assert build_response(QUESTION, f"QCM-{output}") == expected


def test_al_and_ae_are_swapped_in_compat_alone():
    assert build_response(QUESTION, "QCM-AL", compat=True) == "The answer is B. BECAUSE: It is blue."
    assert "It is blue" not in build_response(QUESTION, "QCM-AL")


def test_nothing_to_explain_leaves_no_because():
    bare = Question("Is it?", ("no", "yes"), 1, lecture=" \n")
    for format in SCIENCEQA_FORMATS:
        text = build_prompt(bare, format, "") + build_response(bare, format)
        assert text.endswith("Response: The answer is B.") and "BECAUSE" not in text


@pytest.mark.parametrize("letters", ["L", "E", "LE"])
def test_upper_bound_inputs_show_the_explanation(letters):
    reason = {"L": "Maps.\nRoses.", "E": "It is blue.", "LE": "Maps.\nRoses. It is blue."}[letters]
    prompt = build_prompt(QUESTION, f"QCM{letters}-A", "")
    assert prompt.endswith(f"(B) blue\nBECAUSE: {reason}\nResponse:")


def test_caption_follows_the_hint():
    assert context_of(QUESTION, "A  rose.") == "A map.\n\nTwo states. A rose."
    assert context_of(Question("q", ("a", "b"), 0), "A rose.") == "A rose."
    assert context_of(Question("q", ("a", "b"), 0), None) == ""
