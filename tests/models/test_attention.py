"""One attention call for all sequences that lie end to end gives what a loop over them gives.

A GPU's kernel does not run here. So a plain reference of what `varlen_attn` documents stands in for it and proves the
indices of the call, fake CUDA tensors prove that torch takes its arguments, and tests marked gpu wait for a device.
"""

import pytest
import torch
from model_helpers import VARIANTS, fill, make_batch, pack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lavin_ds.config import LlamaConfig
from lavin_ds.models import attention
from lavin_ds.models.cache import KVCache, Reads
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.llama import Llama

LENGTHS = (5, 1, 40, 17)
HEADS = pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["own keys", "grouped keys"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def varlen_reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa, seqused_k=None):
    """What torch's docstring and FlashAttention's checks say of `varlen_attn`, in plain products."""
    B = len(cu_seq_q) - 1
    for index in (cu_seq_q, cu_seq_k, *([] if seqused_k is None else [seqused_k])):
        assert index.dtype == torch.int32 and index.is_contiguous() and index.device == q.device
    assert len(cu_seq_k) == B + 1 and (cu_seq_q.diff() > 0).all() and (cu_seq_k.diff() > 0).all()
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(q) and cu_seq_k[-1] <= len(k) == len(v)
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and enable_gqa == (q.shape[1] != k.shape[1])
    assert window_size == (-1, 0)
    used = cu_seq_k.diff() if seqused_k is None else seqused_k
    assert len(used) == B and (used <= cu_seq_k.diff()).all()
    assert max_q == cu_seq_q.diff().max() and max_k == used.max()
    outs = []
    for b in range(B):
        q_THK, first = q[cu_seq_q[b] : cu_seq_q[b + 1]], cu_seq_k[b]
        groups = q.shape[1] // k.shape[1]
        k_SHK, v_SHK = (x[first : first + used[b]].repeat_interleave(groups, dim=1) for x in (k, v))
        scores_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK) / q.shape[-1] ** 0.5
        T, S = scores_HTS.shape[1:]
        hidden_TS = torch.arange(S) > torch.arange(T)[:, None] + S - T
        outs.append(torch.einsum("hts,shk->thk", scores_HTS.masked_fill(hidden_TS, -torch.inf).softmax(-1), v_SHK))
    return torch.cat(outs)


@pytest.fixture
def one_call(monkeypatch):
    """Switches from the loop to one call of the reference; counts the calls."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(len(args[3]) - 1)
        return varlen_reference(*args, **kwargs)

    def switch():
        monkeypatch.setattr(attention, "takes_one_call", lambda q_NHK: True)
        monkeypatch.setattr(attention, "varlen_attn", lambda: counted)
        return calls

    return switch


def test_packed_samples_in_one_call_learn_what_they_learn_in_a_loop(one_call):
    model = fill(Lavin(VARIANTS["mm"])).eval()
    batch = pack(make_batch([(11, 0), (17, -1), (9, 1), (6, -1)]))

    def learn():
        model.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.trainable().items()}

    want_loss, want = learn()
    calls = one_call()
    loss, gradients = learn()
    assert calls == [4] * model.config.llm.n_layers
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    for name in want:
        assert (gradients[name] - want[name]).norm() <= 1e-5 * want[name].norm().clamp(min=1e-3), name


# Prompts, then single tokens beside another prompt, then single tokens; slots 0 and 4 hold other things or nothing.
STEPS = [((1, 3), (7, 4)), ((1, 2, 3), (1, 9, 1)), ((1, 2, 3), (1, 1, 1)), ((2, 5), (3, 2)), ((3,), (1,))]


@torch.no_grad()
def test_prompts_and_single_tokens_from_a_cache_in_one_call_are_those_of_a_loop(one_call):
    config = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64)
    model = fill(Llama(config))

    def read():
        generator = torch.Generator().manual_seed(1)
        cache, hidden = KVCache(config, 6, 24, torch.float32, "cpu"), []
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)  # shows in the result if a place is read that nothing was written to
        for slots, lengths in STEPS:
            ids_1N = torch.randint(0, 64, (1, sum(lengths)), generator=generator)
            hidden.append(model(model.embed(ids_1N), reads=Reads(cache, slots, lengths))[0])
        return hidden

    want = read()
    calls = one_call()
    got = read()
    assert calls == [len(slots) for slots, _ in STEPS for _ in range(config.n_layers)]
    for got_ND, want_ND in zip(got, want, strict=True):
        assert not want_ND.isnan().any()
        torch.testing.assert_close(got_ND, want_ND, rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """Names of the attention operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "attn" in str(function) or "attention" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@HEADS
