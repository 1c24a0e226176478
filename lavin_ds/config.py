"""The run configuration: immutable data, checked when it is read.

A recipe is one YAML file with everything that a run depends on, except the paths of its inputs. `load_recipe` reads it
and applies `key=value` overrides. Its error names every unknown key, wrong value and contradiction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from difflib import get_close_matches
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from lavin_ds.errors import UserError
from lavin_ds.models.adapters import KINDS as ADAPTERS
from lavin_ds.models.adapters import LLM_POINTS, VISION_POINTS
from lavin_ds.models.necks import KINDS as NECKS

Dtype = Literal["fp32", "bf16", "fp16"]
ImageResize = Literal["squash", "crop", "pad"]  # to a square: see data/images.py
Checkpointing = bool | Literal["vision"] | PositiveInt
Positive = Field(gt=0)
Beta = Annotated[float, Field(ge=0, lt=1)]
Options = dict[str, bool | int | float | str]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RopeScaling(Section):
    """LLaMA-3.1's frequency scaling; the field names are those of Hugging Face's `rope_scaling`."""

    factor: float = Field(8.0, gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_position_embeddings: int = Field(8192, gt=0)

    @model_validator(mode="after")
    def _between(self):
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            raise ValueError(f"high_freq_factor {high} must be above low_freq_factor {low}")
        return self


def _registered(name: str, known: Iterable[str]) -> str:
    """Returns `name` if it is known."""
    if name not in known:
        raise ValueError(f"there is no '{name}', only {', '.join(known)}")
    return name


class LlamaConfig(Section):
    """Shape of a LLaMA. `ffn_dim` is the width after Meta's rounding."""

    dim: int = Positive
    n_layers: int = Positive
    n_heads: int = Positive
    n_kv_heads: int | None = Field(None, gt=0)  # None: as many as n_heads (multi-head attention)
    ffn_dim: int = Positive
    vocab_size: int = Positive
    norm_eps: float = Field(1e-6, gt=0, lt=1)
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @model_validator(mode="after")
    def _divisible(self):
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be n_heads {self.n_heads} times an even head width")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.kv_heads}")
        return self


class Readout(Section):
    """Which rows of a vision transformer are read, and after which blocks: every k-th block, or a single one.

    Blocks after the last one that is read are not built. LaVIN reads "the [cls] tokens from every fourth layer"
    (paper 1, section 3.2): {rows: cls, every: 4}.
    """

    rows: Literal["cls", "patches", "all"] = "cls"
    every: int | None = Field(None, gt=0)
    block: int | None = Field(None, gt=0)  # counted from 1
    norm: bool = False  # whether CLIP's last norm (ln_post) is applied to the rows

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.every is None) == (self.block is None):
            raise ValueError(f"give either every or block (every is {self.every}, block is {self.block})")
        return self

    def blocks(self, layers: int) -> tuple[int, ...]:
        """The blocks after which rows are read, counted from 1, in a transformer of `layers` blocks."""
        if self.block is not None:
            return (self.block,) if self.block <= layers else ()
        return tuple(range(self.every, layers + 1, self.every))


