"""Tensor parallelism with real processes: the model on 2 and 4 ranks is the model on one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_helpers import CONFIG, VARIANTS, fill, make_batch, pack
from ranks import in_ranks

from lavin_ds.config import LlamaConfig, ModelConfig
from lavin_ds.data.collate import Batch
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.llama import Llama
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.weights.llama import llama_shapes, load_llama


def splittable(config: ModelConfig) -> ModelConfig:
    """With a key/value head for each of four ranks."""
    return config.model_copy(update={"llm": config.llm.model_copy(update={"n_kv_heads": 4})})


MODELS = {"plain": splittable(CONFIG)} | {kind: splittable(config) for kind, config in VARIANTS.items()}
STORIES = LlamaConfig(dim=64, n_layers=5, n_heads=8, ffn_dim=172, vocab_size=512, norm_eps=1e-5)
BATCH = [(11, 0), (17, -1), (9, 1)]
STEPS = 20


def whole_model(name: str) -> Lavin:
    """What every degree must agree with."""
    return fill(Lavin(MODELS[name]))


def compared(ranks: int) -> list[str]:
    """Adapters lie on every rank whole, but a LoRA's output is cut: four ranks are for that one."""
    return list(MODELS) if ranks == 2 else ["plain", "lora"]


def save(name: str, folder: Path) -> None:
    """The whole model's parameters, its LLaMA as Meta's files too."""
    model = whole_model(name)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "whole.pt")
    llama = {name: model.llm.get_parameter(name).detach() for name in llama_shapes(model.config.llm)}
    torch.save(llama, folder / "consolidated.00.pth")
    (folder / "params.json").write_text('{"dim": 32, "n_heads": 4, "n_layers": 2}')


def load(name: str, folder: Path) -> Lavin:
    """The model on this rank: its slices of the LLaMA, and all of the rest."""
    model = Lavin(MODELS[name])
    load_llama(model.llm, folder)
    whole = torch.load(folder / "whole.pt")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.startswith("llm.") or parameter_name in model.trainable():
                parameter.copy_(whole[parameter_name])
    return model


def losses_and_gradients(model: Lavin, batch: Batch | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total, count = model.eval()(batch or make_batch(BATCH))
    total.backward()
    return total.item() / count, {name: p.grad.clone() for name, p in model.trainable().items()}


def after_training(model: Lavin) -> dict[str, torch.Tensor]:
    """What 20 steps with dropout make of the trainable parameters."""
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)  # dropout: the ranks of a tensor-parallel group must draw alike
        optimizer.zero_grad()
        model(make_batch(BATCH, seed=step))[0].backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.trainable().items()}


def story(folder: Path) -> list[int]:
    model = Llama(STORIES)
    load_llama(model, folder)
    ids = [1]
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model.logits(model(model.embed(torch.tensor([ids])))[0, -1]).argmax()))
    return ids


def work(folder: Path, stories: Path | None) -> None:
    """One rank: loads its slices of the frozen weights, takes the rest whole, and writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    initialize_tensor_parallel(ranks)
    models = {name: load(name, folder / name) for name in compared(ranks)}
    found = {name: losses_and_gradients(model) for name, model in models.items()}
    packed = losses_and_gradients(models["plain"], pack(make_batch(BATCH)))

    # On four ranks one model is enough: what could go apart goes apart on two.
    trained = {name: after_training(models[name]) for name in (("plain", "lora") if ranks == 2 else ("plain",))}
    told = story(stories) if stories else None
    torch.save((found, packed, trained, told), folder / f"rank{rank}of{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one_and_stay_alike(tmp_path, shared, ranks):
    for name in compared(ranks):
        save(name, tmp_path / name)
    stories = shared / "data" / "stories260k"
    in_ranks(ranks, work, tmp_path, stories)

    of_rank = [torch.load(tmp_path / f"rank{rank}of{ranks}.pt") for rank in range(ranks)]
    for name in compared(ranks):
        loss, gradients = losses_and_gradients(whole_model(name))
        for found, packed, _, _ in of_rank:
            for rank_loss, rank_gradients in [found[name], packed] if name == "plain" else [found[name]]:
                assert rank_loss == pytest.approx(loss, rel=1e-5), name
                for parameter, gradient in gradients.items():
                    difference = (rank_gradients[parameter] - gradient).norm()
                    assert difference <= 1e-4 * gradient.norm(), (name, parameter)
    for _, _, trained, told in of_rank:
        for name, parameters in trained.items():
            for parameter, value in parameters.items():
                assert torch.equal(value, of_rank[0][2][name][parameter]), parameter  # the same bits on every rank
        assert told == story(stories)
