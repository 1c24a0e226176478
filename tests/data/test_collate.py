import pickle

import numpy as np
import pytest
import torch

from lavin_ds.data.collate import collate, prompt_batch
from lavin_ds.data.layout import IGNORE, Frame
from lavin_ds.data.shards import Row

FRAME = Frame(bos=1, prefix_image=(7, 8, 9), prefix_text=(7, 8, 10, 11, 12))


def row(name: str, token_ids: list[int], prompt: int, image: int = -1) -> Row:
    tokens = np.array(token_ids, dtype=np.int32)
    spans = np.array([[prompt, len(tokens)]], dtype=np.int32)
    return Row(name, tokens, spans, tokens[:prompt], image, image >= 0, False, 0, 2, "natural science", "grade1")


def pixels(index: int) -> np.ndarray:
    array = np.full((4, 4, 3), index, dtype=np.uint8)
    array.flags.writeable = False  # as a view of a mapped file is
    return array


ROWS = [row("a", [50, 51, 2], 1, image=40), row("b", [52, 2], 1), row("c", [53, 54, 55, 2], 2, image=30)]


def test_a_batch_is_padded_to_its_own_longest():
    batch = collate(ROWS, pixels, FRAME, 2)
    assert batch.ids_BT.shape == (3, 10) and batch.lengths_B.tolist() == [9, 8, 10]
    assert batch.ids_BT[0].tolist() == [1, 7, 8, 9, 0, 0, 50, 51, 2, 0]
    assert batch.labels_BT[0].tolist() == [IGNORE] * 7 + [51, 2, IGNORE]
    assert batch.ids_BT[1].tolist() == [1, 7, 8, 10, 11, 12, 52, 2, 0, 0]
    assert batch.row_ids == ["a", "b", "c"]


def test_image_rows_point_at_their_pixels():
    batch = collate(ROWS, pixels, FRAME, 2)
    assert batch.visual_start == 4
    assert batch.image_B.tolist() == [0, -1, 1]
    assert batch.images_NHWC.dtype == torch.uint8
    assert batch.images_NHWC[:, 0, 0, 0].tolist() == [40, 30]


def test_an_image_that_two_samples_show_is_there_once():
    batch = collate([ROWS[0], ROWS[1], ROWS[0]], pixels, FRAME, 2)
    assert batch.image_B.tolist() == [0, -1, 0] and len(batch.images_NHWC) == 1


def test_a_batch_of_text_has_no_images():
    batch = collate([ROWS[1]], pixels, FRAME, 2)
    assert batch.images_NHWC is None and batch.visual_start is None and batch.image_B.tolist() == [-1]


def test_without_visual_tokens_all_is_text_and_no_image_is_read():
    def unread(index):
        raise AssertionError

    batch = collate(ROWS, unread, FRAME, 0)
    assert batch.images_NHWC is None and batch.image_B.tolist() == [-1, -1, -1]
    assert (batch.ids_BT[:, :6] == torch.tensor([1, 7, 8, 10, 11, 12])).all()


def test_a_prompt_batch_stops_where_the_response_begins():
    batch = prompt_batch(ROWS, pixels, FRAME, 2)
    assert batch.lengths_B.tolist() == [7, 7, 8]
    assert batch.ids_BT[2].tolist() == [1, 7, 8, 9, 0, 0, 53, 54]
    assert (batch.labels_BT == IGNORE).all()


@pytest.mark.parametrize("make", [collate, prompt_batch])
def test_to_moves_every_tensor(make):
    batch = make(ROWS, pixels, FRAME, 2).to("meta")
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.row_ids == ["a", "b", "c"] and batch.visual_start == 4


def test_packed_samples_lie_end_to_end():
    padded, packed = collate(ROWS, pixels, FRAME, 2), collate(ROWS, pixels, FRAME, 2, packing=True)
    assert packed.packed == (9, 8, 10) and padded.packed is None
    assert packed.ids_BT.shape == (1, 27)
    for ours, theirs in ((packed.ids_BT, padded.ids_BT), (packed.labels_BT, padded.labels_BT)):
        assert ours[0].tolist() == [token for row, n in zip(theirs, (9, 8, 10), strict=True) for token in row[:n]]
    assert packed.first_B.tolist() == [0, 9, 17] and padded.first_B.tolist() == [0, 10, 20]
    assert packed.cu_seqlens.tolist() == [0, 9, 17, 27] and padded.cu_seqlens is None
    assert packed.image_B.tolist() == padded.image_B.tolist()


def test_cached_features_stand_in_for_pixels():
    def features(index):
        return np.full((2, 5), index, dtype=np.float32)

    batch = collate(ROWS, features, FRAME, 2)
    assert batch.images_NHWC is None and batch.image_B.tolist() == [0, -1, 1]
    assert batch.features_NFW[:, 0, 0].tolist() == [40, 30] and batch.features_NFW.shape == (2, 2, 5)


def test_a_batch_can_be_pickled():
    for function in (collate, prompt_batch):
        assert pickle.loads(pickle.dumps(function))(ROWS, pixels, FRAME, 2).row_ids == ["a", "b", "c"]
    batch = collate(ROWS, pixels, FRAME, 2, packing=True)
    assert pickle.loads(pickle.dumps(batch)).packed == batch.packed
