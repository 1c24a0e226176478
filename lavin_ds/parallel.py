"""Process groups for tensor and data parallelism.

Ranks are ordered as in fairscale: the ranks of a tensor-parallel group are neighbours, so ranks 0..tp-1 hold one model.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups

from lavin_ds.config import check_world


def initialize_single_process() -> None:
    """Makes this process a world of one, for work without a launcher (evaluation, profiling, tests).

    fairscale's layers need process groups even if nothing is split.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_tensor_parallel(1)


def initialize_tensor_parallel(degree: int) -> None:
    """Splits the initialised world into tensor-parallel groups of `degree` ranks."""
    check_world(dist.get_world_size(), degree)
    if not groups.model_parallel_is_initialized():
        backend = dist.get_backend()
        with redirect_stdout(io.StringIO()):  # fairscale prints three lines, which would break --json
            groups.initialize_model_parallel(degree, model_parallel_backend=backend, ddp_backend=backend)


class TensorParallelUnit:
    """The `mpu` object that DeepSpeed expects: fairscale's groups under every name that DeepSpeed uses."""

    get_model_parallel_rank = staticmethod(groups.get_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(groups.get_model_parallel_world_size)
    get_model_parallel_group = staticmethod(groups.get_model_parallel_group)
    get_data_parallel_rank = staticmethod(groups.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(groups.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(groups.get_data_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(groups.get_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(groups.get_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(groups.get_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(groups.get_model_parallel_src_rank)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        return dist.get_process_group_ranks(groups.get_data_parallel_group())


def tensor_parallel_rank() -> int:
    return groups.get_model_parallel_rank()


def tensor_parallel_size() -> int:
    return groups.get_model_parallel_world_size()


def data_parallel_rank() -> int:
    return groups.get_data_parallel_rank()


def data_parallel_size() -> int:
    return groups.get_data_parallel_world_size()
