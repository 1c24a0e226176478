"""Operators that keep less, against the plain formulas under autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.models.recompute_ops import QuickGELU, rms_norm, swiglu

EPS = 1e-5


def plain_norm(x, weight):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


PAIRS = {
    "rms_norm": (lambda x, y: rms_norm(x, y[0, 0], EPS), lambda x, y: plain_norm(x, y[0, 0])),
    "swiglu": (swiglu, lambda x, y: F.silu(x) * y),
    "quick_gelu": (lambda x, y: QuickGELU()(x * y), lambda x, y: (x * y) * torch.sigmoid(1.702 * (x * y))),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_are_the_plain_formulas_to_the_bit_and_gradients_to_rounding(name, dtype, tolerance):
    torch.manual_seed(0)
    x, y = (torch.randn(3, 5, 16, dtype=dtype).requires_grad_() for _ in range(2))
    weighting = torch.randn(3, 5, 16, dtype=dtype)
    got, want = (function(x, y) for function in PAIRS[name])
    assert torch.equal(got, want)
    for one, other in zip(*(torch.autograd.grad(z, (x, y), weighting) for z in (got, want)), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
        assert one.dtype == dtype


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    x, y = (torch.randn(2, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    if name == "rms_norm":  # which computes in fp32
        assert torch.autograd.gradcheck(PAIRS[name][0], (x, y), eps=1e-2, atol=1e-2, rtol=1e-2)
    else:
        assert torch.autograd.gradcheck(PAIRS[name][0], (x, y))


def test_a_frozen_weight_gets_no_gradient_and_rows_may_be_missing():
    weight = nn.Parameter(torch.ones(4), requires_grad=False)
    x = torch.empty(0, 4, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is None and x.grad.shape == (0, 4)


def test_less_is_kept():
    def kept(function, x, y):
        seen = {}

        def pack(tensor):
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(x, y)
        return sum(seen.values())

    x, y = (torch.randn(64, 64, 64, dtype=torch.bfloat16) for _ in range(2))
    for name, limit in (("rms_norm", 0.6), ("swiglu", 0.7), ("quick_gelu", 0.7)):
        ours, plain = PAIRS[name]
        x.requires_grad_(), y.requires_grad_(name == "swiglu")
        assert kept(ours, x, y) < limit * kept(plain, x, y), name
