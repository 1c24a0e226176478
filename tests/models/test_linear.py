"""A frozen weight's storage: a new one is a class and an entry in STORAGES, and the model computes the same."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from model_helpers import CONFIG, fill, make_batch

from lavin_ds.config import ModelConfig, RunConfig
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.linear import STORAGES, FrozenColumnLinear, FrozenLinear, FrozenRowLinear, Storage
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.training.engine import build_engine, start_distributed
from lavin_ds.weights.llama import llama_shapes, load_llama

BATCH = [(11, 0), (17, -1), (9, 1)]


class SignAndMagnitude(Storage):
    """A toy: two tensors, one of them not of floats, that hold an fp32 weight exactly."""

    def empty(self, shape):
        return {"magnitude": torch.empty(shape), "sign": torch.empty(shape, dtype=torch.int8)}

    def encode(self, weight_OI):
        return {"magnitude": weight_OI.abs(), "sign": weight_OI.sign().to(torch.int8)}

    def decode(self, shape, magnitude, sign):
        assert magnitude.shape == shape
        return (magnitude * sign).to(self.dtype)


def models() -> tuple[ModelConfig, ModelConfig]:
    """The same model with dense weights and in the toy's storage."""
    STORAGES["toy"] = SignAndMagnitude(torch.float32)
    return CONFIG, CONFIG.model_copy(update={"frozen_dtype": "toy"})


@pytest.fixture(autouse=True)
def _unregister():
    yield
    STORAGES.pop("toy", None)


def write(folder: Path) -> None:
    """The dense model: its LLaMA as Meta's files, and all that is not the LLaMA's own."""
    model = fill(Lavin(CONFIG))
    torch.save(model.state_dict(), folder / "whole.pt")
    llama = {name: model.llm.get_parameter(name).detach() for name in llama_shapes(CONFIG.llm)}
    torch.save(llama, folder / "consolidated.00.pth")
    (folder / "params.json").write_text('{"dim": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}')


def load(config: ModelConfig, folder: Path) -> Lavin:
    model = Lavin(config)
    load_llama(model.llm, folder)
    whole = torch.load(folder / "whole.pt")
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            parameter.copy_(whole[name])
        for name, tensor in whole.items():
            if name.startswith("vision.") and name not in model.trainable():
                owner, _, own = name.rpartition(".")
                module = model.get_submodule(owner)
                if own == "weight" and isinstance(module, FrozenLinear):
                    module.fill(lambda target, tensor=tensor: target.copy_(tensor))
                else:
                    getattr(module, own).copy_(tensor)
    return model.train()


def a_step(model: Lavin) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch, and what one step makes of the trainable parameters."""
    torch.manual_seed(0)  # dropout
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    total, count = model(make_batch(BATCH))
    (total / count).backward()
    optimizer.step()
    return (total / count).item(), {name: p.detach() for name, p in model.trainable().items()}


def same(first, second, rtol: float) -> None:
    assert first[0] == pytest.approx(second[0], rel=rtol)
    torch.testing.assert_close(first[1], second[1], rtol=rtol, atol=1e-6)


def test_a_storage_of_ones_own_loads_and_trains_as_dense_weights_do(tmp_path):
    write(tmp_path)
    dense, toy = (load(config, tmp_path) for config in models())
    layers = [m for m in toy.modules() if isinstance(m, (FrozenLinear, FrozenColumnLinear, FrozenRowLinear))]
    assert len(layers) == 2 * 7 + 2 * 4  # projections of the LLaMA, and of the ViT
    assert all(set(dict(layer.named_parameters())) >= {"magnitude", "sign"} for layer in layers)
    assert not any(hasattr(layer, "weight") for layer in layers)
    same(a_step(toy), a_step(dense), rtol=1e-6)


def test_what_is_stored_keeps_no_decoded_weight_for_the_backward_pass():
    layer = FrozenColumnLinear(64, 64, SignAndMagnitude(torch.float32))
    layer.fill(lambda target: target.normal_())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {layer.magnitude.data_ptr(), layer.sign.data_ptr()}


def work(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    initialize_tensor_parallel(ranks)
    torch.save([a_step(load(config, folder)) for config in models()], folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_storage_of_ones_own_is_sliced_over_two_tensor_parallel_ranks(tmp_path):
    write(tmp_path)
    whole = a_step(load(CONFIG, tmp_path))
    torch.multiprocessing.spawn(work, (2, tmp_path), nprocs=2)
    for rank in range(2):
        dense, toy = torch.load(tmp_path / f"rank{rank}.pt")
        same(toy, dense, rtol=1e-6)
        same(toy, whole, rtol=1e-4)  # ranks add up in another order, and AdamW magnifies it


def work_zero3(rank: int, folder: Path) -> None:
    start_distributed()
    initialize_tensor_parallel(1)
    found = []
    for config in models():
        model = load(config, folder)
        training = {"global_batch": 1, "micro_batch": 1, "weight_decay": 0.0, "betas": (0.9, 0.999)}
        raw = {"name": "toy", "model": CONFIG, "training": training, "deepspeed": str(folder / "zero3.json")}
        engine = build_engine(model, RunConfig.model_validate(raw))
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        torch.manual_seed(0)
        total, count = engine(make_batch(BATCH))
        engine.backward(total / count)
        engine.step()
        trainable = model.trainable()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(hasattr(p, "ds_id") for p in frozen)  # sharded, int8 ones too
        with deepspeed.zero.GatheredParameters(list(trainable.values())):
            found.append(((total / count).item(), {name: p.detach().clone() for name, p in trainable.items()}))
    torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_storage_of_ones_own_is_sharded_and_gathered_by_zero_3(tmp_path):
    write(tmp_path)
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": settings}))
    torch.multiprocessing.spawn(work_zero3, (tmp_path,), nprocs=1)
    dense, toy = torch.load(tmp_path / "found.pt")
    same(toy, dense, rtol=1e-6)
