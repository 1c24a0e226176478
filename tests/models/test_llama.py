import pytest
import torch
import transformers

from lavin_ds.config import LlamaConfig, RopeScaling
from lavin_ds.models.cache import KVCache, Reads
from lavin_ds.models.linear import STORAGES
from lavin_ds.models.llama import Llama
from lavin_ds.models.meta import OnMeta
from lavin_ds.weights.llama import llama_shapes, load_llama

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def pair(folder, kv_heads, tied=False, rope_theta=10000.0, scaling=None, kind="Llama", **their_own):
    """Hugging Face's model with random weights, and ours loaded from what it saved."""
    torch.manual_seed(0)
    rope = {"rope_parameters": {"rope_theta": rope_theta, **(scaling or {"rope_type": "default"})}}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            **SHAPE,
            **rope,
            num_key_value_heads=kv_heads,
            vocab_size=100,
            rms_norm_eps=1e-6,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            **their_own,
        )
    ).eval()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    numbers = {k: v for k, v in (scaling or {}).items() if k != "rope_type"}
    config = LlamaConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=kv_heads,
        ffn_dim=96,
        vocab_size=100,
        rope_theta=rope_theta,
        rope_scaling=RopeScaling(**numbers) if numbers else None,
    )
    ours = Llama(config).eval()
    load_llama(ours, folder)
    return theirs, ours


@pytest.mark.parametrize(
    "kv_heads, tied, rope_theta, scaling",
    [(4, False, 1e4, None), (2, False, 5e5, None), (1, True, 1e4, None), (2, True, 5e5, LLAMA_31)],
    ids=["multi-head", "grouped", "one-kv-head-tied", "llama-3.1"],
)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, kv_heads, tied, rope_theta, scaling):
    theirs, ours = pair(tmp_path, kv_heads, tied, rope_theta, scaling)
    ids = torch.randint(0, 100, (3, 90), generator=torch.Generator().manual_seed(1))
    want = theirs(ids).logits
    got = ours.logits(ours(ours.embed(ids)))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_a_mistral_without_a_sliding_window_is_a_llama(tmp_path):
    theirs, ours = pair(tmp_path, 2, kind="Mistral", sliding_window=None)
    ids = torch.randint(0, 100, (3, 90), generator=torch.Generator().manual_seed(1))
    want = theirs(ids).logits
    got = ours.logits(ours(ours.embed(ids)))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_cached_decoding_of_prompts_of_unequal_length_gives_the_uncached_logits(tmp_path):
    _, ours = pair(tmp_path, kv_heads=2)
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = ours.logits(ours(ours.embed(ids)))
    lengths = torch.tensor([4, 7])
    cache = KVCache(ours.config, 2, 12, torch.float32, "cpu")
    prompts_1N = torch.cat([ids[0, :4], ids[1, :7]])[None]
    ours(ours.embed(prompts_1N), reads=Reads(cache, (0, 1), (4, 7)))
    for step in range(5):
        at = lengths + step
        h = ours(ours.embed(ids[torch.arange(2), at][None]), reads=Reads(cache, (0, 1), (1, 1)))
        torch.testing.assert_close(ours.logits(h[0]), whole[torch.arange(2), at], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_trained_llama_writes_its_published_story_cached_and_uncached(shared):
    import sentencepiece

    folder = shared / "data" / "stories260k"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    published = (folder / "greedy.txt").read_text().rstrip("\n")
    model = Llama(LlamaConfig(dim=64, n_layers=5, n_heads=8, ffn_dim=172, vocab_size=512, norm_eps=1e-5))
    load_llama(model, folder)
    count = 256

    cached, cache = [1], KVCache(model.config, 1, count, torch.float32, "cpu")
    for _ in range(count):
        h = model(model.embed(torch.tensor([[cached[-1]]])), reads=Reads(cache, (0,), (1,)))
        cached.append(int(model.logits(h[0, -1]).argmax()))
    assert tokenizer.decode(cached[1:]).startswith(published)

    uncached = model.logits(model(model.embed(torch.tensor([cached[:-1]]))))[0].argmax(-1)
    assert uncached.tolist() == cached[1:]


def test_the_loss_of_many_rows_is_that_of_their_logits_at_once(fill, monkeypatch):
    model = fill(Llama(LlamaConfig(dim=32, n_layers=1, n_heads=2, ffn_dim=32, vocab_size=64)))
    monkeypatch.setattr("lavin_ds.models.llama.LOSS_CHUNK", 7)
    h = torch.randn(20, 32, requires_grad=True)
    targets = torch.randint(0, 64, (20,))
    loss = model.token_loss(h, targets)
    (gradient,) = torch.autograd.grad(loss, h)
    want = torch.nn.functional.cross_entropy(model.logits(h), targets, reduction="sum")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, h)[0])


def test_a_loss_scale_is_not_rounded_to_the_base_dtype(fill):
    model = fill(Llama(LlamaConfig(dim=32, n_layers=1, n_heads=2, ffn_dim=32, vocab_size=64))).bfloat16()
    h = torch.randn(20, 32, dtype=torch.bfloat16, requires_grad=True)
    loss = model.token_loss(h, torch.randint(0, 64, (20,)))
    factor = 1 / 300  # bf16 has 0.003326 and 0.003342 beside it
    (whole,), (scaled,) = (torch.autograd.grad(x, h, retain_graph=True) for x in (loss, loss * factor))
    assert (scaled.double() / whole.double()).mean() / factor == pytest.approx(1, abs=2e-4)


LLAMA_1 = {"vocab_size": 32000}
LLAMA_2 = {"vocab_size": 32000, "norm_eps": 1e-5}
LLAMA_3 = {"vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0, "n_kv_heads": 8}
# dim, n_layers, n_heads, ffn_dim, the rest, parameters as Hugging Face's model cards count them
SHAPES = {
    "LLaMA-7B": (4096, 32, 32, 11008, LLAMA_1, 6_738_415_616),
    "LLaMA-13B": (5120, 40, 40, 13824, LLAMA_1, 13_015_864_320),
    "LLaMA-33B": (6656, 60, 52, 17920, LLAMA_1, 32_528_943_616),
    "LLaMA-65B": (8192, 80, 64, 22016, LLAMA_1, 65_285_660_672),
    "LLaMA-2-70B": (8192, 80, 64, 28672, LLAMA_2 | {"n_kv_heads": 8}, 68_976_648_192),
    "LLaMA-3-8B": (4096, 32, 32, 14336, LLAMA_3, 8_030_261_248),
    "LLaMA-3-70B": (8192, 80, 64, 28672, LLAMA_3, 70_553_706_496),
    "LLaMA-3.1-8B": (4096, 32, 32, 14336, LLAMA_3 | {"rope_scaling": RopeScaling()}, 8_030_261_248),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_published_shapes_have_as_many_parameters_as_published(name):
    dim, n_layers, n_heads, ffn_dim, rest, published = SHAPES[name]
    config = LlamaConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, ffn_dim=ffn_dim, **rest)
    with OnMeta():
        model = Llama(config, storage=STORAGES["bf16"])
    assert sum(p.numel() for p in model.parameters()) == published
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == llama_shapes(config)
