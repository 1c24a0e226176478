"""LoHa in place of projections: three rows of paper 3's Table 3.

Dimensions: N rows (tokens of all samples, flattened), D model width, R adapter rank, G groups,
Q = R * R, O output and I input features of a matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.models.adapters.base import Adapter, RoutedAdapter, grouped_to_dense

# LoHa (FedPara): a matrix is the Hadamard product of two low-rank matrices, W = (X_1 Y_1^T) * (X_2 Y_2^T) (paper 3,
# below eq. 6). The paper gives no rank; here it is the adapter's dim. For W [O, I] the factors are x1, x2 [O, R] and
# y1, y2 [I, R]. These are 2 R (O + I) numbers: more than W has if O or I is the adapter's rank.
FACTORS = ("x1", "y1", "x2", "y2")


def loha_shapes(name: str, outputs: int, inputs: int, rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of the four factors of matrix `name`."""
    return {f"{name}_{factor}": (outputs if factor[0] == "x" else inputs, rank) for factor in FACTORS}


def reset_loha(adapter: Adapter, name: str, generator: torch.Generator, zero: bool) -> None:
    """Initialises W with Xavier's variance and the same deviation in every factor; or, if `zero`, x2 and so W to 0."""
    factors = {factor: adapter.get_parameter(f"{name}_{factor}") for factor in FACTORS}
    (outputs, rank), inputs = factors["x1"].shape, len(factors["y1"])
    # W_ij is a product of two sums of `rank` products, so its variance is rank^2 deviation^8.
    deviation = (2 / (outputs + inputs) / rank**2) ** (1 / 8)
    for factor in factors.values():
        nn.init.normal_(factor, std=deviation, generator=generator)
    if zero:
        nn.init.zeros_(factors["x2"])


def loha_matrix(adapter: Adapter, name: str) -> torch.Tensor:
    """The matrix W [O, I]."""
    x1, y1, x2, y2 = (adapter.get_parameter(f"{name}_{factor}") for factor in FACTORS)
    return (x1 @ y1.t()) * (x2 @ y2.t())


def loha_as_low_rank(adapter: Adapter, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """X [O, Q] and Y [I, Q] with W = X Y^T. Column (r, s) of X is x1[:, r] * x2[:, s]; Y is built in the same way.

    W [D, D] is never in memory: at D = 4096 it would take 64 MiB, and its two factors as much again for backward.
    """
    x1, y1, x2, y2 = (adapter.get_parameter(f"{name}_{factor}") for factor in FACTORS)
    return (x1[:, :, None] * x2[:, None]).flatten(1), (y1[:, :, None] * y2[:, None]).flatten(1)


class LohaAdapter(RoutedAdapter):
    """LoHa without a bottleneck: f_i(z) = W_i z + b_i, each W_i [D, D] a LoHa (paper 3, eq. 6; Table 3, row 7).

    "We didn't use any down scaling convolution. We just used two LoHa conv_1d [with] dynamic weight factors same as
    in LaVIN." Our reading: z is added, which eq. 6 leaves out, because otherwise a new adapter would set attention's
    input to zero. There is no dropout, because LaVIN's sits between down and up.
    """

    def shapes(self, width):
        R = self.config.dim
        paths = {}
        for i in range(self.PATHS):
            paths |= loha_shapes(f"weight_{i}", width, width, R) | {f"up_bias_{i}": (width,)}
        return paths | super().shapes(width)

    def reset(self, generator):
        super().reset(generator)
        for i in range(self.PATHS):
            reset_loha(self, f"weight_{i}", generator, zero=True)

    def down(self, z_ND):
        return tuple(z_ND @ loha_as_low_rank(self, f"weight_{i}")[1].to(z_ND.dtype) for i in range(self.PATHS))

    def up(self):
        return tuple(loha_as_low_rank(self, f"weight_{i}")[0] for i in range(self.PATHS))


class LohaMMAdapter(RoutedAdapter):
    """`mm` with a LoHa for each of A, U_0 and U_1 (paper 3, Table 3, row 8).

    "We simply replaced conv_1d in LaVIN with LoHa conv_1d."
    """

    def shapes(self, width):
        R, G = self.config.dim, self.config.groups
        shapes = loha_shapes("down", R, width, R) | {"down_bias": (R,)}
        for i in range(self.PATHS):
            shapes |= loha_shapes(f"up_{i}", width, R // G, R) | {f"up_bias_{i}": (width,)}
        return shapes | super().shapes(width)

    def reset(self, generator):
        super().reset(generator)
        for name in ("down", "up_0", "up_1"):
            reset_loha(self, name, generator, zero=name != "down")

    def down(self, z_ND):
        dtype = z_ND.dtype
        c_NR = self.dropout(F.linear(z_ND, loha_matrix(self, "down").to(dtype), self.down_bias.to(dtype)))
        return c_NR, c_NR

    def up(self):
        return tuple(grouped_to_dense(loha_matrix(self, f"up_{i}"), self.config.groups) for i in range(self.PATHS))


class LohaSiluAdapter(Adapter):
    """LoHa with a SiLU and without routing: z + s * phi_1(silu(phi_2(z))) (paper 3, eq. 7; Table 3, row 9).

    Our reading: phi_2 is D -> R and phi_1 is grouped R -> D, each with a bias, like LaVIN's convolutions. Dropout comes
    before phi_1, as in LaVIN.
    """

    def shapes(self, width):
        R, G = self.config.dim, self.config.groups
        down, up = loha_shapes("down", R, width, R), loha_shapes("up", width, R // G, R)
        return down | {"down_bias": (R,)} | up | {"up_bias": (width,)}

    def reset(self, generator):
        super().reset(generator)
        reset_loha(self, "down", generator, zero=False)
        reset_loha(self, "up", generator, zero=True)

    def forward(self, z_ND, token_MD=None, owner_N=None):
        dtype = z_ND.dtype
        c_NR = F.linear(z_ND, loha_matrix(self, "down").to(dtype), self.down_bias.to(dtype))
        c_NR = self.dropout(F.silu(c_NR))
        up_DR = grouped_to_dense(loha_matrix(self, "up"), self.config.groups).to(dtype)
        return z_ND + self.config.scale * F.linear(c_NR, up_DR, self.up_bias.to(dtype))
