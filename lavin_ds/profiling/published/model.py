"""LaVIN's training step as the authors compute it, with one switch per difference from ours.

It is written from facts about their code (docs/fidelity.md), so that their step can be measured and simulated beside
ours. It has the parameters of `Lavin` under the same names, and computes the same function at another cost.

Dimensions: B samples, T positions of a sample, M routing tokens, N rows (all positions of all samples), D width,
H heads, K head width, S tokens of an image, R adapter rank, E = 2 paths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavin_ds.config import Checkpointing, ModelConfig
from lavin_ds.data.collate import PADDING, Batch
from lavin_ds.data.layout import IGNORE
from lavin_ds.errors import UserError
from lavin_ds.models.adapters.mm import MMAdapter
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.llama import Attention, Block, FeedForward, RMSNorm, rope_rotations, rotate
from lavin_ds.models.vision import VisionAttention, VisionBlock


@dataclass(frozen=True)
class PublishedOptions:
    """The differences of the authors' step from ours. The default is their step."""

    pad_to: int | None = 512  # pads every sample to that many positions; None: to the longest in its batch
    eager_attention: bool = True  # scores, mask and probabilities are tensors of their own
    full_logits: bool = True  # logits at every position, labelled or not
    zero_images: bool = True  # a text-only sample sends an image of zeros through the ViT
    per_sample_routing: bool = True  # each sample has its own t_m at position 0 and routes by it
    separate_paths: bool = True  # both paths of an adapter are convolutions whose [N, D] outputs are kept
    plain_autograd: bool = True  # norms, SwiGLU and QuickGELU by autograd, which keeps fp32 copies too

    def without(self, *names: str) -> PublishedOptions:
        """These options with the named differences switched off."""
        unknown = set(names) - set(SAVINGS)
        if unknown:
            raise ValueError(f"no saving {', '.join(sorted(unknown))}; there are {', '.join(SAVINGS)}")
        return replace(self, **{name: None if name == "pad_to" else False for name in names})


SAVINGS = tuple(field.name for field in fields(PublishedOptions))


def published_model(options: PublishedOptions) -> Callable[..., PublishedLavin]:
    """The `make` with which `simulate` builds the authors' model. Set training.packing to false: it does not pack."""
    return partial(PublishedLavin, options=options)


