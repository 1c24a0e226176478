"""The fastest setting of a recipe that fits into a card, and the command that trains it.

Searched: micro-batch, what is recomputed in backward, tensor parallelism over the GPUs, features in place of a ViT that
does not learn, and half precision for a base that is fp32. Not searched: ZeRO stages, as all but the third only divide
0.06 GB at 13B, and the third does not help a small card (DeepSpeed moves the whole model to every GPU before it divides
it, and so it must fit there once; tensor parallelism loads slices).

Settings are tried from the fastest on, so that memory is asked of a few alone. Their order is by a sum of parts, each
from models of a few layers: the LLaMA without images, the ViT for the images there are on average, and another forward
pass of what is recomputed. The first that fits is then simulated as it is: its memory as a whole, its time as
`lavin-ds profile` gives it.
"""

from __future__ import annotations

import heapq
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lavin_ds.config import Checkpointing, RunConfig, parse_config, recomputed_layers
from lavin_ds.devices import GB, GPUS_PER_NODE, OVERHEAD, Device
from lavin_ds.errors import UserError
from lavin_ds.profiling.calibrate import roofline_seconds
from lavin_ds.profiling.layers import BASE, from_few_layers, parts_of, peak_components, with_parts
from lavin_ds.profiling.memory import COMPONENTS, Simulation, Workload, simulate, worst_case
from lavin_ds.profiling.time import Pace, TimeEstimate, TrainingSet, estimate, labelled_share, pace
from lavin_ds.profiling.tracker import Operation

MICRO_BATCHES = (1, 2, 4, 8)
# Within so much of the fastest, more samples a micro-batch are better: the same kernels are started less often, which
# the roofline does not charge for.
ALIKE = 1.1
FROZEN = list(COMPONENTS).index("frozen")


@dataclass(frozen=True)
class Setting:
    """Changes to a recipe as `key=value`, and what they come to. peak_bytes is of tensors, without OVERHEAD."""

    changes: tuple[str, ...]
    config: RunConfig
    peak_bytes: int
    weights_bytes: int = 0  # frozen ones among them
    time: TimeEstimate | None = None

    def as_dict(self) -> dict:
        return {
            "changes": list(self.changes),
            "peak_bytes": self.peak_bytes,
            "time": self.time.as_dict() if self.time else None,
        }


