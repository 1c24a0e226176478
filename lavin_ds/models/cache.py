"""Keys and values of sequences that are being generated.

Dimensions: N tokens read in one pass, of all B sequences; H query heads, G key/value heads, K head width; S slots,
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
    """Slots for `capacity` tokens each; a slot holds one sequence.

    A tensor-parallel rank holds its share of the key/value heads.
    """

    def __init__(self, config: LlamaConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.slots, self.capacity = slots, capacity
        self.lengths = [0] * slots  # tokens held
        # By layer [G, S, C, K]: a head's tokens lie together, and so do all slots, which a GPU reads as one row.
        shape = (config.kv_heads // tensor_parallel_size(), slots, capacity, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    @staticmethod
    def bytes_needed(config: LlamaConfig, slots: int, capacity: int, dtype: torch.dtype, tensor_parallel: int) -> int:
        """Bytes of a cache on one rank, before it is made."""
        width = config.kv_heads // tensor_parallel * config.head_dim
        return 2 * config.n_layers * slots * capacity * width * dtype.itemsize

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Makes slot `target` hold the first tokens of slot `source`."""
        for tensor in (*self.keys, *self.values):
            tensor[:, target, :tokens] = tensor[:, source, :tokens]
        self.lengths[target] = tokens


class Reads:
    """The tokens that one pass of the model reads: `lengths[b]` more of the sequence in slot `slots[b]`, end to end.

    Each layer writes their keys and values behind those that the slots hold; nothing that is held is moved or copied.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]):
        """The slots ascend, and each has room for what is read."""
        self.cache, self.slots, self.lengths = cache, tuple(slots), tuple(lengths)
        self.held = tuple(cache.lengths[slot] for slot in slots)
        self.totals = tuple(h + n for h, n in zip(self.held, self.lengths, strict=True))  # held once this is read
        slot_N, sequence_N = np.repeat([self.slots, range(len(self.slots))], self.lengths, axis=1)
        index_N = np.concatenate([np.arange(h, h + n) for h, n in zip(self.held, self.lengths, strict=True)])
        device = cache.keys[0].device
        # Each token's slot, its place there, and its sequence's place in `slots`.
        stacked = torch.from_numpy(np.stack([slot_N, index_N, sequence_N]))
        self.slot_N, self.index_N, self.sequence_N = stacked.to(device, non_blocking=True)
        # For varlen_attn: where the queries of each sequence begin, and the keys of its slot among those of all slots.
        bounds = np.zeros((3, len(self.slots) + 1), dtype=np.int32)
        bounds[0, 1:] = np.cumsum(self.lengths)
        bounds[1] = cache.capacity * np.array([*self.slots, cache.slots])
        bounds[2, :-1] = self.totals
        self.cu_seqlens_q, self.cu_seqlens_k, totals = torch.from_numpy(bounds).to(device, non_blocking=True)
        self.totals_B = totals[:-1]

    def attend(self, layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> torch.Tensor:
        """Appends a layer's keys and values, and lets each token attend to its sequence up to itself; [N, H, K]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[:, self.slot_N, self.index_N] = k_NGK.transpose(0, 1)
        values[:, self.slot_N, self.index_N] = v_NGK.transpose(0, 1)
        return cached_attention(q_NHK, keys, values, self)

    def end(self) -> None:
        """Counts the tokens as held, once every layer has appended its own."""
        for slot, total in zip(self.slots, self.totals, strict=True):
            self.cache.lengths[slot] = total