class VisionConfig(Section):
    """Shape of a CLIP vision transformer, and which of its rows are read."""

    width: int = Positive
    layers: int = Positive
    heads: int = Positive
    patch_size: int = Positive
    image_size: int = Positive
    mlp_ratio: float = Field(4.0, gt=0)
    quick_gelu: bool = True  # OpenAI's weights need it; most of open_clip's do not
    readout: Readout = Readout(every=4)

    @property
    def depth(self) -> int:
        """The number of blocks that run: up to the last one that is read."""
        return self.readout.blocks(self.layers)[-1]

    @property
    def rows(self) -> int:
        """F, the number of rows that are read per image."""
        patches = (self.image_size // self.patch_size) ** 2
        a_block = {"cls": 1, "patches": patches, "all": 1 + patches}[self.readout.rows]
        return a_block * len(self.readout.blocks(self.layers))

    @model_validator(mode="after")
    def _divisible(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if not self.readout.blocks(self.layers):
            wanted = self.readout.every or self.readout.block
            raise ValueError(f"readout asks for block {wanted}, but there are {self.layers} layers")
        return self


class AdapterConfig(Section):
    """One kind of adapter, and its points in every block; models/adapters/ defines the kinds and points.

    A kind uses the keys that occur in its equation, and keys of its own from `options`.
    """

    kind: str = "none"
    dim: int = Field(8, gt=0)
    groups: int = Field(2, gt=0)
    scale: float = 1.0
    dropout: float = Field(0.1, ge=0, lt=1)
    temperature: float = Field(10.0, gt=0)
    at: tuple[str, ...] = ("attention",)
    options: Options = {}

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return _registered(kind, ["none", *ADAPTERS])

    def __hash__(self) -> int:  # pydantic's own cannot hash `options`
        return hash(self.model_dump_json())


class NeckConfig(Section):
    """The neck, which turns the vision transformer's rows into visual tokens; models/necks/ defines the kinds.

    A kind uses the keys that occur in its equation, and keys of its own from `options`.
    """

    kind: str = "lavin"
    dim: int = Field(128, gt=0)  # d_h of eq. 6
    options: Options = {}

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return _registered(kind, NECKS)

    @model_validator(mode="after")
    def _options_fit(self):
        if wrong := NECKS[self.kind].wrong_options(self.kind, self.options):
            raise ValueError("; ".join(wrong))
        return self

    def __hash__(self) -> int:  # pydantic's own cannot hash `options`
        return hash(self.model_dump_json())


class ModelConfig(Section):
    llm: LlamaConfig
    vision: VisionConfig | None = None  # None: a text-only run, every sample is read as text
    llm_adapter: AdapterConfig = AdapterConfig()
    vision_adapter: AdapterConfig = AdapterConfig()
    vision_source: Literal["pixels", "cached"] = "pixels"  # cached: features of a frozen ViT, from `prep features`
    neck: NeckConfig = NeckConfig()
    frozen_dtype: Dtype = "bf16"

    @property
    def visual_tokens(self) -> int:
        """P, the number of visual tokens per image."""
        return NECKS[self.neck.kind].visual_tokens(self.neck, self.vision.rows) if self.vision else 0

    @model_validator(mode="after")
    def _adapters_fit(self):
        places = [("llm_adapter", self.llm_adapter, self.llm.dim, LLM_POINTS)]
        if self.vision:
            places.append(("vision_adapter", self.vision_adapter, self.vision.width, VISION_POINTS))
        wrong = [
            f"{name}: {said}"
            for name, adapter, width, points in places
            if adapter.kind != "none"
            for said in ADAPTERS[adapter.kind].problems(adapter, width, points)
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def has_vit(self) -> bool:
        """Whether the model runs a ViT, that is, reads images as pixels and not as cached features."""
        return self.vision is not None and self.vision_source == "pixels"

    @model_validator(mode="after")
    def _cacheable(self):
        if self.vision_source == "cached" and not self.vision:
            raise ValueError("vision_source cached needs a vision section, but vision is null")
        if self.vision_source == "cached" and self.vision_adapter.kind != "none":
            raise ValueError(
                f"vision_source cached needs a ViT that does not change, but vision_adapter.kind is "
                f"{self.vision_adapter.kind}: features are computed once, before training, and adapters in the ViT "
                "would change them at every step. Set vision_source to pixels, or vision_adapter.kind to none"
            )
        return self


class DataConfig(Section):
    prompt_format: str = "QCM-ALE"
    captions: bool = False
    max_length: int = Field(512, gt=0)  # positions, with the modality token, BOS, prefix and visual tokens
    overlength: Literal["error", "drop", "shorten"] = "shorten"
    image_resize: ImageResize = "squash"

    @field_validator("prompt_format")
    @classmethod
    def _known(cls, format: str) -> str:
        from lavin_ds.data_prep.sources import check_prompt_format  # here: its room is above this one

        check_prompt_format(format)
        return format


class TrainingConfig(Section):
    """Optimisation (paper 1, section 4.2; reference.md, section 6)."""

    epochs: float = Field(20, gt=0)
    warmup_epochs: float = Field(2, ge=0)
    global_batch: int = Field(32, gt=0)
    micro_batch: int = Field(4, gt=0)  # most images of a micro-batch, and its most tokens in longest samples
    packing: bool = False  # the samples of a micro-batch are put end to end in one row, without padding
    peak_lr: float = Field(1.125e-3, gt=0, le=1)  # the paper's 9e-3 is the base rate per 256 samples
    weight_decay: float = Field(0.02, ge=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, lt=1)
    grad_clip: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)
    # What backward recomputes instead of keeping it. "vision": every ViT block, which saves most memory for its time.
    # A number n: also the first n LLaMA layers. true: also all LLaMA layers. false: nothing.
    activation_checkpointing: Checkpointing = False
    checkpoint_every: int = Field(200, gt=0)  # optimizer steps
    keep_checkpoints: int = Field(2, gt=0)  # the newest; with validation the best one is kept too
    validate_every: int = Field(0, ge=0)  # optimizer steps; 0: never
    validation_samples: int | None = Field(None, gt=0)  # of split val, always the same ones; None: all
    max_skipped_in_a_row: int = Field(10, gt=0)  # steps without a finite loss and gradient before the run gives up


class RunConfig(Section):
    name: str
    source: str = ""  # the paper and table this recipe reproduces
    compat: Literal["lavin-official"] | None = None
    model: ModelConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    tensor_parallel: int = Field(1, gt=0)
    deepspeed: str = "zero2"  # a name in ds_configs/ or a file

    @model_validator(mode="after")
    def _consistent(self):
        tp, llm, wrong = self.tensor_parallel, self.model.llm, []
        for name, size in [
            ("n_heads", llm.n_heads),
            ("n_kv_heads", llm.kv_heads),
            ("ffn_dim", llm.ffn_dim),
            ("vocab_size", llm.vocab_size),
        ]:
            if size % tp:
                wrong.append(f"model.llm.{name} {size} cannot be split over tensor_parallel {tp}")
        recomputed = self.training.activation_checkpointing
        if type(recomputed) is int and recomputed > llm.n_layers:
            wrong.append(
                f"training.activation_checkpointing {recomputed} is more layers than the {llm.n_layers} of model.llm: "
                "true means all of them"
            )
        if self.training.warmup_epochs >= self.training.epochs:
            wrong.append(
                f"training.warmup_epochs {self.training.warmup_epochs} must be below training.epochs "
                f"{self.training.epochs}"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def check_world(world_size: int, tensor_parallel: int) -> None:
    """Refuses a number of ranks that the tensor-parallel degree does not divide.

    Raises:
        UserError: too few ranks, or a number that is not a multiple of `tensor_parallel`.
    """
    if world_size % tensor_parallel:
        raise UserError(
            f"tensor_parallel {tensor_parallel} needs a multiple of {tensor_parallel} ranks, but there "
            f"{'is' if world_size == 1 else 'are'} {world_size}: start more ranks or set tensor_parallel=1."
        )


def recomputed_layers(checkpointing: Checkpointing, n_layers: int) -> int:
    """The number of LLaMA layers that backward recomputes. The ViT is recomputed unless `checkpointing` is False."""
    if isinstance(checkpointing, bool):
        return n_layers if checkpointing else 0
    return 0 if checkpointing == "vision" else checkpointing


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in files("lavin_ds.recipes").iterdir() if f.name.endswith(".yaml"))


def load_recipe(name_or_file: str, overrides: list[str] = ()) -> RunConfig:
    """Reads a shipped recipe by name, or a YAML file, and applies dotted `key=value` overrides in order.

    Raises:
        UserError: the recipe does not exist or is not YAML; or keys or values in it or in the overrides are wrong. The
            error names all of these.
    """
    path = Path(name_or_file)
    if name_or_file in recipe_names():
        text = (files("lavin_ds.recipes") / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml", ".json") and path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        near = get_close_matches(name_or_file, recipe_names(), n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"No recipe '{name_or_file}'.{meant} Give a YAML file that exists or one of {', '.join(recipe_names())}."
        )
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"Recipe {name_or_file} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"Recipe {name_or_file} holds no keys: it must be a YAML mapping.")
    wrong = [said for override in overrides if (said := _apply_override(raw, override))]
    return parse_config(raw, f"recipe {name_or_file}", wrong)


def parse_config(raw: dict, where: str, wrong: Sequence[str] = ()) -> RunConfig:
    """Validates a mapping. `where` names its origin in the error; `wrong` holds problems that are already known.

    Raises:
        UserError: anything is wrong. The error has one line per problem.
    """
    wrong = [*wrong, *_problems(raw)]
    if len(wrong) == 1:
        raise UserError(f"In {where}: {wrong[0]}{'' if wrong[0].endswith('?') else '.'}")
    if wrong:
        raise UserError(f"In {where}, {len(wrong)} things are wrong:" + "".join(f"\n  {said}" for said in wrong))
    return RunConfig.model_validate(raw)


def _apply_override(raw: dict, override: str) -> str | None:
    """Sets the key in `raw`; returns what is wrong with the override, if anything."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        return f"override '{override}' must read key=value, for example training.epochs=3"
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            return f"override '{override}': {parent} is a value, not a section, so it has no key {last}"
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"override '{override}': '{value}' is not a YAML value"
    return None


def _problems(raw: dict) -> list[str]:
    """Every problem of a recipe's keys and values, as a clause."""
    try:
        RunConfig.model_validate(raw)
    except ValidationError as error:
        found = error.errors()
    else:
        return []
    unknown = [problem["loc"] for problem in found if problem["type"] == "extra_forbidden"]
    if unknown:  # pydantic compares keys with each other only if all are known, so look again without these
        return [_unknown(path) for path in unknown] + _problems(_without(raw, unknown))
    by_key: dict[str, list[dict]] = {}
    for problem in found:  # a key that may have several types has one problem per type
        known = list(takewhile(lambda part: isinstance(part, str) and part in _KEY_NAMES, problem["loc"]))
        by_key.setdefault(".".join(known), []).append(problem)
    return [_refused(key, problems) for key, problems in by_key.items()]


def _refused(key: str, problems: list[dict]) -> str:
    kind, value = problems[0]["type"], problems[0]["input"]
    value = "null" if value is None else str(value)[:40]
    if kind == "value_error":  # raised by a section's own check, which names keys and values
        message = problems[0]["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if kind == "missing":
        return f"{key} has too few values" if isinstance(problems[0]["loc"][-1], int) else f"{key} is missing"
    if kind == "model_type":
        return f"{key} is a section, not a value like {value}: set keys of it, as {key}.KEY=VALUE"
    # "Input should be a valid number, unable to parse string as a number"
    wanted = [problem["msg"].removeprefix("Input should ").partition(", unable")[0] for problem in problems]
    return f"{key} is {value}: it must {' or '.join(wanted)}"


def _unknown(path: tuple[str, ...]) -> str:
    """Says that there is no such key, and suggests keys that may be meant."""
    key, (*section, name) = ".".join(path), path
    known = {each: each.rpartition(".")[2] for each in config_keys()}
    siblings = [each for each in known if each.split(".")[:-1] == section]
    share_a_word = [each for each in known if set(name.split("_")) & set(known[each].split("_"))]
    close = get_close_matches(name, known.values(), n=1, cutoff=0.75)
    meant = (
        get_close_matches(key, known, n=1, cutoff=0.85)
        or [each for each in share_a_word if each in siblings]
        or [each for each in known if known[each] == name]
        or [each for each in known if known[each] in close or each in share_a_word]
    )
    if meant:
        meant.sort(key=lambda each: not each.startswith("training."))  # these are overridden most often
        return f"unknown key {key}: did you mean {' or '.join(meant[:3])}?"
    return f"unknown key {key}; known there: {', '.join(known[each] for each in siblings)}"


def _without(raw: dict, paths: list[tuple[str, ...]]) -> dict:
    """A copy that lacks these keys."""
    raw = deepcopy(raw)
    for *parents, last in paths:
        node = raw
        for parent in parents:
            node = node[parent]
        del node[last]
    return raw


def config_keys(section: type[Section] = RunConfig, prefix: str = "") -> list[str]:
    """Every key that a recipe may have, dotted. A section comes before its keys."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        options = [field.annotation, *get_args(field.annotation)]
        for option in options:
            if isinstance(option, type) and issubclass(option, Section):
                keys += config_keys(option, f"{prefix}{name}.")
    return keys


_KEY_NAMES = {key.rpartition(".")[2] for key in config_keys()}
