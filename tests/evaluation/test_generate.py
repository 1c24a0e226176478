"""Decoding on a small random LaVIN, with and without images, in batches of prompts of different lengths."""

import dataclasses

import numpy as np
import pytest
import torch

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.data.collate import prompt_batch
from lavin_ds.data.layout import Frame
from lavin_ds.data.shards import Row
from lavin_ds.errors import UserError
from lavin_ds.evaluation.generate import generate, room, sample_top_p
from lavin_ds.evaluation.requests import Sampling
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process

VOCABULARY = 97
NEVER = VOCABULARY  # an EOS that no model can emit
FRAME = Frame(bos=1, prefix_image=(5, 6), prefix_text=(5, 7, 8))
ADAPTER = AdapterConfig(kind="mm", dim=4, temperature=1.0)
CONFIG = ModelConfig(
    llm=LlamaConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=VOCABULARY),
    vision=VisionConfig(width=16, layers=2, heads=2, patch_size=8, image_size=16, readout={"every": 1}),
    llm_adapter=ADAPTER,
    vision_adapter=ADAPTER,
    neck={"dim": 8},
    frozen_dtype="fp32",
)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Lavin:
    initialize_single_process()
    return randomised(Lavin(CONFIG))


def randomised(model: Lavin) -> Lavin:
    """Every parameter drawn anew, large enough that neighbouring logits differ clearly."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = "norm" in name or ".ln_" in name
        values = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if norm or parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data.copy_(norm + scale * values)
    return model


def rows(count: int = 7) -> list[Row]:
    """Prompts of 3 to 19 tokens, every other one with an image."""
    random = np.random.default_rng(1)
    made = []
    for number in range(count):
        prompt = random.integers(9, VOCABULARY, 3 + (5 * number) % 17).astype(np.int32)
        spans = np.zeros((0, 2), np.int32)
        image = number % 3 if number % 2 else -1
        made.append(
            Row(
                f"q{number}",
                prompt,
                spans,
                prompt,
                image,
                image >= 0,
                False,
                0,
                2,
                "natural science",
                "grade1",
            )
        )
    return made


def batch_of(some: list[Row]):
    return prompt_batch(some, lambda index: IMAGES[index], FRAME, CONFIG.visual_tokens)


def recomputed(model: Lavin, row: Row, count: int) -> list[int]:
    """Greedy decoding without a cache: the whole sequence again for every token."""
    ids = []
    with torch.no_grad():
        for _ in range(count):
            extended = np.concatenate([row.prompt_ids, np.array(ids, np.int32)])
            batch = batch_of([dataclasses.replace(row, prompt_ids=extended)])
            ids.append(int(model.llm.logits(model.hidden(batch)[0, -1]).argmax()))
    return ids


def test_cached_decoding_equals_recomputation(model):
    model.eval()
    expected = [recomputed(model, row, 9) for row in rows()]
    assert len({tuple(ids) for ids in expected}) == len(expected)  # the prompts do matter
    assert generate(model, batch_of(rows()), 9, NEVER) == expected


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_p=0.9)])
def test_a_response_does_not_depend_on_its_batch(model, sampling):
    together = generate(model, batch_of(rows()), 9, NEVER, sampling)
    alone = [generate(model, batch_of([row]), 9, NEVER, sampling)[0] for row in rows()]
    shuffled = generate(model, batch_of(rows()[::-1]), 9, NEVER, sampling)[::-1]
    assert together == alone == shuffled


def test_sampling_follows_seed_and_sample(model):
    def sampled(seed, row):
        return generate(model, batch_of([row]), 12, NEVER, Sampling(1.0, 0.95, seed))[0]

    first, second = rows()[:2]
    namesake = dataclasses.replace(first, id="another")
    assert sampled(0, first) == sampled(0, first)
    assert sampled(0, first) != sampled(1, first)
    assert sampled(0, first) != sampled(0, namesake)
    assert sampled(0, first) != sampled(0, second)


def test_longer_answers_continue_shorter_ones(model):
    sampling = Sampling(1.0, 0.95)
    short, long = (generate(model, batch_of(rows()), n, NEVER, sampling) for n in (5, 12))
    assert [ids[:5] for ids in long] == short


def test_a_response_ends_before_eos_and_decoding_with_the_last_one(model, monkeypatch):
    whole = generate(model, batch_of(rows()), 12, NEVER)
    eos = whole[0][4]
    expected = [ids[: ids.index(eos)] if eos in ids else ids for ids in whole]
    assert generate(model, batch_of(rows()), 12, eos) == expected

    calls = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *arguments: calls.append(1) or decode(*arguments))
    assert generate(model, batch_of(rows()[:1]), 12, eos) == expected[:1]
    assert len(calls) == len(expected[0])  # the prefill gave the first token, the last call gave EOS


def test_max_length_limits_every_sample_by_its_own_length(model):
    whole = generate(model, batch_of(rows()), 12, NEVER)
    lengths = batch_of(rows()).lengths_B.tolist()
    max_length = max(lengths) + 4
    limited = generate(model, batch_of(rows()), 12, NEVER, max_length=max_length)
    assert limited == [ids[: room(n, 12, max_length)] for ids, n in zip(whole, lengths, strict=True)]
    assert min(map(len, limited)) == 3 and max(map(len, limited)) == 12


def test_a_prompt_without_room_is_refused_by_name(model):
    longest = max(rows(), key=lambda row: len(row.prompt_ids))
    length = int(batch_of([longest]).lengths_B[0])
    assert len(generate(model, batch_of([longest]), 8, NEVER, max_length=length + 2)[0]) == 1
    with pytest.raises(UserError, match=f"Prompt {longest.id} takes {length + 1} positions .* no room"):
        generate(model, batch_of(rows()), 8, NEVER, max_length=length + 1)


def test_dropout_is_off_and_the_mode_comes_back(model):
    model.train()
    first = generate(model, batch_of(rows()), 9, NEVER)
    assert model.training and model.vision.training
    model.eval()
    assert generate(model, batch_of(rows()), 9, NEVER) == first
    assert not model.training


def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass():
    logits_BV = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    picked = {
        top_p: [int(sample_top_p(logits_BV, 1.0, top_p, torch.tensor([u]))[0]) for u in np.arange(0, 1, 0.001)]
        for top_p in (0.4, 0.75, 1.0)
    }
    assert set(picked[0.4]) == {1}
    assert set(picked[0.75]) == {1, 2}
    assert picked[0.75].count(1) == pytest.approx(1000 * 0.5 / 0.75, abs=2)
    assert [picked[1.0].count(i) for i in range(4)] == pytest.approx([100, 500, 250, 150], abs=2)


def test_a_low_temperature_is_greedy():
    logits_BV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    ids_B = sample_top_p(logits_BV, 1e-3, 0.75, torch.linspace(0, 0.999, 5))
    assert torch.equal(ids_B, logits_BV.argmax(-1))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_settings_are_checked(settings):
    with pytest.raises(UserError):
        Sampling(**settings)
