"""Adapters: the only parts of LaVIN that learn, with the visual neck and the modality embedding.

Dimensions: N rows (tokens of all samples, flattened), D model width, R adapter rank, G groups,
M routing tokens, E = 2 paths, Q = R * R, O width of a projection's output.

Every adapter but LoRA is called as `adapter(z_ND, token_MD, owner_N)`: `token_MD` are the rows that decide the
route and `owner_N` says which of them decides for each row. Adapters without a router ignore both.

    kind                 class                what it is                                      source
    mm                   MMAdapter            two routed paths from one down-projection       paper 1, eq. 1-3
    rep                  RepAdapter           one path                                        paper 1, section 3.1
    bottleneck           BottleneckAdapter    one path                                        paper 3, eq. 1-2
    bottleneck_weighted  WeightedBottleneck   two whole bottlenecks, routed                   paper 3, Table 3, row 11
    concat               ConcatAdapter        two routed paths side by side                   paper 3, Table 3, rows 5-6
    loha                 LohaAdapter          two routed [D, D] matrices, each a LoHa         paper 3, Table 3, row 7
    loha_mm              LohaMMAdapter        `mm` with a LoHa in place of each projection    paper 3, Table 3, row 8
    loha_silu            LohaSiluAdapter      one path of LoHas with a SiLU between           paper 3, Table 3, row 9
    lora                 LoRA                 added to the LLM's query and value projections  paper 3, Table 3, row 10

Paper 1 is LaVIN, paper 3 "Enhancing Model Performance: Another Approach to Vision-Language Instruction Tuning",
whose Table 3 gives a name and a score for each and no code: "Our reading" below is what it leaves open.

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


class Adapter(nn.Module):
    """What adapters share: they declare their parameters by name and shape, and start as the identity."""

    routed = False

    def __init__(self, width: int, config: AdapterConfig):
        super().__init__()
        self.config = config
        for name, shape in self.shapes(width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape, by name."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """Down-projections Xavier, the router as nn.Linear, all else zero (reference.md, section 4).

        So the up-projections are zero, and the adapter is the identity.
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

    No router and no non-linearity: the same map as RepAdapter's, which it is taken from. New are its width (16, in
    2 groups) and its place, before the ViT's feed-forward too. Our reading: psi_d has a bias; the scale is 1, and
    LaVIN's dropout stays between psi_d and psi_u.
    """


class RoutedAdapter(Adapter):
    """Adapters that weigh two paths: z + s * (w_0 f_0(z) + w_1 f_1(z)), w = softmax((W t + b) / tau) (paper 1, eq. 3).

    t is a routing token: the modality token in the LLM, the image's own class token in the ViT. A path is
    f_i(z) = U_i c_i + b_i; a subclass says what c_i and U_i are.
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
        # One product for both paths and their biases: w_0 (U_0 c_0 + b_0) + w_1 (U_1 c_1 + b_1) is linear in
        # [w_0 c_0, w_1 c_1, w_0, w_1], and neither path's [N, D] output is ever held.
        mixed_NX = torch.cat([w_NE[:, :1] * c_0, w_NE[:, 1:] * c_1, w_NE], dim=1)
        up_DX = torch.cat([*self.up(), *self.biases()], dim=1)
        return torch.addmm(z_ND, mixed_NX, up_DX.to(dtype).t(), alpha=self.config.scale)

    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        """b_0 and b_1, [D, 1] each."""
        return self.up_bias_0[:, None], self.up_bias_1[:, None]


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


class WeightedBottleneck(MMAdapter):
    """Bottlenecks with weight scales: f_i(z) = U_i dropout(A_i z + a_i) + b_i (paper 3, Table 3, row 11).

    "Our mainline adapter with dynamic weight factors". Our reading: the factors are LaVIN's, which need two things
    to weigh, so there are two whole bottlenecks; `mm` differs in sharing their down-projection.
    """

    def shapes(self, width):
        R = self.config.dim
        paths = {"down_weight_0": (R, width), "down_bias_0": (R,), "down_weight_1": (R, width), "down_bias_1": (R,)}
        others = {name: shape for name, shape in super().shapes(width).items() if not name.startswith("down")}
        return paths | others

    def down(self, z_ND):
        # Both at once: [N, 2R].
        weight = torch.cat([self.down_weight_0, self.down_weight_1]).to(z_ND.dtype)
        bias = torch.cat([self.down_bias_0, self.down_bias_1]).to(z_ND.dtype)
        return self.dropout(F.linear(z_ND, weight, bias)).chunk(2, dim=1)