class PublishedLavin(Lavin):
    """`Lavin` with the authors' forward.

    Half precision is as in their code: the residual stream, routing and logits have the frozen weights' dtype; softmax
    and cross-entropy are in fp32, as under autocast; adapters are cast to half at every use.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: PublishedOptions | None = None,
        compat: bool = False,
        activation_checkpointing: Checkpointing = False,
    ):
        kinds = {config.llm_adapter.kind, config.vision_adapter.kind} - {"none", "mm", "rep"}
        if kinds or config.vision_source != "pixels":
            what = f"adapters of kind {', '.join(sorted(kinds))}" if kinds else "cached visual features"
            raise UserError(f"LaVIN's authors have no {what}, so there is no published step to compare with.")
        super().__init__(config, compat, activation_checkpointing)
        self.options = options or PublishedOptions()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The sum of the labelled tokens' cross-entropies (fp32) and their number, as in Lavin.forward."""
        if batch.packed:
            raise ValueError("the published step pads its samples, but this micro-batch is packed")
        modality_token = self.modality is not None
        if self.options.pad_to is not None:
            batch = _padded(batch, self.options.pad_to - modality_token)
        x_BTD, modality_B = self.embed(batch)
        h_BTD = self._decoder(x_BTD, modality_B)
        if not self.options.full_logits:
            labelled_BT = batch.labels_BT[:, 1:] != IGNORE
            target_N = batch.labels_BT[:, 1:][labelled_BT]
            return self.llm.token_loss(h_BTD[:, :-1][labelled_BT], target_N), len(target_N)
        logits_NV = self.llm.output(h_BTD)[:, :-1].flatten(0, 1)
        target_N = batch.labels_BT[:, 1:].flatten()
        loss = F.cross_entropy(logits_NV.float(), target_N, ignore_index=IGNORE, reduction="sum")
        return loss, int((target_N != IGNORE).sum())

    def _features(self, batch: Batch) -> torch.Tensor:
        """The ViT's rows [I, F, W] for the I samples with an image. `Lavin.embed` calls this."""
        size = self.config.vision.image_size
        images = batch.images_NHWC
        if images is None:
            images = torch.empty(0, size, size, 3, dtype=torch.uint8, device=batch.ids_BT.device)
        pixels = self.vision.pixels(images)
        image_I = batch.image_B[batch.illustrated_I]
        if not self.options.zero_images:
            return self._vision(pixels)[image_I]
        everyone = pixels.new_zeros(len(batch.image_B), *pixels.shape[1:])
        everyone[batch.illustrated_I] = pixels[image_I]
        return self._vision(everyone)[batch.illustrated_I]

    def _vision(self, pixels: torch.Tensor) -> torch.Tensor:
        """The ViT's rows [B, F, W], as VisionTower returns them."""
        tower = self.vision
        patches = tower.conv1(pixels.to(tower.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        cls = tower.class_embedding.expand(len(pixels), 1, -1)
        x_BSW = tower.ln_pre(torch.cat([cls, patches], dim=1) + tower.positional_embedding)
        handed_out = []
        for number, block in enumerate(tower.blocks, start=1):
            x_BSW = _run(tower.activation_checkpointing, self._vision_block, block, x_BSW)
            if number in tower.read_blocks:
                handed_out.append(x_BSW[:, tower.kept_rows])
        x_BFW = torch.cat(handed_out, dim=1)
        return x_BFW if tower.ln_post is None else tower.ln_post(x_BFW)

    def _vision_block(self, block: VisionBlock, x_BSW: torch.Tensor) -> torch.Tensor:
        clip = block.clip

        def adapt(place: str, z_BSW: torch.Tensor) -> torch.Tensor:
            if not (self.options.separate_paths and self._is_routed(block, place)):
                return block.adapt(place, z_BSW)
            B, S, _ = z_BSW.shape
            adapter, device = block.adapters[place], z_BSW.device
            if block.batch_routed:
                w_NE = _route(adapter, z_BSW[0])[torch.arange(S, device=device).repeat(B)]
            else:
                w_NE = _route(adapter, z_BSW[:, 0])[torch.arange(B, device=device).repeat_interleave(S)]
            return _separate_paths(adapter, z_BSW.flatten(0, 1), w_NE).unflatten(0, (B, S))

        z_BSW = adapt("attention", clip.ln_1(x_BSW))
        attended = _eager_vision_attention(clip.attn, z_BSW) if self.options.eager_attention else clip.attn(z_BSW)
        x_BSW = x_BSW + attended
        z_BSW = adapt("ffn", clip.ln_2(x_BSW))
        if not (self.options.plain_autograd and self.config.vision.quick_gelu):
            return x_BSW + clip.mlp(z_BSW)
        hidden = clip.mlp.c_fc(z_BSW)
        return x_BSW + clip.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))

    def _decoder(self, x_BTD: torch.Tensor, modality_B: torch.Tensor) -> torch.Tensor:
        """Embedded tokens [B, T, D] to normed hidden states [B, T, D], without t_m.

        Inside, the rows of x_ND are [t_m, tokens] of every sample if per_sample_routing is on. Otherwise they are the
        M modality tokens and then the tokens of all samples.
        """
        B, T, D = x_BTD.shape
        token_MD = self.modality().to(x_BTD.dtype) if self.modality is not None else x_BTD.new_empty(0, D)
        in_samples = self.options.per_sample_routing and len(token_MD) > 0
        if in_samples:
            x_ND = torch.cat([token_MD[modality_B][:, None], x_BTD], dim=1).flatten(0, 1)
            owner_N = torch.arange(B, device=x_BTD.device).repeat_interleave(1 + T)
        else:
            x_ND = torch.cat([token_MD, x_BTD.flatten(0, 1)])
            itself_M = torch.arange(len(token_MD), device=x_BTD.device)
            owner_N = torch.cat([itself_M, modality_B.repeat_interleave(T)])
        first = 1 if len(token_MD) else 0  # RoPE position of the first token
        positions = torch.arange(0 if in_samples else first, first + T, device=x_BTD.device)
        rotations = rope_rotations(positions, self.llm.config)
        context = _Rows(B, T, len(token_MD), in_samples, owner_N, rotations)
        for number, block in enumerate(self.llm.layers):
            x_ND = _run(number < self.llm.recomputed_layers, self._decoder_block, block, x_ND, context)
        h_ND = self._norm(self.llm.norm, x_ND)
        return h_ND.unflatten(0, (B, 1 + T))[:, 1:] if in_samples else h_ND[len(token_MD) :].unflatten(0, (B, T))

    def _decoder_block(self, block: Block, x_ND: torch.Tensor, rows: _Rows) -> torch.Tensor:
        def adapt(place: str, z_ND: torch.Tensor) -> torch.Tensor:
            if place not in block.adapters:
                return z_ND
            adapter = block.adapters[place]
            token_MD = z_ND.unflatten(0, (rows.batch, -1))[:, 0] if rows.in_samples else z_ND[: rows.modalities]
            if self.options.separate_paths and self._is_routed(block, place):
                return _separate_paths(adapter, z_ND, _route(adapter, token_MD)[rows.owner_N])
            return adapter(z_ND, token_MD, rows.owner_N)

        z_ND = adapt("attention", self._norm(block.attention_norm, x_ND))
        x_ND = x_ND + self._attention(block.attention, z_ND, rows)
        return x_ND + self._feed_forward(block.feed_forward, adapt("ffn", self._norm(block.ffn_norm, x_ND)))

    def _norm(self, norm: RMSNorm, x_ND: torch.Tensor) -> torch.Tensor:
        if not self.options.plain_autograd:
            return norm(x_ND)
        x32_ND = x_ND.float()
        scale_N1 = torch.rsqrt(x32_ND.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (x32_ND * scale_N1).to(x_ND.dtype) * norm.weight

    def _feed_forward(self, mlp: FeedForward, z_ND: torch.Tensor) -> torch.Tensor:
        return mlp.w2(F.silu(mlp.w1(z_ND)) * mlp.w3(z_ND)) if self.options.plain_autograd else mlp(z_ND)

    def _attention(self, attention: Attention, z_ND: torch.Tensor, rows: _Rows) -> torch.Tensor:
        q_NHK, k_NHK, v_NHK = (
            project(z_ND).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.wq, attention.wk, attention.wv)
        )
        if attention.groups > 1:
            k_NHK, v_NHK = (x.repeat_interleave(attention.groups, dim=1) for x in (k_NHK, v_NHK))
        if rows.in_samples:
            shape = (rows.batch, 1 + rows.length)
            q_BTHK = rotate(q_NHK.unflatten(0, shape), rows.rotations)
            k_BTHK, v_BTHK = rotate(k_NHK.unflatten(0, shape), rows.rotations), v_NHK.unflatten(0, shape)
            if self.options.eager_attention:
                mask_TT = _causal_mask(1 + rows.length, q_BTHK)
                mask_TT[1:, 0] = float("-inf")  # only t_m attends to t_m
                attended = _eager_attention(q_BTHK, k_BTHK, v_BTHK, mask_TT)
            else:
                # t_m attends only to itself, and no token attends to it. So its attention output is its own value.
                others = _causal_attention(q_BTHK[:, 1:], k_BTHK[:, 1:], v_BTHK[:, 1:])
                attended = torch.cat([v_BTHK[:, :1], others], dim=1)
            return attention.wo(attended.flatten(2).flatten(0, 1))
        M, shape = rows.modalities, (rows.batch, rows.length)
        q_BTHK, k_BTHK = (rotate(x[M:].unflatten(0, shape), rows.rotations) for x in (q_NHK, k_NHK))
        v_BTHK = v_NHK[M:].unflatten(0, shape)
        if self.options.eager_attention:
            attended = _eager_attention(q_BTHK, k_BTHK, v_BTHK, _causal_mask(rows.length, q_BTHK))
        else:
            attended = _causal_attention(q_BTHK, k_BTHK, v_BTHK)
        return attention.wo(torch.cat([v_NHK[:M].flatten(1), attended.flatten(2).flatten(0, 1)]))

    @staticmethod
    def _is_routed(block: nn.Module, place: str) -> bool:
        return place in block.adapters and type(block.adapters[place]) is MMAdapter


