"""The fastest setting of a recipe that fits a card, and the command that trains it.

The search covers micro-batch, activation checkpointing, tensor parallelism over the GPUs, cached features instead of a
ViT that is not trained, and half precision for an fp32 base. It does not cover ZeRO stages. Stages 1 and 2 divide only
0.06 GB at 13B. Stage 3 does not help a small card: DeepSpeed moves the whole model to every GPU before it divides it.
Tensor parallelism loads slices instead.

For each micro-batch, the fastest setting is the one that fits with the least recomputation. Its memory and time are
extrapolated from models of a few layers. The best setting is then simulated at full size.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lavin_ds.config import Checkpointing, RunConfig, parse_config
from lavin_ds.devices import GPUS_PER_NODE, OVERHEAD, Device
from lavin_ds.errors import UserError
from lavin_ds.profiling.layers import from_few_layers, peak_components
from lavin_ds.profiling.simulation import COMPONENTS, simulate
from lavin_ds.profiling.step_time import TimeEstimate, estimate
from lavin_ds.profiling.training_set import TrainingSet
from lavin_ds.profiling.workload import worst_case

MICRO_BATCHES = (1, 2, 4, 8)
# Among settings within this factor of the fastest, the search takes the one with the most samples per micro-batch. It
# starts fewer kernels, which the roofline does not count.
ALIKE = 1.1
FROZEN = list(COMPONENTS).index("frozen")


@dataclass(frozen=True)
class Setting:
    """Changes to a recipe as `key=value`, and their effect. peak_bytes counts only tensors, without OVERHEAD."""

    changes: tuple[str, ...]
    config: RunConfig
    peak_bytes: int
    weights_bytes: int = 0  # frozen weights, part of peak_bytes
    time: TimeEstimate | None = None

    def as_dict(self) -> dict:
        return {
            "changes": list(self.changes),
            "peak_bytes": self.peak_bytes,
            "time": self.time.as_dict() if self.time else None,
        }


@dataclass(frozen=True)
class Fit:
    """The fastest setting that fits, if there is one, and the setting that needs the least memory."""

    best: Setting | None
    smallest: Setting
    limit_bytes: int  # of the card
    tried: int
    overhead_bytes: int = int(OVERHEAD)

    @property
    def weights_bytes(self) -> int:
        """Frozen weights on one GPU in the smallest setting."""
        return self.smallest.weights_bytes

    def command(self, recipe: str, gpus: int, overrides: list[str] = ()) -> str | None:
        """The command that trains the best setting. Its paths are placeholders."""
        if self.best is None:
            return None
        clip = ["--clip", "ViT-L-14.pt"] if self.best.config.model.has_vit else []
        words = ["lavin-ds", "train", "--recipe", recipe, "--data", "shards", "--llama", "llama", *clip]
        ranks = ["--ranks", str(gpus)] if gpus <= GPUS_PER_NODE else ["--hostfile", "hostfile"]
        return shlex.join([*words, "--out", f"runs/{Path(recipe).stem}", *ranks, *overrides, *self.best.changes])

    def as_dict(self) -> dict:
        return {
            "limit_bytes": self.limit_bytes,
            "overhead_bytes": self.overhead_bytes,
            "tried": self.tried,
            "best": self.best.as_dict() if self.best else None,
            "smallest": self.smallest.as_dict(),
        }


def find_fit(
    config: RunConfig,
    limit_bytes: int,
    device: Device,
    gpus: int,
    training_set: TrainingSet,
    efficiency: float,
    say: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Searches with models of a few layers, then simulates the best as a whole. Half a minute at 7B.

    Raises:
        UserError: no number of ranks that `gpus` allows can train the recipe's global batch.
    """
    best = smallest = None
    tried = 0
    for degree in _degrees(config, gpus):
        search = _Search(_base(config, degree), limit_bytes - OVERHEAD, device, gpus, training_set, efficiency, say)
        found, least = search.fastest(), search.setting(1, True)
        tried += len(search.tried)
        if smallest is None or least.peak_bytes < smallest.peak_bytes:
            smallest = least
        if found and (best is None or found.time.hours < best.time.hours):
            best = found
        if best and not best.config.training.activation_checkpointing:
            break  # more tensor parallelism only adds communication
    if smallest is None:
        raise UserError(f"{gpus} GPUs cannot share training.global_batch {config.training.global_batch}.")
    return Fit(best, smallest, limit_bytes, tried)


