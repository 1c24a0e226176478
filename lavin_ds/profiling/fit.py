"""The fastest setting of a recipe that fits into a card, and the command that trains it.

Searched: micro-batch, what is recomputed in backward, tensor parallelism over the GPUs, features in place of a ViT that
does not learn, and half precision for a base that is fp32. Not searched: ZeRO stages, as all but the third only divide
0.06 GB at 13B, and the third does not help a small card (DeepSpeed moves the whole model to every GPU before it divides
it, and so it must fit there once; tensor parallelism loads slices).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lavin_ds.config import RunConfig, parse_config
from lavin_ds.errors import UserError
from lavin_ds.profiling.devices import OVERHEAD, Device
from lavin_ds.profiling.layers import from_few_layers, peak_components
from lavin_ds.profiling.memory import COMPONENTS, simulate, worst_case
from lavin_ds.profiling.time import TimeEstimate, TrainingSet, estimate

MICRO_BATCHES = (1, 2, 4, 8)
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

    def command(self, recipe: str, overrides: list[str] = ()) -> str | None:
        """A line that trains the best setting of the recipe with its `overrides`; the paths are to be put in."""
        if self.best is None:
            return None
        clip = ["--clip", "ViT-L-14.pt"] if self.best.config.model.has_vit else []
        words = ["lavin-ds", "train", "--recipe", recipe, "--data", "shards", "--llama", "llama", *clip]
        return shlex.join([*words, "--out", f"runs/{Path(recipe).stem}", *overrides, *self.best.changes])

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
    """Searches with models of a few layers, then simulates the winner as a whole. A minute or two at 7B.

    Raises:
        UserError: no number of ranks that `gpus` allows can train the recipe's global batch.
    """
    room = limit_bytes - OVERHEAD
    fitting, all_tried = [], []
    for degree in _degrees(config, gpus):
        for base in _bases(config, degree):
            for micro_batch in MICRO_BATCHES:
                if micro_batch > _most_samples(config, gpus // degree):
                    break
                chosen = _changed(base, [f"training.micro_batch={micro_batch}"])
                found = None
                for setting in _recomputing(chosen, gpus, room):
                    say(f"{' '.join(setting.changes)}: {setting.peak_bytes / 1e9:.1f} GB")
                    all_tried.append(setting)
                    if setting.peak_bytes <= room:
                        found = setting
                        break
                if found is None:
                    break  # nor will larger micro-batches
                fitting.append(replace(found, time=estimate(found.config, training_set, device, gpus, efficiency)))
        if any(not s.config.training.activation_checkpointing for s in fitting):
            break  # more tensor parallelism only adds communication
    if not all_tried:
        raise UserError(f"{gpus} GPUs cannot share training.global_batch {config.training.global_batch}.")
    for setting in sorted(fitting, key=lambda s: s.time.hours):
        peak = simulate(setting.config, worst_case(setting.config), gpus).peak_bytes
        if peak <= room:
            return Fit(replace(setting, peak_bytes=peak), setting, limit_bytes, len(all_tried))
    return Fit(None, min(all_tried, key=lambda s: s.peak_bytes), limit_bytes, len(all_tried))


def _degrees(config: RunConfig, gpus: int) -> Iterator[int]:
    """Tensor-parallel degrees from the least, among those that the recipe's LLaMA can be split by."""
    for degree in (d for d in range(1, gpus + 1) if gpus % d == 0):
        try:
            _changed(Setting((), config, 0), [f"tensor_parallel={degree}"])
        except UserError:
            continue
        if config.training.global_batch >= gpus // degree:
            yield degree


def _bases(config: RunConfig, degree: int) -> Iterator[Setting]:
    changes = [] if degree == config.tensor_parallel else [f"tensor_parallel={degree}"]
    if config.model.frozen_dtype == "fp32":
        changes.append("model.frozen_dtype=bf16")
    if config.model.has_vit and config.model.vision_adapter.kind == "none":
        changes.append("model.vision_source=cached")  # always less of both; the shards must hold features
    yield _changed(Setting((), config, 0), changes)


def _most_samples(config: RunConfig, ranks: int) -> int:
    return max(1, math.ceil(config.training.global_batch / ranks))


def _recomputing(setting: Setting, gpus: int, room: float) -> Iterator[Setting]:
    """The setting with nothing recomputed, the ViT, as many LLaMA layers as it takes, and everything."""

    def at(value: str) -> Setting:
        changed = _changed(setting, [f"training.activation_checkpointing={value}"])
        measured = from_few_layers(changed.config, worst_case(changed.config), peak_components, gpus)
        return replace(changed, peak_bytes=int(measured.sum()), weights_bytes=int(measured[FROZEN]))

    kept = at("false")
    yield kept
    few = kept
    if setting.config.model.has_vit:
        few = at("vision")
        yield few
    everything = at("true")
    layers, saved = setting.config.model.llm.n_layers, few.peak_bytes - everything.peak_bytes
    if everything.peak_bytes < room < few.peak_bytes:
        # Each layer that is recomputed saves the same, up to those whose own recomputation is the peak.
        needed = math.ceil((few.peak_bytes - room) / saved * layers) + 1
        if needed < layers:
            partly = _changed(setting, [f"training.activation_checkpointing={needed}"])
            yield replace(partly, peak_bytes=few.peak_bytes - saved * needed // layers)
    yield everything


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
