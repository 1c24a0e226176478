"""RMSNorm, SwiGLU and QuickGELU that keep less for the backward pass than autograd would.

Each keeps its inputs and recomputes the intermediate tensors in the backward pass. The recomputation is cheap, because
these operators are memory-bound. In a bf16 LLaMA layer this saves the fp32 copies of both norms' inputs and the output
of silu: 27% of the layer's activations (docs/speed.md). The forward pass gives the same bits as the plain formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

QUICK = 1.702  # the constant of QuickGELU


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) in fp32, then times weight in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)  # x in its own dtype, not its fp32 copy
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
    """silu(gate) * up; both tensors have the same shape."""
    return _SwiGLU.apply(gate, up)


class QuickGELU(torch.nn.Module):
    """The activation of OpenAI's CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuickGELU.apply(x)
