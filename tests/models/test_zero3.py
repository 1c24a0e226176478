"""Every kind of adapter under ZeRO-3: parameters that live in other modules than use them would not be there."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed
import torch
from model_helpers import VARIANTS, fill, make_batch
from ranks import in_ranks

from lavin_ds.config import RunConfig
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.training.engine import build_engine, start_distributed

BATCHES = [[(11, 0), (8, -1)], [(9, -1), (12, -1)]]  # the second without an image


def train(model: Lavin, backward, step) -> list[torch.Tensor]:
    losses = []
    for rows in BATCHES:
        total, count = model(make_batch(rows))
        losses.append((total / count).detach())
        backward(total / count)
        step()
    return losses


def work(folder: Path) -> None:
    """Trains each model as it is and under the engine, and writes both curves."""
    start_distributed()
    initialize_tensor_parallel(1)
    curves = {}
    for kind, model in VARIANTS.items():
        plain = fill(Lavin(model)).eval()
        optimizer = torch.optim.AdamW(plain.trainable().values(), lr=1e-2, weight_decay=0.0)

        def step(optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        want = train(plain, torch.Tensor.backward, step)
        training = {"global_batch": 1, "micro_batch": 1, "weight_decay": 0.0, "betas": (0.9, 0.999)}
        raw = {"name": kind, "model": model, "training": training, "deepspeed": str(folder / "zero3.json")}
        engine = build_engine(fill(Lavin(model)), RunConfig.model_validate(raw))
        engine.eval()
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        got = train(engine, engine.backward, engine.step)
        trainable = engine.module.trainable()
        with deepspeed.zero.GatheredParameters(list(trainable.values())):
            apart = {name: (trainable[name] - p).norm() / p.norm() for name, p in plain.trainable().items()}
        curves[kind] = (got, want, max(apart.values()), all(hasattr(p, "ds_id") for p in engine.module.parameters()))
    torch.save(curves, folder / "curves.pt")
    torch.distributed.destroy_process_group()


def test_every_kind_of_adapter_trains_under_zero_3_as_without(tmp_path):
    # Threshold 0: also parameters as small as these are split, and gathered only while their module runs.
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": settings}))
    in_ranks(1, work, tmp_path)
    curves = torch.load(tmp_path / "curves.pt")
    assert set(curves) == set(VARIANTS)
    for kind, (got, want, apart, sharded) in curves.items():
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0, msg=kind)
        # AdamW magnifies rounding where a gradient is nearly zero; its two steps move a parameter by some percent.
        assert apart < 1e-3 and sharded, kind
