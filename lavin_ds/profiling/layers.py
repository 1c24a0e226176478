"""Figures of a whole model's step, extrapolated from models with a few layers. Much faster than simulating all of it.

All LLaMA layers do the same work. So do all parts of the ViT: a part is the blocks between two read-outs, or one block
if only one is read. So a sum over operators is linear in the number of layers and in the number of parts. So is the
memory held at a given moment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from lavin_ds.config import ModelConfig, RunConfig
from lavin_ds.models.lavin import Lavin
from lavin_ds.profiling.simulation import COMPONENTS, Simulation, simulate
from lavin_ds.profiling.workload import Workload

BASE = (2, 1)  # LLaMA layers and ViT parts of the smallest model


def from_few_layers(
    config: RunConfig,
    workload: Workload,
    measure: Callable[[Simulation], np.ndarray],
    gpus: int = 1,
    make: Callable[..., Lavin] = Lavin,
) -> np.ndarray:
    """`measure` of the whole model's step. It must be linear in the numbers of layers, parts and recomputed layers."""
    recomputed = config.training.activation_checkpointing
    if type(recomputed) is int:
        few, everything = (
            from_few_layers(_recomputing(config, value), workload, measure, gpus, make) for value in ("vision", True)
        )
        return few + (everything - few) * recomputed / config.model.llm.n_layers

    def at(layers: int, parts: int) -> np.ndarray:
        return measure(_simulated(with_parts(config, layers, parts), workload, gpus, make))

    layers, parts = config.model.llm.n_layers, parts_of(config.model)
    if layers < BASE[0]:
        return measure(simulate(config, workload, gpus, make))
    base = at(*BASE)
    total = base
    if layers > BASE[0]:
        total = total + (layers - BASE[0]) * (at(BASE[0] + 1, BASE[1]) - base)
    if parts > BASE[1]:
        total = total + (parts - BASE[1]) * (at(BASE[0], BASE[1] + 1) - base)
    return total


@lru_cache(maxsize=64)
def _simulated(config: RunConfig, workload: Workload, gpus: int, make: Callable[..., Lavin]) -> Simulation:
    """A step of a small model. Cached, because a search asks for the same one many times."""
    return simulate(config, workload, gpus, make)


def peak_components(simulation: Simulation) -> np.ndarray:
    """Bytes by component at the step's peak, for `from_few_layers`.

    The extrapolation is too low if small and large models peak at different moments. A caller that depends on it must
    also simulate the whole model.
    """
    return np.array([simulation.components[name] for name in COMPONENTS], dtype=float)


def parts_of(model: ModelConfig) -> int:
    """Number of equal parts of the ViT; 0 if the recipe does not run a ViT."""
    if not model.has_vit:
        return 0
    return model.vision.depth // (model.vision.readout.every or 1)


def with_parts(config: RunConfig, layers: int, parts: int) -> RunConfig:
    """The recipe with `layers` LLaMA layers and, if it runs a ViT, only `parts` parts of it."""
    model = config.model
    update = {"llm": model.llm.model_copy(update={"n_layers": layers})}
    if model.has_vit:
        readout = model.vision.readout
        shorter = {"layers": parts * (readout.every or 1)}
        if readout.block:
            shorter["readout"] = readout.model_copy(update={"block": parts})
        update["vision"] = model.vision.model_copy(update=shorter)
    return config.model_copy(update={"model": model.model_copy(update=update)})


def _recomputing(config: RunConfig, value: bool | str) -> RunConfig:
    training = config.training.model_copy(update={"activation_checkpointing": value})
    return config.model_copy(update={"training": training})