def test_torch_takes_the_arguments_of_both_calls_for_cuda_tensors(heads, monkeypatch):
    if attention.varlen_attn() is None:
        pytest.skip("this torch has no varlen_attn with seqused_k: the loop is used")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode(), Calls() as calls:
        q, k, v, cu_seqlens = packed(heads, "cuda")
        assert attention.packed_attention(q, k, v, LENGTHS, cu_seqlens).shape == q.shape
        with torch.no_grad():
            assert cached(heads, "cuda").shape == (11, 4, 64)
    assert calls.names == ["torch_attn._varlen_attn.default"] * 2


@pytest.mark.parametrize(
    "dtype, head_dim, capability, device",
    [
        (torch.float32, 64, (9, 0), "cuda"),
        (torch.bfloat16, 60, (9, 0), "cuda"),
        (torch.bfloat16, 264, (9, 0), "cuda"),
        (torch.float16, 64, (7, 5), "cuda"),
        (torch.bfloat16, 64, (9, 0), "cpu"),
    ],
)
def test_the_loop_takes_what_the_kernel_does_not(dtype, head_dim, capability, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        assert not attention.takes_one_call(torch.empty(3, 4, head_dim, dtype=dtype, device=device))


def packed(heads, device):
    """Queries, keys and values of samples of LENGTHS in bf16, and where they begin."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(sum(LENGTHS), count, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    return q, k, v, torch.tensor((0, *LENGTHS), device="cpu").cumsum(0).int().to(device)


def cached(heads, device):
    """What 1, 9 and 1 tokens attend to in slots that held 7, 0 and 300 tokens."""
    torch.manual_seed(0)
    shape = {"n_heads": heads[0], "n_kv_heads": heads[1], "ffn_dim": 8, "vocab_size": 64}
    config = LlamaConfig(dim=heads[0] * 64, n_layers=1, **shape)
    cache = KVCache(config, 6, 321, torch.bfloat16, device)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    cache.lengths = [0, 7, 0, 300, 0, 0]
    q_NHK, k_NGK, v_NGK = (
        torch.randn(11, count, 64, dtype=torch.bfloat16, device=device) for count in (heads[0], heads[1], heads[1])
    )
    return Reads(cache, (1, 2, 3), (1, 9, 1)).attend(0, q_NHK, k_NGK, v_NGK)


def in_a_loop(monkeypatch, work):
    with monkeypatch.context() as patch:
        patch.setattr(attention, "takes_one_call", lambda q_NHK: False)
        return work()


@pytest.mark.gpu
@needs_gpu
@HEADS
def test_on_a_gpu_packed_samples_in_one_call_are_those_of_a_loop(heads, monkeypatch):
    def learn():
        q, k, v, cu_seqlens = packed(heads, "cuda")
        with Calls() as calls:
            out = attention.packed_attention(q, k, v, LENGTHS, cu_seqlens)
        out.float().square().sum().backward()
        return calls.names, [out, q.grad, k.grad, v.grad]

    want_calls, want = in_a_loop(monkeypatch, learn)
    calls, got = learn()
    assert calls == ["torch_attn._varlen_attn.default"] and calls != want_calls
    for got_tensor, want_tensor in zip(got, want, strict=True):
        assert (got_tensor - want_tensor).float().norm() <= 0.01 * want_tensor.float().norm()


@pytest.mark.gpu
@needs_gpu
@HEADS
@torch.no_grad()
def test_on_a_gpu_prompts_and_single_tokens_in_one_call_are_those_of_a_loop(heads, monkeypatch):
    want = in_a_loop(monkeypatch, lambda: cached(heads, "cuda"))
    with Calls() as calls:
        got = cached(heads, "cuda")
    assert calls.names == ["torch_attn._varlen_attn.default"]
    assert (got - want).float().norm() <= 0.01 * want.float().norm()