class ConcatAdapter(MMAdapter):
    """Router with concatenated features: z + s * [w_0 f_0(z), w_1 f_1(z)] (paper 3, Table 3, rows 5 and 6).

    "Equation 1 was modified to concatenate the features as [psi_1(z), psi_2(z)]", after CSPNet. Our reading: f_0
    makes the first half of the D features and f_1 the second, from the shared down-projection of `mm`. The paper
    does not say how its two rows differ.
    """

    def shapes(self, width):
        whole = super().shapes(width)
        return {name: (width // 2, *shape[1:]) if name.startswith("up") else shape for name, shape in whole.items()}

    def up(self):
        return _halves(*super().up())

    def biases(self):
        return _halves(*super().biases())


def _halves(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`first` over zeros, and zeros over `second`."""
    return torch.cat([first, torch.zeros_like(second)]), torch.cat([torch.zeros_like(first), second])


# LoHa (FedPara): a matrix as the Hadamard product of two of low rank, W = (X_1 Y_1^T) * (X_2 Y_2^T) (paper 3, below
# eq. 6). The paper gives no rank; here it is the adapter's dim. For W [O, I] the factors are x1, x2 [O, R] and
# y1, y2 [I, R]: R (O + I) * 2 numbers, more than W has where O or I is an adapter's narrow side.
FACTORS = ("x1", "y1", "x2", "y2")


def loha_shapes(name: str, outputs: int, inputs: int, rank: int) -> dict[str, tuple[int, int]]:
    """The four factors of matrix `name`."""
    return {f"{name}_{factor}": (outputs if factor[0] == "x" else inputs, rank) for factor in FACTORS}


def reset_loha(adapter: Adapter, name: str, generator: torch.Generator, zero: bool) -> None:
    """`zero`: x2 is zero, and so is W. Else W has the variance of Xavier's; every factor has the same deviation."""
    factors = {factor: adapter.get_parameter(f"{name}_{factor}") for factor in FACTORS}
    (outputs, rank), inputs = factors["x1"].shape, len(factors["y1"])
    # W_ij is a product of two sums of `rank` products: its variance is rank^2 deviation^8.
    deviation = (2 / (outputs + inputs) / rank**2) ** (1 / 8)
    for factor in factors.values():
        nn.init.normal_(factor, std=deviation, generator=generator)
    if zero:
        nn.init.zeros_(factors["x2"])


def loha_matrix(adapter: Adapter, name: str) -> torch.Tensor:
    """W [O, I] itself."""
    x1, y1, x2, y2 = (adapter.get_parameter(f"{name}_{factor}") for factor in FACTORS)
    return (x1 @ y1.t()) * (x2 @ y2.t())


def loha_as_low_rank(adapter: Adapter, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """X [O, Q] and Y [I, Q] with W = X Y^T: column (r, s) of X is x1[:, r] * x2[:, s], and so for Y.

    W [D, D] is never held: at D = 4096 it would be 64 MiB a matrix, and its two factors as much again for backward.
    """
    x1, y1, x2, y2 = (adapter.get_parameter(f"{name}_{factor}") for factor in FACTORS)
    return (x1[:, :, None] * x2[:, None]).flatten(1), (y1[:, :, None] * y2[:, None]).flatten(1)


class LohaAdapter(RoutedAdapter):
    """LoHa without a bottleneck: f_i(z) = W_i z + b_i, each W_i [D, D] a LoHa (paper 3, eq. 6; Table 3, row 7).

    "We didn't use any down scaling convolution. We just used two LoHa conv_1d [with] dynamic weight factors same as
    in LaVIN." Our reading: z is added, which eq. 6 leaves out (without it a new adapter would wipe what attention
    reads); no dropout, whose place was between down and up.
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

    Our reading: phi_2 is D -> R and phi_1 grouped R -> D, each with a bias, as LaVIN's convolutions; dropout stands
    where it does there, before phi_1.
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


class LoRA(Adapter):
    """LoRA on the LLM's attention: q += s * B_q A_q dropout(z), v += s * B_v A_v dropout(z) (paper 3, Table 3, row 10).

    "LoRA was used in LLM backbone and Rep-Adapter in the vision backbone." Our reading: the query and value
    projections, which LoRA's authors adapt; rank `dim`, `scale` their alpha / r.

    width_q, width_v: O of the whole projections, whatever a tensor-parallel rank holds of them.
    """

    def __init__(self, width: int, config: AdapterConfig, width_q: int, width_v: int):
        self.outputs = {"q": width_q, "v": width_v}
        super().__init__(width, config)

    def shapes(self, width):
        R = self.config.dim
        shapes = {}
        for name, outputs in self.outputs.items():
            shapes |= {f"down_weight_{name}": (R, width), f"up_weight_{name}": (outputs, R)}
        return shapes

    def forward(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to all query and all value features: [N, O] each."""
        dtype = z_ND.dtype
        dropped_ND = self.dropout(z_ND)
        down_XD = torch.cat([self.down_weight_q, self.down_weight_v]).to(dtype)
        c_q, c_v = F.linear(dropped_ND, down_XD).chunk(2, dim=1)
        scale = self.config.scale
        return scale * F.linear(c_q, self.up_weight_q.to(dtype)), scale * F.linear(c_v, self.up_weight_v.to(dtype))


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


KINDS: dict[str, type[Adapter]] = {
    "mm": MMAdapter,
    "rep": RepAdapter,
    "bottleneck": BottleneckAdapter,
    "bottleneck_weighted": WeightedBottleneck,
    "concat": ConcatAdapter,
    "loha": LohaAdapter,
    "loha_mm": LohaMMAdapter,
    "loha_silu": LohaSiluAdapter,
    "lora": LoRA,
}
TRAINABLE = (Adapter, VisualNeck, ModalityEmbedding)


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


def build_adapters(width: int, config: AdapterConfig, value_width: int | None = None) -> nn.ModuleDict:
    """The adapters of one block by where they stand: "attention" and "ffn" before those, "projections" within
    attention; empty for kind "none".

    value_width: features of all value heads, for LoRA.
    """
    if config.kind == "none":
        return nn.ModuleDict()
    if config.kind == "lora":
        return nn.ModuleDict({"projections": LoRA(width, config, width, value_width)})
    return nn.ModuleDict({place: KINDS[config.kind](width, config) for place in config.before})
