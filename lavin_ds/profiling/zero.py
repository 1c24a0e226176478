"""What DeepSpeed's ZeRO adds to a rank and takes from it, by formula.

From reading deepspeed 0.19.8's stage_1_and_2.py: stages 1 and 2 keep an fp32 copy of the rank's part of the
trainable parameters, its part of the averaged gradients, and a reduction buffer of `reduce_bucket_size`
elements, two with overlap_comm, however few gradients there are. The optimizer's moments are divided over the
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lavin_ds.config import RunConfig
from lavin_ds.training.deepspeed_config import read_deepspeed_config

FP32 = 4  # bytes; the trainable parameters and their gradients
DEFAULT_BUCKET = 500_000_000  # elements, DeepSpeed's own default
WHOLE_BUFFERS = (1, 2)  # stages


@dataclass(frozen=True)
class ZeroShare:
    """optimizer: the fraction of AdamW's moments on this rank; buffers: bytes beside model and gradients."""

    stage: int
    optimizer: float
    buffers: int


def zero_share(config: RunConfig, gpus: int, trainable: int) -> ZeroShare:
    """How ZeRO with the recipe's DeepSpeed configuration divides `trainable` parameters over `gpus` ranks."""
    zero = read_deepspeed_config(config.deepspeed).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in WHOLE_BUFFERS:
        return ZeroShare(stage, 1.0 if stage == 0 else 1 / gpus, 0)
    offloaded = "offload_optimizer" in zero
    part = FP32 * trainable // gpus
    buckets = 2 if zero.get("overlap_comm", False) else 1
    reduction = buckets * FP32 * int(zero.get("reduce_bucket_size", DEFAULT_BUCKET))
    master = 0 if offloaded else part
    return ZeroShare(stage, 0.0 if offloaded else 1 / gpus, master + part + reduction)
