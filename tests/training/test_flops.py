"""The operations of a step are those that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lavin_ds.config import load_recipe
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.profiling.workload import Workload, make_batch
from lavin_ds.training.flops import step_flops

SMALL = [f"model.{k}" for k in ("llm.dim=256", "llm.n_heads=4", "llm.ffn_dim=512", "vision.width=192", "neck.dim=8")]
SMALL += ["model.llm_adapter.dim=2", "model.vision_adapter.dim=2", "model.vision.image_size=64"]


def test_they_are_what_torch_counts_but_for_attention_and_adapters():
    initialize_single_process()
    config = load_recipe("tiny", SMALL)
    torch.manual_seed(0)
    model = Lavin(config.model)
    model.reset_trainable(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.normal_(std=0.02)
    batch = make_batch(config.model, Workload(samples=2, length=64, image_fraction=0.5, labelled_fraction=0.5))
    with FlopCounterMode(display=False) as counter:
        loss, labels = model(batch)
        loss.backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    counted = counter.get_total_flops() - attention
    ours = step_flops(config.model, batch.ids_BT.numel(), labels, images=1)
    assert ours == pytest.approx(counted, rel=0.1)
