import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from lavin_ds.config import AdapterConfig, ModelConfig
from lavin_ds.models.adapters import KINDS
from lavin_ds.models.adapters.base import build_adapters
from lavin_ds.models.adapters.bottleneck import BottleneckAdapter
from lavin_ds.models.adapters.loha import loha_matrix
from lavin_ds.models.adapters.lora import LoRA
from lavin_ds.models.adapters.mm import MMAdapter

WIDTH, SCALE, TEMPERATURE = 16, 0.7, 5.0
PROJECTIONS = {"q": 16, "k": 8, "v": 8}
ROUTED = {"mm", "bottleneck_weighted", "concat", "loha", "loha_mm"}


def grouped_convolution(c_NR, weight_DR, bias_D, groups):
    """What an up-projection stands for: a grouped convolution of width 1."""
    return F.conv1d(c_NR.t()[None], weight_DR[..., None], bias_D, groups=groups)[0].t()


def hadamard(a, name):
    """A LoHa's matrix, element by element."""
    x1, y1, x2, y2 = (a.get_parameter(f"{name}_{factor}") for factor in ("x1", "y1", "x2", "y2"))
    return torch.einsum("or,ir->oi", x1, y1) * torch.einsum("or,ir->oi", x2, y2)


def routing(a, token, owner):
    return torch.softmax((token @ a.router_weight.t() + a.router_bias) / TEMPERATURE, -1)[owner]


def routed(paths):
    """The equation of the routed kinds: paths(a, z) are f_0(z) and f_1(z)."""

    def equation(a, z, token, owner):
        w = routing(a, token, owner)
        f_0, f_1 = paths(a, z)
        return z + SCALE * (w[:, :1] * f_0 + w[:, 1:] * f_1)

    return equation


def mm_paths(a, z):
    c, G = z @ a.down_weight.t() + a.down_bias, a.config.groups
    return (grouped_convolution(c, getattr(a, f"up_weight_{i}"), getattr(a, f"up_bias_{i}"), G) for i in (0, 1))


def weighted_paths(a, z):
    for i in (0, 1):
        c = z @ getattr(a, f"down_weight_{i}").t() + getattr(a, f"down_bias_{i}")
        yield grouped_convolution(c, getattr(a, f"up_weight_{i}"), getattr(a, f"up_bias_{i}"), a.config.groups)


def loha_paths(a, z):
    return (z @ hadamard(a, f"weight_{i}").t() + getattr(a, f"up_bias_{i}") for i in (0, 1))


def loha_mm_paths(a, z):
    c, G = z @ hadamard(a, "down").t() + a.down_bias, a.config.groups
    return (grouped_convolution(c, hadamard(a, f"up_{i}"), getattr(a, f"up_bias_{i}"), G) for i in (0, 1))


def rep(a, z, token, owner):
    c = z @ a.down_weight.t() + a.down_bias
    return z + SCALE * grouped_convolution(c, a.up_weight, a.up_bias, a.config.groups)


def concat(a, z, token, owner):
    w = routing(a, token, owner)
    f_0, f_1 = mm_paths(a, z)  # each half as wide
    return z + SCALE * torch.cat([w[:, :1] * f_0, w[:, 1:] * f_1], dim=1)


def loha_silu(a, z, token, owner):
    c = F.silu(z @ hadamard(a, "down").t() + a.down_bias)
    return z + SCALE * grouped_convolution(c, hadamard(a, "up"), a.up_bias, a.config.groups)


EQUATIONS = {
    "mm": routed(mm_paths),
    "rep": rep,
    "bottleneck": rep,
    "bottleneck_weighted": routed(weighted_paths),
    "concat": concat,
    "loha": routed(loha_paths),
    "loha_mm": routed(loha_mm_paths),
    "loha_silu": loha_silu,
}


