"""Base classes of the adapters, and a function that builds the adapters of a block.

Dimensions: N rows (tokens of all samples, flattened), D model width, R adapter rank, G groups,
M routing tokens, E = 2 paths.

Parameters are always fp32. Products run in the dtype of `z_ND`, routing in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.config import AdapterConfig
from lavin_ds.models.adapters import KINDS
from lavin_ds.models.trainable import Trainable


def grouped_to_dense(weight_DR: torch.Tensor, groups: int) -> torch.Tensor:
    """Expands a grouped projection [D, R/G] to its block-diagonal matrix [D, R].

    R is about 8, so the zeros cost less than the permuted copies that a batched product needs.
    """
    return torch.block_diag(*weight_DR.chunk(groups, dim=0))


class Adapter(Trainable):
    """Maps rows [N, D] to rows [N, D]. It declares its parameters by name and shape. A new adapter is the identity.

    Called as `adapter(z_ND, token_MD, owner_N)`: `token_MD` are the routing tokens, and `owner_N` is the index of each
    row's routing token. An adapter without a router ignores both. The result replaces `z_ND`; at point `beside_ffn` it
    is added to the FFN's output.
    """

    routed = False

    def __init__(self, width: int, config: AdapterConfig):
        super().__init__()
        self.config = config
        for name, shape in self.shapes(width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """Initialises down-projections as Xavier, the router as nn.Linear, all else to zero (reference.md, section 4).

        The up-projections are then zero, so the adapter is the identity.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("router"):
                bound = self.router_weight.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            elif name.startswith("down_weight"):
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def dropout(self, c_NR: torch.Tensor) -> torch.Tensor:
        return F.dropout(c_NR, self.config.dropout, self.training)


class RoutedAdapter(Adapter):
    """Adapters that weigh two paths: z + s * (w_0 f_0(z) + w_1 f_1(z)), w = softmax((W t + b) / tau) (paper 1, eq. 3).

    t is a routing token: the modality token in the LLM, the image's own class token in the ViT. A path is
    f_i(z) = U_i c_i + b_i; a subclass defines c_i and U_i.
    """

    routed = True
    PATHS = 2

    def shapes(self, width):
        return {"router_weight": (self.PATHS, width), "router_bias": (self.PATHS,)}

    def route(self, token_MD: torch.Tensor) -> torch.Tensor:
        """Routing weights [M, E] in fp32 (eq. 3)."""
        scores_ME = F.linear(token_MD.float(), self.router_weight, self.router_bias)
        return torch.softmax(scores_ME / self.config.temperature, dim=-1)

    def down(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c_0 and c_1, [N, R] each."""
        raise NotImplementedError

    def up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """U_0 and U_1, [D, R] each, in fp32."""
        raise NotImplementedError

    def forward(self, z_ND, token_MD, owner_N):
        dtype = z_ND.dtype
        w_NE = self.route(token_MD).to(dtype)[owner_N]
        c_0, c_1 = self.down(z_ND)
        # w_0 (U_0 c_0 + b_0) + w_1 (U_1 c_1 + b_1) is linear in [w_0 c_0, w_1 c_1, w_0, w_1]. So one product computes
        # both paths and their biases, and the [N, D] output of a single path is never in memory.
        mixed_NX = torch.cat([w_NE[:, :1] * c_0, w_NE[:, 1:] * c_1, w_NE], dim=1)
        up_DX = torch.cat([*self.up(), *self.biases()], dim=1)
        return torch.addmm(z_ND, mixed_NX, up_DX.to(dtype).t(), alpha=self.config.scale)

    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        """b_0 and b_1, [D, 1] each."""
        return self.up_bias_0[:, None], self.up_bias_1[:, None]


def build_adapters(width: int, config: AdapterConfig, projections: dict[str, int] | None = None) -> nn.ModuleDict:
    """The adapters of one block by attachment point; empty for kind "none".

    projections: output widths of the attention projections by name, before tensor-parallel splitting. Only kinds at
    point `projections` need them.
    """
    if config.kind == "none":
        return nn.ModuleDict()
    adapter = KINDS[config.kind].load()
    return nn.ModuleDict(
        {
            point: adapter(width, config, projections) if point == "projections" else adapter(width, config)
            for point in config.at
        }
    )
