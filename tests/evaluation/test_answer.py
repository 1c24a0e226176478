"""Answers of a small LLaMA whose other implementation is transformers', with and without images."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.data.collate import prompt_batch
from lavin_ds.data.layout import Frame
from lavin_ds.errors import UserError
from lavin_ds.evaluation.answer import answer
from lavin_ds.evaluation.requests import Generation, Request, RequestSet
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.weights.llama import load_llama

VOCABULARY = 256  # the pipeline's tokenizer has as many
VISION = VisionConfig(width=16, layers=2, heads=2, patch_size=8, image_size=16, readout={"every": 1})
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            rms_norm_eps=1e-6,
            initializer_range=0.5,  # so that tokens differ clearly in probability
        )
    ).eval()
    model.folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(model.folder)
    return model


def lavin_around(theirs, vision: VisionConfig | None) -> Lavin:
    """A model with that LLaMA, without adapters in it; what it sees, transformers can be shown."""
    initialize_single_process()
    llm = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=VOCABULARY)
    adapter = AdapterConfig(kind="mm", dim=4) if vision else AdapterConfig()
    config = ModelConfig(llm=llm, vision=vision, vision_adapter=adapter, neck={"dim": 8}, frozen_dtype="fp32")
    model = Lavin(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * max(parameter.shape) ** -0.5)
    load_llama(model.llm, theirs.folder)
    return model.eval()


def requests(count: int = 9) -> list[Request]:
    """Prompts of 3 to 19 tokens, every other one with an image, each with 1 to 4 continuations of 1 to 7 tokens."""
    random = np.random.default_rng(1)
    drawn = lambda n: random.integers(9, VOCABULARY, n).astype(np.int32)  # noqa: E731
    return [
        Request(
            id=f"q{number}",
            prompt_ids=drawn(3 + (5 * number) % 17),
            image=number % 3 if number % 2 else -1,
            continuations=[drawn(1 + (3 * k + number) % 7) for k in range(1 + number % 4)],
        )
        for number in range(count)
    ]


def request_set(pipeline, some: list[Request], max_length: int = 64) -> RequestSet:
    tokenizer = pipeline.tokenizer
    return RequestSet(some, tokenizer, Frame.of(tokenizer), max_length, lambda index: IMAGES[index])


@torch.no_grad()
def log_likelihood_by_transformers(theirs, model: Lavin, asked: RequestSet, request: Request, continuation) -> float:
    """The whole sequence through transformers' LLaMA; the embeddings of an image's tokens are the neck's."""
    whole = dataclasses.replace(request, prompt_ids=np.concatenate([request.prompt_ids, continuation]))
    batch = prompt_batch([whole], asked.image, asked.frame, model.config.visual_tokens)
    embeddings_BTD, _ = model.embed(batch)
    log_probability_TV = theirs(inputs_embeds=embeddings_BTD).logits[0].double().log_softmax(-1)
    n = len(continuation)
    return float(log_probability_TV[-n - 1 : -1].gather(1, torch.tensor(continuation[:, None]).long()).sum())


@pytest.mark.parametrize("vision", [None, VISION], ids=["text", "images"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_log_likelihoods_are_those_of_transformers(theirs, pipeline, vision, batch_size):
    model = lavin_around(theirs, vision)
    asked = request_set(pipeline, requests())
    answers = answer(model, asked, batch_size)
    assert list(answers) == [request.id for request in asked.requests]
    for request in asked.requests:
        expected = [log_likelihood_by_transformers(theirs, model, asked, request, ids) for ids in request.continuations]
        assert answers[request.id].log_likelihoods == pytest.approx(expected, rel=1e-5)
        assert (answers[request.id].text, answers[request.id].ending) == ("", "done")


def test_what_an_image_shows_counts(theirs, pipeline):
    model = lavin_around(theirs, VISION)
    asked = request_set(pipeline, requests())
    seen = answer(model, asked)
    turned = answer(model, dataclasses.replace(asked, image=lambda index: 255 - IMAGES[index]))
    differ = {id for id in seen if seen[id].log_likelihoods != pytest.approx(turned[id].log_likelihoods, rel=1e-4)}
    assert differ == {request.id for request in asked.requests if request.image >= 0}


def test_requests_of_several_ways_and_settings_mix(theirs, pipeline):
    model = lavin_around(theirs, VISION)
    scored = requests()
    short = [Request(f"short-{r.id}", r.prompt_ids, r.image, Generation(2)) for r in scored]
    long = [Request(f"long-{r.id}", r.prompt_ids, r.image, Generation(5)) for r in scored]
    alone = [answer(model, request_set(pipeline, some)) for some in (scored, short, long)]
    mixed = [request for three in zip(scored, short, long, strict=True) for request in three]
    together = answer(model, request_set(pipeline, mixed), batch_size=5)
    assert list(together) == [request.id for request in mixed]
    for id, one in {id: one for answers in alone for id, one in answers.items()}.items():
        assert together[id].text == one.text and together[id].ending == one.ending
        assert together[id].log_likelihoods == pytest.approx(one.log_likelihoods, rel=1e-5)
    assert any(alone[1][f"short-{r.id}"].text != alone[2][f"long-{r.id}"].text for r in scored)


def test_a_continuation_without_room_is_reported(theirs, pipeline):
    model = lavin_around(theirs, None)
    prompt = requests()[0].prompt_ids
    asked = request_set(pipeline, [Request("q", prompt, continuations=[[9], [9, 10, 11]])])
    positions = 1 + len(asked.frame.head(False, 0)) + len(prompt) + 3  # the modality token counts
    fits = answer(model, dataclasses.replace(asked, max_length=positions))["q"]
    assert (fits.ending, len(fits.log_likelihoods)) == ("done", 2)
    over = answer(model, dataclasses.replace(asked, max_length=positions - 1))["q"]
    assert (over.ending, over.log_likelihoods) == ("no_room", ())


def test_a_request_is_of_one_way_and_of_one_id(pipeline):
    with pytest.raises(ValueError, match="and not both"):
        Request("q", [9], generation=Generation(), continuations=[[9]])
    with pytest.raises(ValueError, match="and not both"):
        Request("q", [9])
    with pytest.raises(ValueError, match="empty continuation"):
        Request("q", [9], continuations=[[]])
    with pytest.raises(UserError, match="Two questions have the id q"):
        request_set(pipeline, [Request("q", [9], generation=Generation())] * 2)
