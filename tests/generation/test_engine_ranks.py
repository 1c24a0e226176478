"""The generation engine on two tensor-parallel ranks, with real processes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from generation_helpers import CONFIG, Letters, is_greedy, random_requests, small_lavin
from ranks import in_ranks

from lavin_ds.generation.engine import Engine
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.linear import held_part
from lavin_ds.parallel import initialize_single_process, initialize_tensor_parallel

REQUESTS = 300


def answer_on_a_rank(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    initialize_tensor_parallel(2)
    whole = torch.load(folder / "whole.pt")
    model = Lavin(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            shape = whole[name].shape
            part = held_part(owner, shape) if name.endswith(".weight") else ...
            parameter.copy_(whole[name][part])
    engine = Engine(model, Letters(), slots=7, capacity=80)
    answers = {answer.id: (answer.ids, answer.finish) for answer in engine.run(random_requests(REQUESTS))}
    torch.save(answers, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_tensor_parallel_ranks_answer_as_the_whole_model(tmp_path):
    initialize_single_process()
    model = small_lavin()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    in_ranks(2, answer_on_a_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert first == second
    answers = {
        answer.id: answer for answer in Engine(model, Letters(), slots=5, capacity=80).run(random_requests(REQUESTS))
    }
    assert first == {id: (answer.ids, answer.finish) for id, answer in answers.items()}
    assert all(is_greedy(model, request, answers[request.id]) for request in random_requests(20))