@dataclass(frozen=True)
class _Rows:
    """The layout of the rows of x_ND; see PublishedLavin._decoder."""

    batch: int
    length: int  # of a sample, without its modality token
    modalities: int
    in_samples: bool
    owner_N: torch.Tensor
    rotations: torch.Tensor  # [positions, K/2] complex


def _run(recomputed: bool, block, *arguments):
    if recomputed and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


def _padded(batch: Batch, length: int) -> Batch:
    missing = (0, length - batch.ids_BT.shape[1])
    if missing[1] < 0:
        raise ValueError(f"a sample of {batch.ids_BT.shape[1]} ids does not fit into pad_to {length}")
    return replace(
        batch,
        ids_BT=F.pad(batch.ids_BT, missing, value=PADDING),
        labels_BT=F.pad(batch.labels_BT, missing, value=IGNORE),
    )


def _route(adapter: MMAdapter, token_MD: torch.Tensor) -> torch.Tensor:
    """Routing weights [M, E] in the tokens' dtype. Only the softmax is in fp32."""
    dtype = token_MD.dtype
    scores_ME = F.linear(token_MD, adapter.router_weight.to(dtype), adapter.router_bias.to(dtype))
    return torch.softmax(scores_ME.float() / adapter.config.temperature, dim=-1).to(dtype)


