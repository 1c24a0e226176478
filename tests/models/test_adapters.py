import pytest
import torch
import torch.nn.functional as F

from lavin_ds.config import AdapterConfig
from lavin_ds.models.adapters import MMAdapter, RepAdapter, build_adapters


def grouped_convolution(c_NR, weight_DR, bias_D, groups):
    """What an up-projection stands for: a grouped convolution of width 1."""
    return F.conv1d(c_NR.t()[None], weight_DR[..., None], bias_D, groups=groups)[0].t()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mm_adapter_is_its_equation(fill, groups):
    config = AdapterConfig(kind="mm", dim=8, groups=groups, scale=0.7, temperature=5.0)
    a = fill(MMAdapter(16, config)).eval()
    z, token, owner = torch.randn(6, 16), torch.randn(2, 16), torch.tensor([0, 1, 1, 0, 1, 0])
    c = z @ a.down_weight.t() + a.down_bias
    w = torch.softmax((token @ a.router_weight.t() + a.router_bias) / 5.0, -1)[owner]
    paths = [
        grouped_convolution(c, weight, bias, groups)
        for weight, bias in ((a.up_weight_0, a.up_bias_0), (a.up_weight_1, a.up_bias_1))
    ]
    want = z + 0.7 * (w[:, :1] * paths[0] + w[:, 1:] * paths[1])
    torch.testing.assert_close(a(z, token, owner), want)


def test_rep_adapter_is_its_equation(fill):
    a = fill(RepAdapter(16, AdapterConfig(kind="rep", dim=8, scale=0.7))).eval()
    z = torch.randn(6, 16)
    c = z @ a.down_weight.t() + a.down_bias
    torch.testing.assert_close(a(z), z + 0.7 * grouped_convolution(c, a.up_weight, a.up_bias, 2))


@pytest.mark.parametrize("kind", ["mm", "rep"])
def test_a_new_adapter_is_the_identity_and_the_seed_decides_the_rest(kind):
    config = AdapterConfig(kind=kind)
    first, second = (build_adapters(16, config)["attention"] for _ in range(2))
    for adapter in (first, second):
        adapter.reset(torch.Generator().manual_seed(3))
    z = torch.randn(5, 16)
    assert torch.equal(first(z, z[:1], torch.zeros(5, dtype=torch.long)), z)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name])


def test_dropout_acts_in_training_alone(fill):
    adapter = fill(MMAdapter(16, AdapterConfig(kind="mm", dropout=0.5)))
    z, owner = torch.randn(5, 16), torch.zeros(5, dtype=torch.long)
    assert not torch.equal(adapter.train()(z, z[:1], owner), adapter(z, z[:1], owner))
    assert torch.equal(adapter.eval()(z, z[:1], owner), adapter(z, z[:1], owner))


@pytest.mark.parametrize("kind, dtype", [("mm", torch.bfloat16), ("rep", torch.float16)])
def test_adapters_stay_fp32_and_answer_in_the_dtype_of_the_base(fill, kind, dtype):
    adapter = fill(build_adapters(16, AdapterConfig(kind=kind))["attention"])
    z = torch.randn(5, 16, dtype=dtype)
    out = adapter(z, z[:1], torch.zeros(5, dtype=torch.long))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
