"""Keys and values of sequences that are being generated, and attention over them.

Dimensions: N tokens read in one pass, of all sequences; T of one sequence; H query heads, G key/value heads, K head
width, S tokens that a sequence's slot holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from lavin_ds.config import LlamaConfig
from lavin_ds.parallel import tensor_parallel_size


class KVCache:
    """Slots for `capacity` tokens each; a slot holds one sequence.

    A tensor-parallel rank holds its share of the key/value heads.
    """

    def __init__(self, config: LlamaConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.slots, self.capacity = slots, capacity
        self.lengths = [0] * slots  # tokens held
        shape = (slots, config.kv_heads // tensor_parallel_size(), capacity, config.head_dim)
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
            tensor[target, :, :tokens] = tensor[source, :, :tokens]
        self.lengths[target] = tokens


class Reads:
    """The tokens that one pass of the model reads: `lengths[b]` more of the sequence in slot `slots[b]`, end to end.

    Each layer writes their keys and values behind those that the slots hold; nothing that is held is moved or copied.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]):
        """Each slot is named once, and has room for what is read."""
        self.cache, self.slots, self.lengths = cache, tuple(slots), tuple(lengths)
        self.held = tuple(cache.lengths[slot] for slot in slots)
        slot_N, sequence_N = np.repeat([self.slots, range(len(self.slots))], self.lengths, axis=1)
        index_N = np.concatenate([np.arange(h, h + n) for h, n in zip(self.held, self.lengths, strict=True)])
        device = cache.keys[0].device
        # Each token's slot, its place there, and its sequence's place in `slots`.
        stacked = torch.from_numpy(np.stack([slot_N, index_N, sequence_N]))
        self.slot_N, self.index_N, self.sequence_N = stacked.to(device, non_blocking=True)

    def attend(self, layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> torch.Tensor:
        """Appends a layer's keys and values, and lets each token attend to its sequence up to itself; [N, H, K].

        One product per sequence, over what its slot holds and no more.
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
        """Counts the tokens as held, once every layer has appended its own."""
        for slot, held, length in zip(self.slots, self.held, self.lengths, strict=True):
            self.cache.lengths[slot] = held + length


def _attend(q_THK: torch.Tensor, k_GSK: torch.Tensor, v_GSK: torch.Tensor) -> torch.Tensor:
    """Attention of the last T of a sequence's S tokens: token t sees the first S - T + t + 1."""
    T, H, K = q_THK.shape
    G, S, _ = k_GSK.shape
    if T == 1:
        # The H / G query heads that share a key head are the rows of one product with it.
        out = F.scaled_dot_product_attention(q_THK.view(1, G, H // G, K), k_GSK[None], v_GSK[None])
        return out.view(1, H, K)
    # is_causal lines up the first query with the first key, which is right only where all S are queries.
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
