"""Bottlenecks: RepAdapter (paper 1), and paper 3's Bottleneck Adapter with and without routing.

Dimensions: N rows (tokens of all samples, flattened), D model width, R adapter rank, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lavin_ds.models.adapters.base import Adapter, grouped_to_dense
from lavin_ds.models.adapters.mm import MMAdapter


class RepAdapter(Adapter):
    """RepAdapter: z + s * (U dropout(A z + a) + b), U grouped (paper 1, section 3.1 and its reference [23]).

    Used in every layer of the text-only baseline and of the first rows of paper 1's Table 2.
    """

    def shapes(self, width):
        R, G = self.config.dim, self.config.groups
        return {"down_weight": (R, width), "down_bias": (R,), "up_weight": (width, R // G), "up_bias": (width,)}

    def forward(self, z_ND, token_MD=None, owner_N=None):
        dtype = z_ND.dtype
        c_NR = self.dropout(F.linear(z_ND, self.down_weight.to(dtype), self.down_bias.to(dtype)))
        up_DR = grouped_to_dense(self.up_weight, self.config.groups).to(dtype)
        return z_ND + self.config.scale * F.linear(c_NR, up_DR, self.up_bias.to(dtype))


class BottleneckAdapter(RepAdapter):
    """Bottleneck Adapter: z + psi_u(psi_d(z)), psi_u(c) = [c_g0 W_g0, .., c_gk W_gk] + b (paper 3, eq. 1-2).

    It has no router and no non-linearity, so it computes the same map as RepAdapter. It differs in its width (16, in 2
    groups) and its position, which is also before the ViT's feed-forward. Our reading: psi_d has a bias, the scale is
    1, and LaVIN's dropout stays between psi_d and psi_u.
    """


class WeightedBottleneck(MMAdapter):
    """Bottlenecks with weight scales: f_i(z) = U_i dropout(A_i z + a_i) + b_i (paper 3, Table 3, row 11).

    "Our mainline adapter with dynamic weight factors". Our reading: the factors are LaVIN's routing weights, which need
    two paths, so there are two whole bottlenecks. In `mm` the two paths share their down-projection.
    """

    def shapes(self, width):
        R = self.config.dim
        paths = {"down_weight_0": (R, width), "down_bias_0": (R,), "down_weight_1": (R, width), "down_bias_1": (R,)}
        others = {name: shape for name, shape in super().shapes(width).items() if not name.startswith("down")}
        return paths | others

    def down(self, z_ND):
        # One product for both paths: [N, 2R].
        weight = torch.cat([self.down_weight_0, self.down_weight_1]).to(z_ND.dtype)
        bias = torch.cat([self.down_bias_0, self.down_bias_1]).to(z_ND.dtype)
        return self.dropout(F.linear(z_ND, weight, bias)).chunk(2, dim=1)