def _separate_paths(adapter: MMAdapter, z_ND: torch.Tensor, w_NE: torch.Tensor) -> torch.Tensor:
    """z + s * (w_0 f_1(z) + w_1 f_2(z)). Every product is a convolution of width 1 over rows."""
    dtype, config = z_ND.dtype, adapter.config

    def convolve(x_1RN, weight, bias, groups=1):
        return F.conv1d(x_1RN, weight[:, :, None].to(dtype), bias.to(dtype), groups=groups)

    c_1RN = convolve(z_ND.t()[None], adapter.down_weight, adapter.down_bias)
    c_1RN = F.dropout(c_1RN, config.dropout, adapter.training)
    first_1DN = convolve(c_1RN, adapter.up_weight_0, adapter.up_bias_0, config.groups)
    second_1DN = convolve(c_1RN, adapter.up_weight_1, adapter.up_bias_1, config.groups)
    mixed_1DN = w_NE[:, 0] * first_1DN + w_NE[:, 1] * second_1DN
    return z_ND + config.scale * mixed_1DN[0].t()


def _causal_mask(length: int, like: torch.Tensor) -> torch.Tensor:
    """A mask [T, T] to add to attention scores."""
    return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def _eager_attention(q_BTHK, k_BTHK, v_BTHK, mask_TT) -> torch.Tensor:
    q_BHTK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    scores_BHTT = q_BHTK @ k_BHTK.transpose(2, 3) / q_BTHK.shape[-1] ** 0.5
    if mask_TT is not None:
        scores_BHTT = scores_BHTT + mask_TT
    probabilities = torch.softmax(scores_BHTT.float(), dim=-1).to(q_BTHK.dtype)
    return (probabilities @ v_BHTK).transpose(1, 2)


def _causal_attention(q_BTHK, k_BTHK, v_BTHK) -> torch.Tensor:
    q_BHTK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True).transpose(1, 2)


def _eager_vision_attention(attention: VisionAttention, z_BSW: torch.Tensor) -> torch.Tensor:
    return attention.out_proj(_eager_attention(*attention.qkv(z_BSW), None).flatten(2))