def settings(kind, **changes):
    at = KINDS[kind].points[:1]
    return AdapterConfig(kind=kind, at=at, **{"dim": 4, "scale": SCALE, "temperature": TEMPERATURE, **changes})


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", EQUATIONS)
def test_an_adapter_and_its_gradients_are_those_of_its_equation(fill, kind, groups):
    a = fill(KINDS[kind].load()(WIDTH, settings(kind, groups=groups))).eval()
    owner = torch.tensor([0, 1, 1, 0, 1, 0])
    z, token = torch.randn(6, WIDTH, requires_grad=True), torch.randn(2, WIDTH, requires_grad=True)
    inputs = [z, *a.parameters(), *([token] if kind in ROUTED else [])]
    got, want = a(z, token, owner), EQUATIONS[kind](a, z, token, owner)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_lora_adds_its_low_rank_products_to_query_and_value(fill):
    a = fill(LoRA(WIDTH, settings("lora"), PROJECTIONS)).eval()
    z = torch.randn(6, WIDTH)
    q, v = a(z).values()
    torch.testing.assert_close(q, SCALE * z @ (a.up_weight_q @ a.down_weight_q).t())
    torch.testing.assert_close(v, SCALE * z @ (a.up_weight_v @ a.down_weight_v).t())
    assert (q.shape, v.shape) == ((6, 16), (6, 8))


def build(kind, **changes):
    [adapter] = build_adapters(WIDTH, settings(kind, **changes), PROJECTIONS).values()
    return adapter


def difference(adapter, z):
    """What the adapter changes."""
    out = adapter(z) if isinstance(adapter, LoRA) else adapter(z, z[:1], torch.zeros(len(z), dtype=torch.long)) - z
    return torch.cat([part.flatten() for part in out.values()]) if isinstance(out, dict) else out


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_is_the_identity_learns_at_once_and_follows_from_its_seed(kind):
    first, second = build(kind), build(kind)
    for adapter in (first, second):
        adapter.eval().reset(torch.Generator().manual_seed(3))
    z = torch.randn(5, WIDTH)
    change = difference(first, z)
    assert not change.any()
    (change * torch.randn_like(change)).sum().backward()
    assert any(p.grad.any() for name, p in first.named_parameters() if "up" in name or "x2" in name)
    assert all(p.isfinite().all() for p in first.parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))


def test_a_lohas_matrix_starts_with_the_variance_of_xaviers():
    adapter = KINDS["loha_mm"].load()(512, settings("loha_mm", dim=16))
    adapter.reset(torch.Generator().manual_seed(0))
    variance = loha_matrix(adapter, "down").var().item()
    assert variance == pytest.approx(2 / (512 + 16), rel=0.3)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"loha"}))
def test_dropout_acts_in_training_alone(fill, kind):
    adapter = fill(build(kind, dropout=0.5))
    z = torch.randn(5, WIDTH)
    assert not torch.equal(difference(adapter.train(), z), difference(adapter, z))
    assert torch.equal(difference(adapter.eval(), z), difference(adapter, z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_fp32_and_answer_in_the_dtype_of_the_base(fill, kind, dtype):
    adapter = fill(build(kind))
    out = difference(adapter, torch.randn(5, WIDTH, dtype=dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_the_bottleneck_is_papers_equation_1_with_a_grouped_up_projection():
    a = BottleneckAdapter(4096, AdapterConfig(kind="bottleneck", dim=16, groups=2))
    assert sum(p.numel() for p in a.parameters()) == (16 * 4096 + 16) + (4096 * 16 // 2 + 4096)
    assert not a.routed and MMAdapter.routed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_adapter": {"kind": "lora"}}, "lora sits at projections, which these blocks do not have"),
        ({"llm_adapter": {"kind": "lora", "at": ["attention"]}}, "kind lora needs one or more of projections"),
        ({"llm_adapter": {"kind": "mm", "at": []}}, "kind mm needs one or more of attention, ffn"),
        ({"llm_adapter": {"kind": "mm", "at": ["beside_ffn"]}}, r"at is \[beside_ffn\]: kind mm needs"),
        ({"llm_adapter": {"kind": "rep", "at": ["ffn", "ffn"]}}, "each once"),
        ({"llm_adapter": {"kind": "mmm"}}, "there is no 'mmm', only none, mm, "),
        ({"llm_adapter": {"kind": "rep", "options": {"slots": 3}}}, "kind rep has no options, but slots is given"),
        ({"llm_adapter": {"kind": "rep", "dim": 9, "groups": 2}}, "dim 9 must be a multiple of groups 2"),
        (
            {"llm_adapter": {"kind": "concat", "dim": 32, "groups": 32}},
            "32 groups of kind concat cannot split width 32",
        ),
        ({"vision_adapter": {"kind": "rep", "dim": 12, "groups": 12}}, "cannot split width 32"),
    ],
)
def test_adapters_that_cannot_be_are_refused_in_words(config, changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(config.model_dump() | changes)
