"""Chooses the next token of many requests at once. Each request has its own settings and random numbers.

Dimensions: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lavin_ds.generation.request import Sampling


def choose(logits_BV: torch.Tensor, settings: Sequence[Sampling], uniform: Sequence[float]) -> torch.Tensor:
    """One id per request [B]; `uniform` has a number in [0, 1) for each.

    The likeliest tokens are kept until top_p or top_k is reached. `uniform` picks one of them in proportion to its
    probability, so the same number picks the same token in any batch.
    """
    greedy_B = logits_BV.argmax(-1)
    drawn = [b for b, setting in enumerate(settings) if setting.temperature > 0]
    if not drawn:
        return greedy_B
    device = logits_BV.device
    column = [(settings[b].temperature, settings[b].top_p, settings[b].top_k, uniform[b]) for b in drawn]
    temperature_B, top_p_B, top_k_B, uniform_B = torch.tensor(column, dtype=torch.float32).to(device).unbind(1)
    row_B = torch.tensor(drawn).to(device)
    probability_BV = torch.softmax(logits_BV[row_B].float() / temperature_B[:, None], -1)
    probability_BV, order_BV = probability_BV.sort(descending=True, stable=True)
    cumulative_BV = probability_BV.cumsum(-1)
    kept_B = (cumulative_BV - probability_BV < top_p_B[:, None]).sum(-1)  # always 1 or more
    kept_B = torch.where(top_k_B > 0, torch.minimum(kept_B, top_k_B.long()), kept_B)
    mass_B = cumulative_BV.gather(1, kept_B[:, None] - 1)[:, 0]
    rank_B = (cumulative_BV <= (uniform_B * mass_B)[:, None]).sum(-1)
    rank_B = torch.minimum(rank_B, kept_B - 1)  # uniform * mass can round up to mass
    return greedy_B.index_copy(0, row_B, order_BV.gather(1, rank_B[:, None])[:, 0])
