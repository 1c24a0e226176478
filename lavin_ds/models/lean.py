"""RMSNorm, SwiGLU and QuickGELU that keep less for the backward pass than autograd would.

Their arithmetic is memory-bound, so what can be had again from one kept tensor is not kept beside it. Of a LLaMA layer
in bf16 that is the fp32 copy of both norms' inputs and silu's output: 27% of its activations (docs/speed.md).
Forward gives the same numbers as the plain formulas, to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

QUICK = 1.702  # QuickGELU's constant


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) in fp32, then times weight in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)  # x as it came, not its fp32 copy
        return (x32 * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        normed32 = x.float() * scale
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normed32.to(x.dtype)).flatten(0, -2).sum(0)
        gradient32 = (gradient * weight).float()
        along = (gradient32 * normed32).mean(-1, keepdim=True)
        return ((gradient32 - normed32 * along) * scale).to(x.dtype), weight_gradient, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


class _QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(QUICK * x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(QUICK * x)
        return gradient * (gate + x * QUICK * gate * (1 - gate))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension of `x` [..., D] with `weight` [D]."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of two tensors of one shape."""
    return _SwiGLU.apply(gate, up)


class QuickGELU(torch.nn.Module):
    """The activation of OpenAI's CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuickGELU.apply(x)
