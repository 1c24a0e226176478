"""The authors' training step, and how much memory and arithmetic each of our savings removes from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from lavin_ds.config import RunConfig
from lavin_ds.devices import OVERHEAD
from lavin_ds.models.lavin import Lavin
from lavin_ds.profiling.layers import from_few_layers, peak_components
from lavin_ds.profiling.published.model import SAVINGS, PublishedOptions, published_model
from lavin_ds.profiling.simulation import COMPONENTS, Simulation, simulate
from lavin_ds.profiling.training_set import TrainingSet
from lavin_ds.profiling.workload import Workload, worst_case

AS_PUBLISHED = {"frozen_dtype": "fp16"}
MEANING = {
    "pad_to": "no padding to full length",
    "eager_attention": "attention fused: no [T, T] scores",
    "full_logits": "logits only where there is a label, in chunks",
    "zero_images": "no ViT for samples without an image",
    "per_sample_routing": "modality tokens once per batch, no mask",
    "separate_paths": "both paths of an adapter in one product",
    "plain_autograd": "norms and activations that keep one tensor",
}


@dataclass(frozen=True)
class Stage:
    """The step with one more saving: the peak of a full micro-batch, the peak and FLOPs of an average one."""

    name: str
    full_bytes: int
    average_bytes: int
    average_flops: int

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class AsPublished:
    """The authors' step on a full micro-batch, and the stages from it to ours."""

    simulation: Simulation
    stages: list[Stage]

    @property
    def with_overhead(self) -> int:
        return self.simulation.peak_bytes + int(OVERHEAD)

    def as_dict(self) -> dict:
        return {
            "peak_bytes": self.simulation.peak_bytes,
            "overhead_bytes": int(OVERHEAD),
            "components": self.simulation.components,
            "stages": [stage.as_dict() for stage in self.stages],
        }


def as_published(config: RunConfig, training_set: TrainingSet) -> AsPublished:
    """Simulates the authors' step of a recipe, then adds our savings one at a time. Takes 1 minute at 7B.

    Their step has an fp16 base, fp32 adapters and 512 positions per sample. It is data-parallel, without ZeRO.
    """
    theirs = _plain(config)
    full = worst_case(theirs)
    average = Workload(
        full.samples,
        round(float(training_set.lengths.mean())),
        training_set.image_fraction if theirs.model.vision else 0.0,
        training_set.labelled_fraction,
    )
    stages, options = [], PublishedOptions(pad_to=full.length)
    stages.append(_stage("the authors' way", theirs, full, average, options))
    for saving in SAVINGS:
        options = options.without(saving)
        stages.append(_stage(MEANING[saving], theirs, full, average, options))
    stages.append(_stage("our code for all of it", theirs, full, average, None))
    return AsPublished(simulate(theirs, full, make=published_model(PublishedOptions(pad_to=full.length))), stages)


def _plain(config: RunConfig) -> RunConfig:
    model = config.model.model_copy(update=AS_PUBLISHED)
    training = config.training.model_copy(update={"activation_checkpointing": False, "packing": False})
    return config.model_copy(update={"model": model, "training": training, "deepspeed": "zero0", "tensor_parallel": 1})


def _stage(name: str, config: RunConfig, full: Workload, average: Workload, options: PublishedOptions | None) -> Stage:
    def measure(simulation: Simulation) -> np.ndarray:
        return np.array([*peak_components(simulation), simulation.flops()])

    make = published_model(options) if options else Lavin
    at_full, at_average = (from_few_layers(config, w, measure, make=make) for w in (full, average))
    n = len(COMPONENTS)
    return Stage(name, int(at_full[:n].sum()), int(at_average[:n].sum()), int(at_average[n]))
