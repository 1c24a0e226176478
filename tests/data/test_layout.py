import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lavin_ds.data.layout import IGNORE, Frame, laid_out_lengths, lay_out, official_layout, room
from lavin_ds.data.tokenizer import Tokenizer

FRAME = Frame(bos=1, prefix_image=(7, 8, 9), prefix_text=(7, 8, 10, 11, 12))
ids = st.lists(st.integers(3, 999), min_size=1, max_size=40)


def test_image_and_text_samples_are_framed_as_documented():
    image = lay_out([50, 51, 2], [1, 3], True, FRAME, 2)
    assert image.ids.tolist() == [1, 7, 8, 9, 0, 0, 50, 51, 2]
    assert image.labels.tolist() == [IGNORE] * 7 + [51, 2]
    assert image.visual_start == 4
    text = lay_out([50, 51, 2], [1, 3], False, FRAME, 2)
    assert text.ids.tolist() == [1, 7, 8, 10, 11, 12, 50, 51, 2]
    assert text.visual_start == -1


def test_without_visual_tokens_an_image_sample_is_a_text_sample():
    image, text = (lay_out([50, 2], [1, 2], has, FRAME, 0) for has in (True, False))
    assert image.ids.tolist() == text.ids.tolist() and image.visual_start == -1


@given(prompt=ids, response=ids, has_image=st.booleans(), visual_tokens=st.integers(0, 9))
def test_every_response_token_and_eos_is_labelled_at_its_own_place_and_nothing_else(
    prompt, response, has_image, visual_tokens
):
    own = [*prompt, *response, 2]
    layout = lay_out(own, [len(prompt), len(own)], has_image, FRAME, visual_tokens)
    labelled = layout.labels != IGNORE
    assert layout.labels[labelled].tolist() == [*response, 2]
    assert (layout.labels[labelled] == layout.ids[labelled]).all()
    assert not labelled[0]  # the first label has a token before it that predicts it
    assert labelled.tolist() == [False] * (len(layout.ids) - len(response) - 1) + [True] * (len(response) + 1)


@given(own=ids, has_image=st.booleans(), visual_tokens=st.integers(0, 9))
def test_lengths_are_those_of_the_layouts_and_room_counts_the_modality_token(own, has_image, visual_tokens):
    n = len(lay_out(own, [], has_image, FRAME, visual_tokens).ids)
    assert laid_out_lengths([len(own)], [has_image], FRAME, visual_tokens).tolist() == [n]
    assert room(n + 1, has_image, FRAME, visual_tokens) == len(own)


def test_several_label_spans_leave_what_lies_between_unlabelled():
    layout = lay_out([50, 51, 52, 53], [0, 1, 2, 4], False, FRAME, 0)
    assert layout.labels[6:].tolist() == [50, IGNORE, 52, 53]


def test_official_layout_gives_the_golden_shifted_labels(shared):
    folder = shared / "golden/v1"
    inputs, train = np.load(folder / "inputs.npz"), np.load(folder / "train_reference.npz")
    config = json.loads((folder / "config.json").read_text())["config"]
    visual_tokens = config["vision_layers"] // 4
    for b, is_image in enumerate(inputs["indicators"]):
        prefix = inputs["prefix_img" if is_image else "prefix_nonimg"]
        sample = official_layout(
            inputs["ids"][b], inputs["labels"][b], is_image, prefix, visual_tokens, config["max_seq_len"]
        )
        expected = train["labels_shifted"][b]
        assert np.where(sample.labels == IGNORE, 0, sample.labels).tolist() == expected.tolist()
        assert len(sample.ids) == config["max_seq_len"] - 1
        assert sample.visual_start == (4 if is_image else -1)


def test_official_layout_loses_the_end_of_a_full_sample():
    n = 64
    ids, labels = np.arange(100, 100 + n), np.arange(100, 100 + n)
    image = official_layout(ids, labels, True, [7, 8, 9], 6, n)
    text = official_layout(ids, labels, False, [7, 8, 10, 11, 12], 6, n)
    assert image.ids[-1] == ids[-11] and text.ids[-1] == ids[-7]  # 10 and 6 tokens: reference, section 3


def test_frame_of_the_llama_tokenizer(shared):
    frame = Frame.of(Tokenizer(shared / "data/tokenizer/llama-32k.model"))
    assert frame.head(True, 6) == [1, 7084, 29901, 29871, 0, 0, 0, 0, 0, 0]
    assert frame.head(False, 6) == [1, 7084, 29901, 405, 29914, 29909]
