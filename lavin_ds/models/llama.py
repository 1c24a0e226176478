"""LLaMA with fairscale's tensor-parallel layers, for training and for cached decoding.

Dimensions: B batch, T tokens, M routing tokens (2 modality tokens, or 0), N = M + B*T rows, D model width,
H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary, L layers. Inside a
tensor-parallel rank H, G, F and V are that rank's share.

The modality tokens. The paper puts t_m in front of every sample, but it attends to itself alone and nothing
attends to it (reference.md, section 3): its path through the layers depends on the modality only. So the two
modality tokens travel once per forward, as the first M rows of x_ND, instead of once per sample, the rest is
plainly causal and needs no mask, and every layer routes all samples by the same two rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
    scatter_to_model_parallel_region,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavin_ds.config import AdapterConfig, LlamaConfig, RopeScaling
from lavin_ds.models.adapters.base import build_adapters
from lavin_ds.models.attention import packed_attention
from lavin_ds.models.cache import Reads
from lavin_ds.models.lean import rms_norm, swiglu
from lavin_ds.models.linear import STORAGES, FrozenColumnLinear, FrozenRowLinear, Storage, leave_uninitialised
from lavin_ds.parallel import tensor_parallel_size

LOSS_CHUNK = 1024  # labelled rows whose logits exist at a time: 1024 * 32000 * 4 bytes = 131 MB


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """fairscale's layers take their dtype from torch's default alone."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@dataclass(frozen=True)
class Rows:
    """How the N rows of x_ND are made up, and which routing token each of them follows."""

    modalities: int  # M
    batch: int  # B
    length: int  # T
    packed: tuple[int, ...] | None  # lengths of the samples that lie end to end in the one row (B = 1); None: padded
    cu_seqlens: torch.Tensor | None  # where each packed sample begins; see packed_attention
    owner_N: torch.Tensor | None  # [N] index into the first M rows; None when M is 0
    reads: Reads | None = None  # where the samples go on from what a cache holds; None: each is whole


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_turns(positions: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """exp(i angle) [..., T, K/2], complex64, of integer positions [..., T] (RoPE, with LLaMA-3.1's scaling)."""
    even_K = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-even_K / config.head_dim)
    if config.rope_scaling:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[..., None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def _scale_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow waves are divided by `factor`, fast ones kept, those between interpolated (LLaMA 3.1)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * torch.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x_BTHK: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of features (Meta's interleaved layout), in fp32: one complex product.

    turns: [T, K/2] when all samples share positions, else [B, T, K/2].
    """
    pairs = torch.view_as_complex(x_BTHK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).to(x_BTHK.dtype)


def _split(x_NGK: torch.Tensor, modalities: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The modality tokens' rows [M, G, K], and the samples' [B, T, G, K]."""
    own_MGK, others = x_NGK.split([modalities, len(x_NGK) - modalities])
    return own_MGK, others.unflatten(0, shape)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, storage: Storage):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.n_heads // config.kv_heads  # query heads that share one key/value head
        self.wq = FrozenColumnLinear(config.dim, config.n_heads * config.head_dim, storage)
        self.wk = FrozenColumnLinear(config.dim, config.kv_heads * config.head_dim, storage)
        self.wv = FrozenColumnLinear(config.dim, config.kv_heads * config.head_dim, storage)
        self.wo = FrozenRowLinear(config.n_heads * config.head_dim, config.dim, storage)

    def forward(self, x_ND, rows: Rows, turns, layer: int = 0, added=None):
        """`added`: by name of a projection (q, k, v), what an adapter adds to all of its output features; this rank
        takes those of its own heads."""
        projected = {"q": self.wq(x_ND), "k": self.wk(x_ND), "v": self.wv(x_ND)}
        for name, rows_NO in (added or {}).items():
            projected[name] = projected[name] + scatter_to_model_parallel_region(rows_NO)
        q_NHK, k_NGK, v_NGK = (output.unflatten(-1, (-1, self.head_dim)) for output in projected.values())
        M, shape = rows.modalities, (rows.batch, rows.length)
        # Split, not sliced: the backward pass of a slice fills a tensor with zeros first.
        _, q_BTHK = _split(q_NHK, M, shape)
        _, k_BTGK = _split(k_NGK, M, shape)
        own_MGK, v_BTGK = _split(v_NGK, M, shape)
        q_BTHK, k_BTGK = rotate(q_BTHK, turns), rotate(k_BTGK, turns)

        if rows.reads:
            attended_NHK = rows.reads.attend(layer, q_BTHK[0], k_BTGK[0], v_BTGK[0])
        elif rows.packed:
            # Flattened, not q_BTHK[0], whose backward pass fills a tensor with zeros first.
            qkv = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
            attended_NHK = packed_attention(*qkv, rows.packed, rows.cu_seqlens)
        else:
            # Samples are padded on the right, so causality alone keeps padding out of sight.
            qkv = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
            attended_BHTK = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=self.groups > 1)
            attended_NHK = attended_BHTK.transpose(1, 2).flatten(0, 1)
        attended = attended_NHK.flatten(1)
        if M:
            # A modality token attends to itself alone: its attention is its own value.
            own = own_MGK.repeat_interleave(self.groups, dim=1).flatten(1)
            attended = torch.cat([own, attended])
        return self.wo(attended)


