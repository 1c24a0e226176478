"""LoRA on attention's projections.

Dimensions: N rows (tokens of all samples, flattened), D model width, R adapter rank,
X = 2 * R, O width of a projection's output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lavin_ds.config import AdapterConfig
from lavin_ds.models.adapters.base import Adapter


class LoRA(Adapter):
    """LoRA on the LLM's attention: q += s * B_q A_q dropout(z), v += s * B_v A_v dropout(z) (paper 3, Table 3, row 10).

    "LoRA was used in LLM backbone and Rep-Adapter in the vision backbone." Our reading: LoRA is on the query and value
    projections, as in LoRA's own paper. The rank is `dim`, and `scale` is that paper's alpha / r.

    outputs: O of each projection by name, before tensor-parallel splitting.
    """

    ADAPTED = ("q", "v")

    def __init__(self, width: int, config: AdapterConfig, outputs: dict[str, int]):
        self.outputs = outputs
        super().__init__(width, config)

    def shapes(self, width):
        R = self.config.dim
        shapes = {}
        for name in self.ADAPTED:
            shapes |= {f"down_weight_{name}": (R, width), f"up_weight_{name}": (self.outputs[name], R)}
        return shapes

    def forward(self, z_ND: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms [N, O] to add to the projections' outputs, by name."""
        dtype = z_ND.dtype
        dropped_ND = self.dropout(z_ND)
        down_XD = torch.cat([self.down_weight_q, self.down_weight_v]).to(dtype)
        c_q, c_v = F.linear(dropped_ND, down_XD).chunk(2, dim=1)
        up_q, up_v = self.up_weight_q.to(dtype), self.up_weight_v.to(dtype)
        return {"q": self.config.scale * F.linear(c_q, up_q), "v": self.config.scale * F.linear(c_v, up_v)}
