"""LLaMA with fairscale's tensor-parallel layers, for training and for cached decoding.

Dimensions: B batch, T tokens, M routing tokens (2 modality tokens, or 0), N = M + B*T rows, D model width,
H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary, L layers. On a
tensor-parallel rank, H, G, F and V are the rank's share.

The modality tokens. The paper puts t_m in front of every sample. But t_m attends only to itself and no other token
attends to it (reference.md, section 3), so its hidden states depend only on the modality. Therefore the two modality
tokens are computed once per forward, as the first M rows of x_ND, and not once per sample. The other tokens use plain
causal attention without a mask, and every layer routes all samples by the same two rows.
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
from lavin_ds.models.linear import STORAGES, FrozenColumnLinear, FrozenRowLinear, Storage, leave_uninitialised
from lavin_ds.models.recompute_ops import rms_norm, swiglu
from lavin_ds.parallel import tensor_parallel_size

LOSS_CHUNK = 1024  # labelled rows whose logits are in memory at a time: 1024 * 32000 * 4 bytes = 131 MB


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype: fairscale's layers have no other way to choose their dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@dataclass(frozen=True)
class Rows:
    """The layout of the N rows of x_ND, and the routing token of each row."""

    modalities: int  # M
    batch: int  # B
    length: int  # T
    packed: tuple[int, ...] | None  # lengths of the samples packed into one row (B = 1); None if they are padded
    cu_seqlens: torch.Tensor | None  # the start of each packed sample; see packed_attention
    owner_N: torch.Tensor | None  # each row's routing token, an index into the first M rows; None if M is 0
    reads: Reads | None = None  # where a cache holds the start of the sequences; None in training


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_rotations(positions: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """RoPE's exp(i angle), complex64 [..., T, K/2], of integer positions [..., T], with LLaMA-3.1's scaling."""
    even_K = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-even_K / config.head_dim)
    if config.rope_scaling:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[..., None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def _scale_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates those between (LLaMA 3.1)."""
    wavelengths_in_context = scaling.original_max_position_embeddings * frequencies / (2 * torch.pi)
    keep = (wavelengths_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x_BTHK: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of features (Meta's interleaved layout) by one complex product in fp32.

    rotations: [T, K/2] if all samples share positions, else [B, T, K/2].
    """
    pairs = torch.view_as_complex(x_BTHK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations.unsqueeze(-2)).flatten(-2).to(x_BTHK.dtype)


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

    def forward(self, x_ND, rows: Rows, rotations, layer: int = 0, added=None):
        """`added`: what an adapter adds to a projection, by its name (q, k or v). It covers all output features; this
        rank takes those of its own heads."""
        projected = {"q": self.wq(x_ND), "k": self.wk(x_ND), "v": self.wv(x_ND)}
        for name, rows_NO in (added or {}).items():
            projected[name] = projected[name] + scatter_to_model_parallel_region(rows_NO)
        q_NHK, k_NGK, v_NGK = (output.unflatten(-1, (-1, self.head_dim)) for output in projected.values())
        M, shape = rows.modalities, (rows.batch, rows.length)
        # Split and not sliced, because the backward pass of a slice first fills a tensor with zeros.
        _, q_BTHK = _split(q_NHK, M, shape)
        _, k_BTGK = _split(k_NGK, M, shape)
        own_MGK, v_BTGK = _split(v_NGK, M, shape)
        q_BTHK, k_BTGK = rotate(q_BTHK, rotations), rotate(k_BTGK, rotations)

        if rows.reads:
            attended_NHK = rows.reads.attend(layer, q_BTHK[0], k_BTGK[0], v_BTGK[0])
        elif rows.packed:
            # Flattened, not q_BTHK[0]: the backward pass of an index fills a tensor with zeros first.
            qkv = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
            attended_NHK = packed_attention(*qkv, rows.packed, rows.cu_seqlens)
        else:
            # Samples are padded on the right, so with causal attention no token sees padding.
            qkv = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
            attended_BHTK = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=self.groups > 1)
            attended_NHK = attended_BHTK.transpose(1, 2).flatten(0, 1)
        attended = attended_NHK.flatten(1)
        if M:
            # A modality token attends only to itself, so its attention output is its own value.
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
        """The output of the adapter at `point`, or z_ND itself if there is no adapter there."""
        if point not in self.adapters:
            return z_ND
        return self.adapters[point](z_ND, z_ND[: rows.modalities], rows.owner_N)

    def forward(self, x_ND, rows: Rows, rotations, layer: int = 0):
        z_ND = self.adapt("attention", self.attention_norm(x_ND), rows)
        added = self.adapters["projections"](z_ND) if "projections" in self.adapters else None
        attended_ND = self.attention(z_ND, rows, rotations, layer, added)
        x_ND = x_ND + self.adapt("after_attention", attended_ND, rows)
        z_ND = self.adapt("ffn", self.ffn_norm(x_ND), rows)
        y_ND = self.adapt("after_ffn", self.feed_forward(z_ND), rows)
        if "beside_ffn" in self.adapters:
            y_ND = y_ND + self.adapt("beside_ffn", z_ND, rows)
        return x_ND + y_ND


class Embedding(VocabParallelEmbedding):
    """Token embeddings. A tensor-parallel rank holds a part of the vocabulary.

    fairscale's own forward indexes by boolean masks, which makes the host wait for the GPU.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., D], whole on every rank."""
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        own = F.embedding((ids - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
        return reduce_from_model_parallel_region(own.masked_fill(elsewhere[..., None], 0))


class _TokenLoss(torch.autograd.Function):
    """Sum of chunk_loss over chunks of rows.

    Forward also computes the gradient of each chunk while its logits exist, so logits are neither kept nor recomputed.
    """

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
                loss.backward()  # h is the only leaf that needs a gradient: LLaMA's weights are frozen
                gradients.append(h.grad)
        if learns:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, gradient):
        (gradient_ND,) = ctx.saved_tensors
        # In fp32: `gradient` is a factor such as 1 / labels, and bf16 would round it by up to 0.4% in every step.
        return (gradient_ND.float() * gradient).to(gradient_ND.dtype), None, None


class Output(ColumnParallelLinear):
    """The projection to the vocabulary, and the loss after it.

    One call of this module computes all chunks of the loss, so ZeRO-3 gathers the weight once. With one call per chunk,
    ranks with different numbers of chunks would wait for each other forever.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False, gather_output=False, init_method=leave_uninitialised)

    def forward(self, h: torch.Tensor, target_N: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., V] (a tensor-parallel rank's part), or with target_N the sum of the rows' cross-entropies."""
        return super().forward(h) if target_N is None else _TokenLoss.apply(h, target_N, self._chunk_loss)

    def _chunk_loss(self, h_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        logits_NV = super().forward(h_ND).float()
        if tensor_parallel_size() == 1:
            return F.cross_entropy(logits_NV, target_N, reduction="sum")
        return vocab_parallel_cross_entropy(logits_NV, target_N).sum()


class Llama(nn.Module):
    """LLaMA. Parameter names are Meta's; adapters are under `layers.N.adapters`."""

    def __init__(
        self,
        config: LlamaConfig,
        adapter: AdapterConfig | None = None,
        storage: Storage = STORAGES["fp32"],
        recomputed_layers: int = 0,
    ):
        super().__init__()
        self.config = config
        # The first layers are recomputed: their backward runs last, when the other layers' activations are freed.
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
        """From embedded tokens to normed hidden states, both [B, T, D].

        modality_MD, modality_B: the modality tokens, and the index of each sample's token; both None if there are none.
        positions: [T] or [B, T]. By default each sample counts from 0, or from 1 after a modality token at 0.
        packed: lengths of the samples that are packed into one row (B = 1). modality_B then has an entry per sample;
        sample_N and place_N are each token's sample and its position in it, and cu_seqlens the start of each sample
        (see packed_attention).
        reads: where a cache holds the start of the sequences; the tokens are appended to the cache.
        """
        B, T, D = x_BTD.shape
        M = 0 if modality_MD is None else len(modality_MD)
        if reads:
            packed, sample_N, place_N = reads.lengths, reads.sequence_N, reads.index_N
        if positions is None:
            positions = (torch.arange(T, device=x_BTD.device) if place_N is None else place_N) + (1 if M else 0)
        rotations = rope_rotations(positions, self.config)
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
                x_ND = checkpoint(block, x_ND, rows, rotations, use_reentrant=False)
            else:
                x_ND = block(x_ND, rows, rotations, index)
        if reads:
            reads.end()
        return self.norm(x_ND[M:]).unflatten(0, (B, T))

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V], with the whole vocabulary on every tensor-parallel rank."""
        return gather_from_model_parallel_region(self.output(h))

    def token_loss(self, h_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """Sum of the labelled rows' cross-entropies in fp32. Logits exist for LOSS_CHUNK rows at a time."""
        return self.output(h_ND, target_N)