class FeedForward(nn.Module):
    """SwiGLU: W2 (silu(W1 x) * W3 x)."""

    def __init__(self, config: LlamaConfig, storage: Storage):
        super().__init__()
        self.w1 = FrozenColumnLinear(config.dim, config.ffn_dim, storage)
        self.w2 = FrozenRowLinear(config.ffn_dim, config.dim, storage)
        self.w3 = FrozenColumnLinear(config.dim, config.ffn_dim, storage)

    def forward(self, x_ND):
        return self.w2(swiglu(self.w1(x_ND), self.w3(x_ND)))


class Block(nn.Module):
    """x += Attention(norm x); x += FFN(norm x), with adapters at the attachment points of models/adapters."""

    def __init__(self, config: LlamaConfig, adapter: AdapterConfig, storage: Storage):
        super().__init__()
        self.attention = Attention(config, storage)
        self.feed_forward = FeedForward(config, storage)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        with default_dtype(torch.float32):
            values = config.kv_heads * config.head_dim
            self.adapters = build_adapters(config.dim, adapter, {"q": config.dim, "k": values, "v": values})

    def adapt(self, point: str, z_ND, rows: Rows):
        """What the adapter at `point` makes of the rows; the rows themselves where there is none."""
        if point not in self.adapters:
            return z_ND
        return self.adapters[point](z_ND, z_ND[: rows.modalities], rows.owner_N)

    def forward(self, x_ND, rows: Rows, turns, layer: int = 0):
        z_ND = self.adapt("attention", self.attention_norm(x_ND), rows)
        added = self.adapters["projections"](z_ND) if "projections" in self.adapters else None
        attended_ND = self.attention(z_ND, rows, turns, layer, added)
        x_ND = x_ND + self.adapt("after_attention", attended_ND, rows)
        z_ND = self.adapt("ffn", self.ffn_norm(x_ND), rows)
        y_ND = self.adapt("after_ffn", self.feed_forward(z_ND), rows)
        if "beside_ffn" in self.adapters:
            y_ND = y_ND + self.adapt("beside_ffn", z_ND, rows)
        return x_ND + y_ND