class _Search:
    """The settings of one tensor-parallel degree."""

    def __init__(
        self,
        base: Setting,
        room: float,
        device: Device,
        gpus: int,
        training_set: TrainingSet,
        efficiency: float,
        say: Callable[[str], None],
    ):
        self.base, self.room, self.device, self.gpus = base, room, device, gpus
        self.training_set, self.efficiency, self.say = training_set, efficiency, say
        self.tried: dict[tuple[int, Checkpointing], Setting] = {}

    def fastest(self) -> Setting | None:
        """The fastest setting that fits, checked at full size. None if nothing fits."""
        training = self.base.config.training
        most = math.ceil(training.global_batch * self.base.config.tensor_parallel / self.gpus)
        fitting = [self._least_recomputed(samples) for samples in MICRO_BATCHES if samples <= most]
        timed = [self._timed(setting) for setting in fitting if setting]
        while timed:
            quickest = min(setting.time.hours for setting in timed)
            chosen = [setting for setting in timed if setting.time.hours <= ALIKE * quickest][-1]  # the most samples
            peak = simulate(chosen.config, worst_case(chosen.config, self.gpus), self.gpus).peak_bytes
            if peak <= self.room:
                return replace(chosen, peak_bytes=peak)
            timed.remove(chosen)
        return None

    def _least_recomputed(self, samples: int) -> Setting | None:
        """Of the settings with that many samples, the one that fits and recomputes the least. None if none fits."""
        config = self.base.config
        few = "vision" if config.model.has_vit else False  # the next setting recomputes single LLaMA layers
        for value in dict.fromkeys((False, few)):
            if (setting := self.setting(samples, value)).peak_bytes <= self.room:
                return setting
        kept, recomputed = setting.peak_bytes, self.setting(samples, True).peak_bytes
        if recomputed > self.room:
            return None
        # Each recomputed layer saves the same. One is added because recomputing a layer needs memory itself.
        layers = math.ceil((kept - self.room) / (kept - recomputed) * config.model.llm.n_layers) + 1
        if layers < config.model.llm.n_layers and self.setting(samples, layers).peak_bytes <= self.room:
            return self.setting(samples, layers)
        return self.setting(samples, True)

    def _timed(self, setting: Setting) -> Setting:
        time = estimate(setting.config, self.training_set, self.device, self.gpus, self.efficiency)
        return replace(setting, time=time)

    def setting(self, samples: int, value: Checkpointing) -> Setting:
        """A setting with its memory, extrapolated."""
        if (samples, value) not in self.tried:
            held = self._held(samples, value)
            setting = replace(
                self._changed(samples, value), peak_bytes=int(held.sum()), weights_bytes=int(held[FROZEN])
            )
            self.say(f"{' '.join(setting.changes)}: {setting.peak_bytes / 1e9:.1f} GB")
            self.tried[samples, value] = setting
        return self.tried[samples, value]

    def _held(self, samples: int, value: Checkpointing) -> np.ndarray:
        """Bytes by component at the peak. They are linear in the number of samples, so most are interpolated."""

        def at(n: int) -> np.ndarray:
            config = self._changed(n, value).config
            workload = replace(worst_case(config), samples=n)
            return from_few_layers(config, workload, peak_components, self.gpus)

        if samples == 1:
            return at(1)
        share = (samples - 1) / (MICRO_BATCHES[-1] - 1)
        return (1 - share) * at(1) + share * at(MICRO_BATCHES[-1])

    def _changed(self, samples: int, value: Checkpointing) -> Setting:
        recomputed = f"training.activation_checkpointing={str(value).lower()}"
        return _changed(self.base, [f"training.micro_batch={samples}", recomputed])


def _degrees(config: RunConfig, gpus: int) -> Iterator[int]:
    """The tensor-parallel degrees that can split the recipe's LLaMA, in ascending order."""
    for degree in (d for d in range(1, gpus + 1) if gpus % d == 0):
        try:
            _changed(Setting((), config, 0), [f"tensor_parallel={degree}"])
        except UserError:
            continue
        if config.training.global_batch >= gpus // degree:
            yield degree


def _base(config: RunConfig, degree: int) -> Setting:
    """The recipe with the changes that all settings of a tensor-parallel degree share."""
    changes = [] if degree == config.tensor_parallel else [f"tensor_parallel={degree}"]
    if config.model.frozen_dtype == "fp32":
        changes.append("model.frozen_dtype=bf16")
    if config.model.has_vit and config.model.vision_adapter.kind == "none":
        changes.append("model.vision_source=cached")  # less memory and time; needs shards with features
    return _changed(Setting((), config, 0), changes)


def _changed(setting: Setting, changes: list[str]) -> Setting:
    raw = setting.config.model_dump(mode="json")
    kept = dict(change.split("=", 1) for change in setting.changes)
    for change in changes:
        key, value = change.split("=", 1)
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node[parent]
        node[last] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
        kept[key] = value
    config = parse_config(raw, where="the settings tried")
    return Setting(tuple(f"{key}={value}" for key, value in kept.items()), config, setting.peak_bytes)
