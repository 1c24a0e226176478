"""From random texts to the loss: the layout of a sequence, whatever the prompts, modalities and limit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import CONFIG, fill

import lavin_ds
from lavin_ds.config import DataConfig, RunConfig
from lavin_ds.data.collate import collate
from lavin_ds.data.layout import IGNORE, Frame
from lavin_ds.data.prompts import Instruction
from lavin_ds.data.samples import make_samples
from lavin_ds.data.schema import PromptSettings
from lavin_ds.data.shards import Row
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.models.lavin import Lavin

TOKENIZER = Tokenizer(Path(lavin_ds.__file__).parent / "assets" / "tiny" / "llama" / "tokenizer.model")
FRAME = Frame.of(TOKENIZER)
MODEL = CONFIG.model_copy(update={"llm": CONFIG.llm.model_copy(update={"vocab_size": TOKENIZER.vocab_size})})

texts = st.text(alphabet="aB z\n.:é日", min_size=1, max_size=40)
turns = st.builds(Instruction, texts, texts, texts.filter(str.strip))
conversations = st.tuples(st.lists(turns, min_size=1, max_size=3), st.integers(-1, 2))  # turns, image


@pytest.fixture(scope="module")
def model() -> Lavin:
    return fill(Lavin(MODEL)).eval()


def pixels(image: int) -> np.ndarray:
    size = MODEL.vision.image_size
    return np.random.default_rng(image).integers(0, 256, (size, size, 3), dtype=np.uint8)


def row_of(number: int, sample, image: int) -> Row:
    spans = np.array(sample.label_spans, dtype=np.int32).reshape(-1, 2)
    ids = np.array(sample.token_ids, dtype=np.int32)
    return Row(str(number), ids, spans, ids, image, image >= 0, False, 0, 2, "", "")


def loss_of(model: Lavin, batch) -> tuple[float, int]:
    total, count = model(batch)
    return total.item(), count


@settings(max_examples=25, deadline=None)
@given(
    asked=st.lists(conversations, min_size=1, max_size=4),
    max_length=st.integers(30, 120),
    policy=st.sampled_from(["shorten", "drop"]),
    data=st.data(),
)
@torch.no_grad()
def test_labels_are_predicted_where_they_stand_and_nothing_else_touches_a_samples_loss(
    model, asked, max_length, policy, data
):
    config = RunConfig(name="x", model=MODEL, data=DataConfig(max_length=max_length, overlength=policy))
    has_image = [image >= 0 for _, image in asked]
    samples = make_samples([turns for turns, _ in asked], has_image, TOKENIZER, FRAME, PromptSettings.of(config))

    rows, losses, counts = [], [], []
    for number, ((turns, image), sample) in enumerate(zip(asked, samples, strict=True)):
        wanted = TOKENIZER.encode_continuation_batch([turn.response for turn in turns])
        learnt = [list(sample.token_ids[start:end]) for start, end in zip(*[iter(sample.label_spans)] * 2, strict=True)]
        # Whole responses, each with its EOS, the first ones first; and where one is missing the outcome says so.
        assert learnt == [[*response, TOKENIZER.eos_id] for response in wanted[: len(learnt)]]
        assert (len(learnt) == len(wanted) and sample.outcome == "whole") or sample.outcome != "whole"
        assert learnt or sample.reason
        if not sample.token_ids:
            continue
        row = row_of(number, sample, image)
        alone = collate([row], pixels, FRAME, MODEL.visual_tokens)
        assert 1 + len(alone.ids_BT[0]) <= max_length  # the modality token too
        log_p = model.llm.logits(model.hidden(alone))[0].log_softmax(-1)
        places = (alone.labels_BT[0] != IGNORE).nonzero().flatten().tolist()
        assert [alone.labels_BT[0, place].item() for place in places] == [t for response in learnt for t in response]
        rows.append(row)
        losses.append(-sum(log_p[place - 1, alone.ids_BT[0, place]].item() for place in places))
        counts.append(len(places))
        assert loss_of(model, alone) == (pytest.approx(losses[-1], rel=1e-5, abs=1e-4), counts[-1])
    if not rows:
        return

    want = (pytest.approx(sum(losses), rel=1e-5, abs=1e-4), sum(counts))
    batch = collate(data.draw(st.permutations(rows)), pixels, FRAME, MODEL.visual_tokens)
    assert loss_of(model, batch) == want
    padding = (0, data.draw(st.integers(1, 9)))
    ids, labels = F.pad(batch.ids_BT, padding), F.pad(batch.labels_BT, padding, value=IGNORE)
    assert loss_of(model, replace(batch, ids_BT=ids, labels_BT=labels)) == want
    assert loss_of(model, collate(rows, pixels, FRAME, MODEL.visual_tokens, packing=True)) == want
