"""LaVIN's Mixture-of-Modality adapter (paper 1) and paper 3's variant with concatenated paths.

Dimensions: N rows (tokens of all samples, flattened), D model width, R adapter rank, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lavin_ds.models.adapters.base import RoutedAdapter, grouped_to_dense


class MMAdapter(RoutedAdapter):
    """Mixture-of-Modality Adapter (paper 1, eq. 1-3): f_i(z) = U_i dropout(A z + a) + b_i.

    The down-projection A is shared by both paths; U_i are grouped.
    """

    def shapes(self, width):
        R, G = self.config.dim, self.config.groups
        return {
            "down_weight": (R, width),
            "down_bias": (R,),
            "up_weight_0": (width, R // G),
            "up_bias_0": (width,),
            "up_weight_1": (width, R // G),
            "up_bias_1": (width,),
            **super().shapes(width),
        }

    def down(self, z_ND):
        dtype = z_ND.dtype
        c_NR = self.dropout(F.linear(z_ND, self.down_weight.to(dtype), self.down_bias.to(dtype)))
        return c_NR, c_NR

    def up(self):
        G = self.config.groups
        return grouped_to_dense(self.up_weight_0, G), grouped_to_dense(self.up_weight_1, G)


class ConcatAdapter(MMAdapter):
    """Router with concatenated features: z + s * [w_0 f_0(z), w_1 f_1(z)] (paper 3, Table 3, rows 5 and 6).

    "Equation 1 was modified to concatenate the features as [psi_1(z), psi_2(z)]", after CSPNet. Our reading: f_0
    produces the first half of the D features and f_1 the second half, from the shared down-projection of `mm`. The
    paper does not say how rows 5 and 6 differ.
    """

    def shapes(self, width):
        whole = super().shapes(width)
        return {name: (width // 2, *shape[1:]) if name.startswith("up") else shape for name, shape in whole.items()}

    def up(self):
        return _halves(*super().up())

    def biases(self):
        return _halves(*super().biases())


def _halves(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads both to the whole width: `first` followed by zeros, and zeros followed by `second`."""
    return torch.cat([first, torch.zeros_like(second)]), torch.cat([torch.zeros_like(first), second])