class Embedding(VocabParallelEmbedding):
    """Token embeddings; a tensor-parallel rank holds a part of the vocabulary.

    fairscale's own forward sets rows by boolean masks, for which a GPU would have to wait.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., D], whole on every rank."""
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        own = F.embedding((ids - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
        return reduce_from_model_parallel_region(own.masked_fill(elsewhere[..., None], 0))


class _TokenLoss(torch.autograd.Function):
    """Each chunk's gradient is made while its logits exist: they are neither kept for backward nor made again."""

    @staticmethod
    def forward(ctx, h_ND, target_N, chunk_loss):
        learns = ctx.needs_input_grad[0]
        total = h_ND.new_zeros((), dtype=torch.float32)
        gradients = []
        for h, target in zip(h_ND.split(LOSS_CHUNK), target_N.split(LOSS_CHUNK), strict=True):
            with torch.set_grad_enabled(learns):
                h = h.detach().requires_grad_(learns)
                loss = chunk_loss(h, target)
            total += loss.detach()
            if learns:
                loss.backward()  # h is the only leaf: LLaMA's weights are frozen
                gradients.append(h.grad)
        if learns:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, gradient):
        (gradient_ND,) = ctx.saved_tensors
        # In fp32: a factor of one over the labels, rounded to bf16, would be wrong by up to 0.4% in every step.
        return (gradient_ND.float() * gradient).to(gradient_ND.dtype), None, None


class Output(ColumnParallelLinear):
    """The projection to the vocabulary, and the loss behind it.

    All of the loss's chunks are one call of this module: ZeRO-3 gathers its weight once, and ranks with different
    numbers of chunks would wait for one another forever if each were a call.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False, gather_output=False, init_method=leave_uninitialised)

    def forward(self, h: torch.Tensor, target_N: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., V], of a tensor-parallel rank its part; or of rows [N, D] the sum of the cross-entropies."""
        return super().forward(h) if target_N is None else _TokenLoss.apply(h, target_N, self._chunk_loss)

    def _chunk_loss(self, h_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        logits_NV = super().forward(h_ND).float()
        if tensor_parallel_size() == 1:
            return F.cross_entropy(logits_NV, target_N, reduction="sum")
        return vocab_parallel_cross_entropy(logits_NV, target_N).sum()


class Llama(nn.Module):
    """LLaMA. Parameter names are Meta's; adapters live beside them under `layers.N.adapters`."""

    def __init__(
        self,
        config: LlamaConfig,
        adapter: AdapterConfig | None = None,
        storage: Storage = STORAGES["fp32"],
        recomputed_layers: int = 0,
    ):
        super().__init__()
        self.config = config
        # The first ones: they are recomputed last, when what the others kept is already released.
        self.recomputed_layers = recomputed_layers
        with default_dtype(storage.dtype):
            self.tok_embeddings = Embedding(config.vocab_size, config.dim, init_method=leave_uninitialised)
            self.layers = nn.ModuleList(
                Block(config, adapter or AdapterConfig(), storage) for _ in range(config.n_layers)
            )
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.output = Output(config.dim, config.vocab_size)

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.tok_embeddings(ids_BT)

    def forward(
        self,
        x_BTD: torch.Tensor,
        modality_MD: torch.Tensor | None = None,
        modality_B: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        packed: tuple[int, ...] | None = None,
        sample_N: torch.Tensor | None = None,
        place_N: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        reads: Reads | None = None,
    ) -> torch.Tensor:
        """Embedded tokens to normed hidden states, both [B, T, D].

        modality_MD: the modality tokens, and modality_B which of them each sample carries; None for neither.
        positions: [T] or [B, T]; by default 0.., or 1.. behind a modality token at 0, in every sample.
        packed: lengths of the samples that lie end to end in one row (B = 1); modality_B then has an entry for each,
        sample_N and place_N say which sample each token belongs to, and its place there, and cu_seqlens where each
        sample begins (see packed_attention).
        reads: the tokens of a row that go on from what the slots of a cache hold, and are appended there.
        """
        B, T, D = x_BTD.shape
        M = 0 if modality_MD is None else len(modality_MD)
        if reads:
            packed, sample_N, place_N = reads.lengths, reads.sequence_N, reads.index_N
        if positions is None:
            positions = (torch.arange(T, device=x_BTD.device) if place_N is None else place_N) + (1 if M else 0)
        turns = rotary_turns(positions, self.config)
        x_ND = x_BTD.reshape(B * T, D)
        owner_N = None
        if M:
            x_ND = torch.cat([modality_MD.to(x_ND.dtype), x_ND])
            itself_M = torch.arange(M, device=x_ND.device)
            of_samples_N = modality_B.repeat_interleave(T) if sample_N is None else modality_B[sample_N]
            owner_N = torch.cat([itself_M, of_samples_N])
        rows = Rows(M, B, T, packed, cu_seqlens, owner_N, reads)
        for index, block in enumerate(self.layers):
            if index < self.recomputed_layers and torch.is_grad_enabled():
                x_ND = checkpoint(block, x_ND, rows, turns, use_reentrant=False)
            else:
                x_ND = block(x_ND, rows, turns, index)
        if reads:
            reads.end()
        return self.norm(x_ND[M:]).unflatten(0, (B, T))

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V], the whole vocabulary on every tensor-parallel rank."""
        return gather_from_model_parallel_region(self.output(h))

    def token_loss(self, h_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropies in fp32 of labelled rows; logits exist for LOSS_CHUNK rows at a time."""
        return self.output(h_ND, target_N)