@dataclass(frozen=True)
class Fit:
    """The fastest setting that fits, simulated as a whole; or None, and then the smallest there is."""

    best: Setting | None
    smallest: Setting
    limit_bytes: int  # of the card
    tried: int
    overhead_bytes: int = int(OVERHEAD)

    @property
    def weights_bytes(self) -> int:
        """Frozen weights of the smallest setting on one GPU."""
        return self.smallest.weights_bytes

    def command(self, recipe: str, gpus: int, overrides: list[str] = ()) -> str | None:
        """A line that trains the best setting of the recipe with its `overrides`; the paths are to be put in."""
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
    """Searches with models of a few layers, then simulates the winner as a whole. Half a minute at 7B.

    Raises:
        UserError: no number of ranks that `gpus` allows can train the recipe's global batch.
    """
    best = smallest = None
    tried = 0
    for degree in _degrees(config, gpus):
        search = _Search(_base(config, degree), limit_bytes - OVERHEAD, device, gpus, training_set, efficiency, say)
        found, least = search.fastest(), search.smallest()
        tried += search.tried
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
    """At one tensor-parallel degree: settings from the fastest on until one fits."""

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
        self.measured: dict[tuple[int, Checkpointing], Setting] = {}
        self.steps: dict[int, tuple[Pace, np.ndarray, np.ndarray]] = {}

    @property
    def tried(self) -> int:
        return len(self.measured)

    def smallest(self) -> Setting:
        return self._setting(1, True)

    def fastest(self) -> Setting | None:
        """The fastest setting that fits, with its time; None where not even the smallest does."""
        if self.smallest().peak_bytes > self.room:
            return None
        config = self.base.config
        most = math.ceil(config.training.global_batch * config.tensor_parallel / self.gpus)
        least = "vision" if config.model.has_vit else False  # beyond it, layers are recomputed one by one
        values = dict.fromkeys([False, least, True])
        queue = [(self._hours(n, value), n, value) for n in MICRO_BATCHES if n <= most for value in values]
        heapq.heapify(queue)
        fitting: list[tuple[float, Setting]] = []  # each with more samples than the one before
        while queue and not (fitting and queue[0][0] > ALIKE * fitting[0][0]):
            hours, samples, value = heapq.heappop(queue)
            if fitting and samples <= fitting[-1][1].config.training.micro_batch:
                continue
            setting = self._setting(samples, value)
            if setting.peak_bytes <= self.room:
                fitting.append((hours, setting))
            elif value == least:
                layers = self._layers_needed(samples, value)
                if 0 < layers < config.model.llm.n_layers:
                    heapq.heappush(queue, (self._hours(samples, layers), samples, layers))
        for _, setting in reversed(fitting):
            peak = simulate(setting.config, worst_case(setting.config, self.gpus), self.gpus).peak_bytes
            if peak <= self.room:
                time = estimate(setting.config, self.training_set, self.device, self.gpus, self.efficiency)
                return replace(setting, peak_bytes=peak, time=time)
        return None

    def _layers_needed(self, samples: int, least: Checkpointing) -> int:
        """To be recomputed, so that the rest fits; 0 where all are not enough.

        Each saves the same, up to those whose own recomputation is the peak: so one more than that says.
        """
        kept, recomputed = (self._setting(samples, value).peak_bytes for value in (least, True))
        if recomputed > self.room:
            return 0
        return math.ceil((kept - self.room) / (kept - recomputed) * self.base.config.model.llm.n_layers) + 1

    def _setting(self, samples: int, value: Checkpointing) -> Setting:
        """With its memory."""
        if (samples, value) not in self.measured:
            changed = self._changed(samples, value)
            held = self._held(samples, value)
            setting = replace(changed, peak_bytes=int(held.sum()), weights_bytes=int(held[FROZEN]))
            self.say(f"{' '.join(setting.changes)}: {setting.peak_bytes / 1e9:.1f} GB")
            self.measured[samples, value] = setting
        return self.measured[samples, value]

    def _held(self, samples: int, value: Checkpointing) -> np.ndarray:
        """Bytes by component at the peak, which grow evenly with the samples."""

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

    def _hours(self, samples: int, value: Checkpointing) -> float:
        """Of the whole recipe, for the order of settings."""
        if samples not in self.steps:
            self.steps[samples] = self._step(samples)
        walk, text, layer = self.steps[samples]
        images = walk.samples * self.training_set.image_fraction
        seconds = text.sum() + images * self._image.sum()
        if value is not False:  # forward once more
            seconds += (
                images * self._image[0] + recomputed_layers(value, self.base.config.model.llm.n_layers) * layer[0]
            )
        return walk.steps * walk.micro_batches * seconds / 3600

    def _step(self, samples: int) -> tuple[Pace, np.ndarray, np.ndarray]:
        """Seconds [forward, the rest] of an average micro-batch without images, and of one of its LLaMA layers."""
        config = self._changed(samples, False).config
        walk = pace(self.training_set, config, self.gpus)
        workload = Workload(
            max(1, round(walk.samples)), round(walk.critical_length), 0.0, labelled_share(self.training_set, walk)
        )
        n = config.model.llm.n_layers
        fewer, whole = (self._seconds(with_parts(config, layers, 1), workload) for layers in (n - 1, n))
        return walk, whole, whole - fewer

    @cached_property
    def _image(self) -> np.ndarray:
        """Seconds [forward, the rest] that the ViT takes for an image."""
        config = self._changed(1, False).config
        if not config.model.has_vit:
            return np.zeros(2)
        one, none = (
            self._seconds(with_parts(config, BASE[0], parts), Workload(1, config.data.max_length, images))
            for parts, images in ((parts_of(config.model), 1.0), (1, 0.0))
        )
        return one - none

    def _seconds(self, config: RunConfig, workload: Workload) -> np.ndarray:
        """[forward, the rest] of a micro-batch, with what ranks exchange in it."""
        efficiency = 1.0 if self.device.rates else self.efficiency

        def taken(simulation: Simulation, operations: list[Operation]) -> float:
            exchanged = sum(o.exchanged for o in operations if o.phase != "update")  # once a step: the same for all
            seconds = roofline_seconds(self.device, operations)
            return seconds / efficiency + exchanged / (self.device.link * GB)

        def measure(simulation: Simulation) -> np.ndarray:
            forward = [o for o in simulation.operations if o.phase == "forward"]
            rest = [o for o in simulation.operations if o.phase != "forward"]
            return np.array([taken(simulation, forward), taken(simulation, rest)])

        return from_few_layers(config, workload, measure, self.gpus)


def _degrees(config: RunConfig, gpus: int) -> Iterator[int]:
    """Tensor-parallel degrees from the least, among those that the recipe's LLaMA can be split by."""
    for degree in (d for d in range(1, gpus + 1) if gpus % d == 0):
        try:
            _changed(Setting((), config, 0), [f"tensor_parallel={degree}"])
        except UserError:
            continue
        if config.training.global_batch >= gpus // degree:
            yield degree


def _base(config: RunConfig, degree: int) -> Setting:
    """What is changed of the recipe in every setting of a degree."""
    changes = [] if degree == config.tensor_parallel else [f"tensor_parallel={degree}"]
    if config.model.frozen_dtype == "fp32":
        changes.append("model.frozen_dtype=bf16")
    if config.model.has_vit and config.model.vision_adapter.kind == "none":
        changes.append("model.vision_source=cached")  # always less of both; the shards must hold features
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
