"""The key/value cache for generation, and attention over it.

Dimensions: N tokens of all sequences that one pass reads, T tokens of one sequence, H query heads, G key/value heads,
K head width, S tokens that the slot of a sequence holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from lavin_ds.config import LlamaConfig
from lavin_ds.parallel import tensor_parallel_size


class KVCache:
    """`slots` slots of `capacity` tokens. A slot holds one sequence.

    A tensor-parallel rank holds only its own key/value heads.
    """

    def __init__(self, config: LlamaConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.slots, self.capacity = slots, capacity
        self.lengths = [0] * slots  # tokens that each slot holds
        shape = (slots, config.kv_heads // tensor_parallel_size(), capacity, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    @staticmethod
    def bytes_needed(config: LlamaConfig, slots: int, capacity: int, dtype: torch.dtype, tensor_parallel: int) -> int:
        """Bytes that such a cache would take on one rank."""
        width = config.kv_heads // tensor_parallel * config.head_dim
        return 2 * config.n_layers * slots * capacity * width * dtype.itemsize

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` tokens of slot `source` to slot `target`."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :tokens] = tensor[source, :, :tokens]
        self.lengths[target] = tokens


class Reads:
    """The tokens that one pass of the model reads: the next `lengths[b]` tokens of the sequence in slot `slots[b]`.

    The sequences lie end to end. Each layer appends their keys and values to the slots; nothing in a slot is moved.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]):
        """Each slot may appear only once, and must have room for its new tokens."""
        self.cache, self.slots, self.lengths = cache, tuple(slots), tuple(lengths)
        self.held = tuple(cache.lengths[slot] for slot in slots)
        slot_N, sequence_N = np.repeat([self.slots, range(len(self.slots))], self.lengths, axis=1)
        index_N = np.concatenate([np.arange(h, h + n) for h, n in zip(self.held, self.lengths, strict=True)])
        device = cache.keys[0].device
        # For each token: its slot, its position in the slot, and the index of its sequence in `slots`.
        stacked = torch.from_numpy(np.stack([slot_N, index_N, sequence_N]))
        self.slot_N, self.index_N, self.sequence_N = stacked.to(device, non_blocking=True)

    def attend(self, layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> torch.Tensor:
        """Appends a layer's keys and values, and returns the causal attention of each token to its sequence: [N, H, K].

        There is one attention call per sequence, over the tokens that its slot holds.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slot_N, :, self.index_N] = k_NGK
        values[self.slot_N, :, self.index_N] = v_NGK
        attended = []
        for slot, held, q_THK in zip(self.slots, self.held, q_NHK.split(self.lengths), strict=True):
            total = held + len(q_THK)
            attended.append(_attend(q_THK, keys[slot, :, :total], values[slot, :, :total]))
        return torch.cat(attended)

    def end(self) -> None:
        """Adds the new tokens to the slots' lengths. Call it after the last layer."""
        for slot, held, length in zip(self.slots, self.held, self.lengths, strict=True):
            self.cache.lengths[slot] = held + length


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
    return out[0].transpose(0, 1)
