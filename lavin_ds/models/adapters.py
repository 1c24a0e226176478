"""Adapters: the only parts of LaVIN that learn, with the visual neck and the modality embedding.

Dimensions: N rows (tokens of all samples, flattened), D model width, R adapter rank, G groups,
M routing tokens, E = 2 paths.

Every adapter is called as `adapter(z_ND, token_MD, owner_N)`: `token_MD` are the rows that decide the
route and `owner_N` says which of them decides for each row. Adapters without a router ignore both.

Parameters are fp32 whatever the base is stored in; products run in the dtype of `z_ND`, routing in fp32.
Each adapter holds its parameters itself, not in nested Linear layers, so that ZeRO-3 gathers them all
when the adapter's forward begins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.config import AdapterConfig


def grouped_to_dense(weight_DR: torch.Tensor, groups: int) -> torch.Tensor:
    """Expands a grouped projection [D, R/G] into the block-diagonal [D, R] it stands for.

    R is about 8: the zeros cost less than the permuted copies a batched product needs.
    """
    return torch.block_diag(*weight_DR.chunk(groups, dim=0))


class RepAdapter(nn.Module):
    """RepAdapter: z + s * (U dropout(A z + a) + b), U grouped (paper 1, section 3.1 and its reference [23]).

    Used in every layer of the text-only baseline and of the first rows of paper 1's Table 2.
    """

    routed = False

    def __init__(self, width: int, config: AdapterConfig):
        super().__init__()
        self.config = config
        self.down_weight = nn.Parameter(torch.empty(config.dim, width))
        self.down_bias = nn.Parameter(torch.empty(config.dim))
        self.up_weight = nn.Parameter(torch.empty(width, config.dim // config.groups))
        self.up_bias = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        """The identity at the start: the up-projection is zero."""
        nn.init.xavier_uniform_(self.down_weight, generator=generator)
        for parameter in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, z_ND, token_MD=None, owner_N=None):
        dtype = z_ND.dtype
        c_NR = F.linear(z_ND, self.down_weight.to(dtype), self.down_bias.to(dtype))
        c_NR = F.dropout(c_NR, self.config.dropout, self.training)
        up_DR = grouped_to_dense(self.up_weight, self.config.groups).to(dtype)
        return z_ND + self.config.scale * F.linear(c_NR, up_DR, self.up_bias.to(dtype))


class MMAdapter(nn.Module):
    """Mixture-of-Modality Adapter (paper 1, eq. 1-3).

    z + s * (w_0 f_1(z) + w_1 f_2(z)),  f_i(z) = U_i dropout(A z + a) + b_i,  w = softmax((W t + b) / tau)

    The down-projection A is shared by both paths; U_i are grouped. t is a routing token: the modality token
    in the LLM, the image's own class token in the ViT.
    """

    routed = True
    PATHS = 2

    def __init__(self, width: int, config: AdapterConfig):
        super().__init__()
        self.config = config
        self.down_weight = nn.Parameter(torch.empty(config.dim, width))
        self.down_bias = nn.Parameter(torch.empty(config.dim))
        self.up_weight_0 = nn.Parameter(torch.empty(width, config.dim // config.groups))
        self.up_bias_0 = nn.Parameter(torch.empty(width))
        self.up_weight_1 = nn.Parameter(torch.empty(width, config.dim // config.groups))
        self.up_bias_1 = nn.Parameter(torch.empty(width))
        self.router_weight = nn.Parameter(torch.empty(self.PATHS, width))
        self.router_bias = nn.Parameter(torch.empty(self.PATHS))

    def reset(self, generator: torch.Generator) -> None:
        """The identity at the start: both up-projections are zero (reference.md, section 4)."""
        nn.init.xavier_uniform_(self.down_weight, generator=generator)
        for parameter in (self.down_bias, self.up_weight_0, self.up_bias_0, self.up_weight_1, self.up_bias_1):
            nn.init.zeros_(parameter)
        bound = self.router_weight.shape[1] ** -0.5
        nn.init.uniform_(self.router_weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.router_bias, -bound, bound, generator=generator)

    def route(self, token_MD: torch.Tensor) -> torch.Tensor:
        """Routing weights [M, E] in fp32 (eq. 3)."""
        scores_ME = F.linear(token_MD.float(), self.router_weight, self.router_bias)
        return torch.softmax(scores_ME / self.config.temperature, dim=-1)

    def forward(self, z_ND, token_MD, owner_N):
        dtype = z_ND.dtype
        c_NR = F.linear(z_ND, self.down_weight.to(dtype), self.down_bias.to(dtype))
        c_NR = F.dropout(c_NR, self.config.dropout, self.training)
        w_NE = self.route(token_MD).to(dtype)[owner_N]
        # One product for both paths and their biases: w_0 (U_0 c + b_0) + w_1 (U_1 c + b_1) is linear in
        # [w_0 c, w_1 c, w_0, w_1], and neither path's [N, D] output is ever held.
        mixed_NX = torch.cat([w_NE[:, :1] * c_NR, w_NE[:, 1:] * c_NR, w_NE], dim=1)
        up_DX = torch.cat(
            [
                grouped_to_dense(self.up_weight_0, self.config.groups),
                grouped_to_dense(self.up_weight_1, self.config.groups),
                self.up_bias_0[:, None],
                self.up_bias_1[:, None],
            ],
            dim=1,
        )
        return torch.addmm(z_ND, mixed_NX, up_DX.to(dtype).t(), alpha=self.config.scale)


class VisualNeck(nn.Module):
    """Visual tokens in the LLM's width: W_u silu(W_d x + b_d) + b_u (paper 1, eq. 6).

    The paper says SwiGLU; the published parameter count and code are those of a plain SiLU (reference.md,
    section 9).
    """

    def __init__(self, vision_width: int, hidden: int, width: int):
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(hidden, vision_width))
        self.down_bias = nn.Parameter(torch.empty(hidden))
        self.up_weight = nn.Parameter(torch.empty(width, hidden))
        self.up_bias = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        for weight in (self.down_weight, self.up_weight):
            nn.init.xavier_uniform_(weight, generator=generator)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., vision width] -> [..., D], computed in fp32: there are P rows an image."""
        hidden = F.silu(F.linear(x.float(), self.down_weight, self.down_bias))
        return F.linear(hidden, self.up_weight, self.up_bias)


class ModalityEmbedding(nn.Module):
    """E_m: row 0 marks a text-only sample, row 1 one with an image (paper 1, eq. 1)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, generator=generator)

    def forward(self) -> torch.Tensor:
        return self.weight


KINDS = {"mm": MMAdapter, "rep": RepAdapter}
TRAINABLE = (MMAdapter, RepAdapter, VisualNeck, ModalityEmbedding)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: those that an adapter, the neck or E_m owns, and no other."""
    return {
        f"{owner}.{name}" if owner else name: parameter
        for owner, module in model.named_modules()
        if isinstance(module, TRAINABLE)
        for name, parameter in module.named_parameters(recurse=False)
    }


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All the others, by name."""
    learning = trainable_parameters(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in learning}


def build_adapters(width: int, config: AdapterConfig) -> nn.ModuleDict:
    """The adapters of one block, by where they stand ("attention", "ffn"); empty for kind "none"."""
    if config.kind == "none":
        return nn.ModuleDict()
    return nn.ModuleDict({place: KINDS[config.kind](width, config) for place in config.before})
