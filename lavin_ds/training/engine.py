"""Builds the DeepSpeed engine around LaVIN: process groups, ZeRO configuration, optimizer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from lavin_ds.config import RunConfig, TrainingConfig
from lavin_ds.data.sampler import micro_batches
from lavin_ds.errors import UserError
from lavin_ds.machine import free_port
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import TensorParallelUnit, data_parallel_size
from lavin_ds.training.deepspeed_config import read_deepspeed_config
from lavin_ds.training.replicas import average_gradients

FILE_MONITORS = ("tensorboard", "csv_monitor")


def start_distributed() -> torch.device:
    """Joins the launcher's process group, or makes a world of one if there is none. Returns the rank's device."""
    # DeepSpeed calls these in every step, and a user cannot change that.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated")
    accelerator = get_accelerator()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory collective, which takes a minute and 66 MiB of disk per rank.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"Port {os.environ['MASTER_PORT']} of this machine is in use, perhaps by another run. Start again; with "
            "`deepspeed`, give another --master_port."
        ) from None
    return torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))


def parameter_groups(model: Lavin, training: TrainingConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices, but not for vectors such as biases (paper 1, section 4.2; reference.md, section 6)."""
    trainable = model.trainable().values()
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: Lavin, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with learning rate 0: the loop sets the rate before every step."""
    return torch.optim.AdamW(parameter_groups(model, training), lr=0.0, betas=training.betas, eps=training.eps)


def build_engine(model: Lavin, config: RunConfig, monitors: Path | None = None) -> deepspeed.DeepSpeedEngine:
    """Wraps the model in DeepSpeed's engine. Call it after `start_distributed` and `initialize_tensor_parallel`.

    monitors: folder for the files of monitors, if the DeepSpeed configuration does not name one.
    """
    training = config.training
    accumulation = micro_batches(training.global_batch, data_parallel_size(), training.micro_batch)
    ds_config = read_deepspeed_config(config.deepspeed) | {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.grad_clip or 0.0,
        "zero_allow_untested_optimizer": True,
    }
    for monitor in FILE_MONITORS:
        if monitors and ds_config.get(monitor, {}).get("enabled"):
            ds_config[monitor] = {"output_path": str(monitors), "job_name": ""} | ds_config[monitor]
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, training), config=ds_config, mpu=TensorParallelUnit
    )
    for name, parameter in engine.module.named_parameters():
        if parameter.dtype != dtypes[name]:
            raise RuntimeError(f"DeepSpeed turned {name} from {dtypes[name]} into {parameter.dtype}")
    average_gradients(engine.module.trainable().values())
    return engine
