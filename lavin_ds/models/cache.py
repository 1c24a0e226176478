"""The key/value cache for generation.

Dimensions: N tokens of all B sequences that one pass reads, H query heads, G key/value heads, K head width, S slots,
C tokens that a slot has room for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lavin_ds.config import LlamaConfig
from lavin_ds.models.attention import cached_attention
from lavin_ds.parallel import tensor_parallel_size


class KVCache:
    """`slots` slots of `capacity` tokens. A slot holds one sequence.

    A tensor-parallel rank holds only its own key/value heads.
    """

    def __init__(self, config: LlamaConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.slots, self.capacity = slots, capacity
        self.lengths = [0] * slots  # tokens that each slot holds
        # [G, S, C, K] per layer: the slots of a head are contiguous, so a GPU reads all slots as one row of keys.
        shape = (config.kv_heads // tensor_parallel_size(), slots, capacity, config.head_dim)
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
            tensor[:, target, :tokens] = tensor[:, source, :tokens]
        self.lengths[target] = tokens


class Reads:
    """The tokens that one pass of the model reads: the next `lengths[b]` tokens of the sequence in slot `slots[b]`.

    The sequences lie end to end. Each layer appends their keys and values to the slots; nothing in a slot is moved.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]):
        """The slots must be in ascending order, each once, with room for its new tokens."""
        self.cache, self.slots, self.lengths = cache, tuple(slots), tuple(lengths)
        self.held = tuple(cache.lengths[slot] for slot in slots)
        self.totals = tuple(h + n for h, n in zip(self.held, self.lengths, strict=True))  # with the new tokens
        slot_N, sequence_N = np.repeat([self.slots, range(len(self.slots))], self.lengths, axis=1)
        index_N = np.concatenate([np.arange(h, h + n) for h, n in zip(self.held, self.lengths, strict=True)])
        device = cache.keys[0].device
        # For each token: its slot, its position in the slot, and the index of its sequence in `slots`.
        stacked = torch.from_numpy(np.stack([slot_N, index_N, sequence_N]))
        self.slot_N, self.index_N, self.sequence_N = stacked.to(device, non_blocking=True)
        # For varlen_attn: where each sequence's queries begin, and where its slot begins in the row of all slots.
        bounds = np.zeros((3, len(self.slots) + 1), dtype=np.int32)
        bounds[0, 1:] = np.cumsum(self.lengths)
        bounds[1] = cache.capacity * np.array([*self.slots, cache.slots])
        bounds[2, :-1] = self.totals
        self.cu_seqlens_q, self.cu_seqlens_k, totals = torch.from_numpy(bounds).to(device, non_blocking=True)
        self.totals_B = totals[:-1]

    def attend(self, layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> torch.Tensor:
        """Appends a layer's keys and values; returns the causal attention of each token to its sequence, [N, H, K]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[:, self.slot_N, self.index_N] = k_NGK.transpose(0, 1)
        values[:, self.slot_N, self.index_N] = v_NGK.transpose(0, 1)
        return cached_attention(q_NHK, keys, values, self)

    def end(self) -> None:
        """Adds the new tokens to the slots' lengths. Call it after the last layer."""
        for slot, total in zip(self.slots, self.totals, strict=True):
            self.cache.lengths[slot] = total
