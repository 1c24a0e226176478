"""Tensor parallelism with real processes: the model on 2 and 4 ranks is the model on one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_helpers import CONFIG, fill, make_batch, pack

from lavin_ds.config import LlamaConfig
from lavin_ds.data.collate import Batch
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.llama import Llama
from lavin_ds.parallel import initialize_tensor_parallel
from lavin_ds.weights.llama import llama_shapes, load_llama

MODEL = CONFIG.model_copy(update={"llm": CONFIG.llm.model_copy(update={"n_kv_heads": 4})})
STORIES = LlamaConfig(dim=64, n_layers=5, n_heads=8, ffn_dim=172, vocab_size=512, norm_eps=1e-5)
BATCH = [(11, 0), (17, -1), (9, 1)]
STEPS = 20


def whole_model() -> Lavin:
    """What every degree must agree with."""
    return fill(Lavin(MODEL))


def save_meta(model: Lavin, folder: Path) -> None:
    names = llama_shapes(MODEL.llm)
    torch.save({name: model.llm.get_parameter(name).detach() for name in names}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text('{"dim": 32, "n_heads": 4, "n_layers": 2}')


def losses_and_gradients(model: Lavin, batch: Batch | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total, count = model.eval()(batch or make_batch(BATCH))
    total.backward()
    return total.item() / count, {name: p.grad.clone() for name, p in model.trainable().items()}


def story(folder: Path) -> list[int]:
    model = Llama(STORIES)
    load_llama(model, folder)
    ids = [1]
    with torch.no_grad():
        for _ in range(40):
            ids.append(int(model.logits(model(model.embed(torch.tensor([ids])))[0, -1]).argmax()))
    return ids


def work(rank: int, ranks: int, folder: Path, stories: Path | None) -> None:
    """One rank: loads its slices of the frozen weights, takes the rest whole, and writes what it found."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    initialize_tensor_parallel(ranks)
    model = Lavin(MODEL)
    load_llama(model.llm, folder)
    whole = torch.load(folder / "whole.pt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("llm.") or name in model.trainable():
                parameter.copy_(whole[name])
    loss, gradients = losses_and_gradients(model)
    packed = losses_and_gradients(model, pack(make_batch(BATCH)))

    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)  # dropout: the ranks of a tensor-parallel group must draw alike
        optimizer.zero_grad()
        model(make_batch(BATCH, seed=step))[0].backward()
        optimizer.step()
    trained = {name: p.detach() for name, p in model.trainable().items()}
    told = story(stories) if stories else None
    torch.save((loss, gradients, packed, trained, told), folder / f"rank{rank}of{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one_and_stay_alike(tmp_path, shared, ranks):
    model = whole_model()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    save_meta(model, tmp_path)
    loss, gradients = losses_and_gradients(model)
    stories = shared / "data" / "stories260k"
    torch.multiprocessing.spawn(work, (ranks, tmp_path, stories), nprocs=ranks)

    found = [torch.load(tmp_path / f"rank{rank}of{ranks}.pt") for rank in range(ranks)]
    for rank_loss, rank_gradients, (packed_loss, packed_gradients), trained, told in found:
        assert rank_loss == pytest.approx(loss, rel=1e-5) == packed_loss
        for name, gradient in gradients.items():
            for found_gradient in (rank_gradients[name], packed_gradients[name]):
                assert (found_gradient - gradient).norm() <= 1e-4 * gradient.norm(), name
            assert torch.equal(trained[name], found[0][3][name]), name  # replicated: the same bits on every rank
        assert told == story(stories)
