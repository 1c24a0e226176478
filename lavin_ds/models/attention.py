"""Causal attention of sequences that lie end to end: packed samples, and sequences that go on from a cache.

On a GPU one call of torch's `varlen_attn` (FlashAttention) serves all sequences. Elsewhere a loop calls
`scaled_dot_product_attention` once for each. The call has not run on a GPU yet (docs/gpu.md).

Dimensions: N tokens of all B sequences, T of one of them; H query heads, G key/value heads, K head width; S slots of a
cache, C tokens that a slot has room for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from lavin_ds.models.cache import Reads

# window_size: all keys on the left, none on the right. The last query of a sequence is aligned with its last key.
CAUSAL = (-1, 0)


def packed_attention(
    q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor, lengths: tuple[int, ...], cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Causal attention within each of several samples that lie end to end: [N, H, K].

    cu_seqlens: the start of each sample and the end of the last one, int32 [B + 1] on the device. `lengths` has the
    same information on the host, which would have to wait for the device to read it there.
    """
    if takes_one_call(q_NHK):
        longest = max(lengths)
        gqa = q_NHK.shape[1] != k_NGK.shape[1]
        return varlen_attn()(
            q_NHK, k_NGK, v_NGK, cu_seqlens, cu_seqlens, longest, longest, window_size=CAUSAL, enable_gqa=gqa
        )
    samples = zip(*(x_NHK.split(lengths) for x_NHK in (q_NHK, k_NGK, v_NGK)), strict=True)
    return torch.cat([_attend(q_THK, k_TGK.transpose(0, 1), v_TGK.transpose(0, 1)) for q_THK, k_TGK, v_TGK in samples])


def cached_attention(q_NHK: torch.Tensor, k_GSCK: torch.Tensor, v_GSCK: torch.Tensor, reads: Reads) -> torch.Tensor:
    """Causal attention of each token to its sequence in the cache, which holds its own key already: [N, H, K]."""
    if takes_one_call(q_NHK):
        # One row has the keys of all R = S * C places. A sequence uses the first ones after the start of its slot.
        # A block_table would need pages of a multiple of 256 tokens, and is wrong if keys are split (pytorch#194167).
        k_RGK, v_RGK = (x_GSCK.flatten(1, 2).transpose(0, 1) for x_GSCK in (k_GSCK, v_GSCK))
        return varlen_attn()(
            q_NHK,
            k_RGK,
            v_RGK,
            reads.cu_seqlens_q,
            reads.cu_seqlens_k,
            max(reads.lengths),
            max(reads.totals),
            window_size=CAUSAL,
            enable_gqa=q_NHK.shape[1] != k_RGK.shape[1],
            seqused_k=reads.totals_B,
        )
    parts = zip(reads.slots, reads.totals, q_NHK.split(reads.lengths), strict=True)
    return torch.cat([_attend(q, k_GSCK[:, slot, :total], v_GSCK[:, slot, :total]) for slot, total, q in parts])


def takes_one_call(q_NHK: torch.Tensor) -> bool:
    """Whether the kernel accepts the queries: half precision, a GPU from Ampere on, and a head width that it has."""
    head_dim = q_NHK.shape[-1]
    return (
        q_NHK.is_cuda
        and q_NHK.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(q_NHK.device) >= (8, 0)
        and varlen_attn() is not None
    )


@cache
def varlen_attn() -> Callable[..., torch.Tensor] | None:
    """torch's function, or None if it has no `seqused_k` (documented from torch 2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn as call  # imports torch._dynamo, which takes seconds

    return call if "seqused_k" in inspect.signature(call).parameters else None


def _attend(q_THK: torch.Tensor, k_GSK: torch.Tensor, v_GSK: torch.Tensor) -> torch.Tensor:
    """Attention of the last T tokens of a sequence of S: query t sees the first S - T + t + 1 tokens."""
    T, H, K = q_THK.shape
    G, S, _ = k_GSK.shape
    if T == 1:
        # The H / G query heads that share a key head become the query rows of that head.
        out = F.scaled_dot_product_attention(q_THK.view(1, G, H // G, K), k_GSK[None], v_GSK[None])
        return out.view(1, H, K)
    # is_causal aligns the first query with the first key, which is right only if T == S.
    mask_TS = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q_THK.device).tril(S - T)
    out = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        k_GSK[None],
        v_GSK[None],
        attn_mask=mask_TS,
        is_causal=T == S,
        enable_gqa=H != G,
    )
    return out.squeeze(0).transpose(0, 1)
