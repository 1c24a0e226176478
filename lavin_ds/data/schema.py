"""What is in a shard directory: the Arrow schemas of its tables and the manifest that describes them.

docs/data-format.md describes the same in prose. A change that an older reader would misread needs a new SCHEMA_VERSION.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import Field, ValidationError

from lavin_ds.config import Dtype, ImageResize, RunConfig, Section, VisionConfig
from lavin_ds.data.layout import Frame
from lavin_ds.errors import UserError

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
REJECTS_NAME = "rejects.jsonl"


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


# One row per sample. Token columns hold only the sample's own tokens, because BOS, prefix and visual slots depend on
# the run.
ROW_SCHEMA = _schema(
    id=pa.string(),
    token_ids=pa.list_(pa.int32()),  # prompt, response, EOS
    label_spans=pa.list_(pa.int32()),  # start, end, start, end, ..: half-open, over token_ids
    label_count=pa.int32(),  # labelled tokens; 0: for evaluation only
    prompt_length=pa.int32(),  # tokens before the first label
    prompt_ids=pa.list_(pa.int32()),  # what evaluation reads; empty: token_ids[:prompt_length]
    image=pa.int32(),  # row of the image table, or -1
    has_image=pa.bool_(),
    # For the score of ScienceQA; false, -1, 0 and "" in other kinds of data.
    has_hint=pa.bool_(),
    answer=pa.int8(),
    n_choices=pa.int8(),
    subject=pa.string(),
    grade=pa.string(),
    # The captions that a score compares with; empty in split train and in other kinds of data.
    references=pa.list_(pa.field("item", pa.string(), nullable=False)),
)

# One row per distinct image file, however many samples and splits use it.
IMAGE_SCHEMA = _schema(
    id=pa.string(),  # SHA-256 of the source file
    source=pa.string(),  # the first path it was found under
    pixels=pa.binary(),  # uint8 [size, size, 3], RGB, resized, not normalised
)


# One row per row of the image table, in the same order: the features that a frozen CLIP computes from the pixels.
FEATURE_SCHEMA = _schema(
    id=pa.string(),  # as in the image table
    features=pa.list_(pa.float32()),  # [F, vision width], row by row
)


class FileEntry(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")  # a bare name: a manifest cannot point out of its folder
    rows: int = Field(ge=0)
    bytes: int = Field(gt=0)
    sha256: str


class LengthCounts(Section):
    """The number of samples of a split by what the length limit did to them. Their sum is all samples of the split."""

    whole: int = 0
    shortened: int = 0  # the context, or a conversation's last turns, were cut so that the response fits
    cut: int = 0  # compat only: cut off at the end, as in the authors' code
    evaluation_only: int = 0  # too long to train on; the prompt is kept, without labels
    dropped: int = 0  # not even the prompt fits


class SplitEntry(Section):
    files: list[FileEntry]
    rows: int = Field(ge=0)
    images: int = Field(ge=0)  # rows with an image
    records: int = Field(ge=0)  # in the source, with the `rejected` ones; a record may become several rows
    lengths: LengthCounts
    rejected: int = Field(0, ge=0)  # bad records that --on-error skip left out
    longest_image: int = Field(0, ge=0)  # own tokens (prompt, response, EOS) of the longest row with an image
    longest_text: int = Field(0, ge=0)


class ImageEntry(Section):
    size: int = Field(gt=0)
    resize: ImageResize
    files: list[FileEntry]
    rows: int = Field(ge=0)


class FeatureEntry(Section):
    """The table of cached ViT features, and everything that they depend on besides the pixels."""

    clip_sha256: str  # of the CLIP file
    vision: VisionConfig
    normalise: Literal["clip", "imagenet"]  # mean and standard deviation of the pixels
    computed_in: Dtype  # of the ViT; features are stored as float32, which holds every bf16 and fp16 value
    rows_per_image: int = Field(gt=0)  # F
    width: int = Field(gt=0)  # W, columns
    files: list[FileEntry]
    rows: int = Field(ge=0)


class TokenizerEntry(Section):
    file: str = Field("tokenizer.model", pattern=r"^[A-Za-z0-9._-]+$")
    sha256: str
    vocab_size: int = Field(gt=0)
    bos: int = Field(ge=0)
    eos: int = Field(ge=0)


class PromptSettings(Section):
    """How text became tokens."""

    format: str
    captions: bool
    max_length: int = Field(gt=0)  # positions, with the modality token, BOS, prefix and visual tokens
    overlength: Literal["error", "drop", "shorten"]
    visual_tokens: int = Field(ge=0)  # per image, when the texts were cut to max_length
    compat: Literal["lavin-official"] | None = None

    @classmethod
    def of(cls, config: RunConfig) -> PromptSettings:
        data = config.data
        return cls(
            format=data.prompt_format,
            captions=data.captions,
            max_length=data.max_length,
            overlength=data.overlength,
            visual_tokens=config.model.visual_tokens,
            compat=config.compat,
        )


class Manifest(Section):
    schema_version: int
    kind: str = Field(pattern=r"^[A-Za-z0-9._-]+$")  # of data: a key of data_prep.sources.SOURCES
    created_by: str
    splits: dict[str, SplitEntry]
    images: ImageEntry | None  # None: prepared for a recipe without vision
    features: FeatureEntry | None = None  # None: `lavin-ds prep features` has not run
    tokenizer: TokenizerEntry
    prefix_image: list[int]
    prefix_text: list[int]
    prompt: PromptSettings

    @property
    def frame(self) -> Frame:
        return Frame(self.tokenizer.bos, tuple(self.prefix_image), tuple(self.prefix_text))

    def all_files(self) -> list[FileEntry]:
        files = [file for split in self.splits.values() for file in split.files]
        return files + [file for table in (self.images, self.features) if table for file in table.files]


def load_manifest(directory: str | Path) -> Manifest:
    """Reads a shard directory's manifest.

    Raises:
        UserError: it is missing, is not JSON, has another schema version, or has a wrong key or value.
    """
    path = Path(directory) / MANIFEST_NAME
    if Path(directory).is_file():
        raise UserError(f"{directory} is a file: give the folder that `lavin-ds prep` made.")
    remedy = "prepare the data again with `lavin-ds prep`"
    try:
        raw = json.loads(path.read_bytes())
    except OSError:
        raise UserError(
            f"{path} is missing, so {directory} is not a shard directory: make one with `lavin-ds prep`."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {remedy}.") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}, but this version reads {SCHEMA_VERSION}: {remedy}.")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: {key}: {problem['msg']}: {remedy}.") from None


def manifest_sha256(directory: str | Path, vision_source: str) -> str:
    """Hash of the manifest's content, which covers all data by their checksums. A run directory records it.

    Cached features are part of it only for a recipe that reads them, so adding them changes no other recipe's hash.
    """
    raw = json.loads((Path(directory) / MANIFEST_NAME).read_bytes())
    if vision_source != "cached":
        raw.pop("features", None)
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def check_manifest(manifest: Manifest, config: RunConfig, clip_sha256: str | None = None) -> list[str]:
    """Every difference between shards and recipe, as a clause with both values; empty if there is none.

    A recipe without vision may use shards with images: it reads every sample as text. clip_sha256: of the CLIP whose
    cached features the adapters were trained on; None if there are no such adapters.
    """
    prompt, data, model = manifest.prompt, config.data, config.model
    pairs = [
        ("data.prompt_format", prompt.format, data.prompt_format),
        ("data.captions", prompt.captions, data.captions),
        ("data.max_length", prompt.max_length, data.max_length),
        ("compat", prompt.compat, config.compat),
    ]
    found = [f"{key}: shards {ours}, recipe {theirs}" for key, ours, theirs in pairs if ours != theirs]
    found += check_images(manifest, config)
    if model.vision_source == "cached":
        found += _check_features(manifest, config, clip_sha256)
    if manifest.tokenizer.vocab_size > model.llm.vocab_size:
        found.append(
            f"vocabulary: shards' tokenizer has {manifest.tokenizer.vocab_size} pieces, "
            f"recipe's model.llm.vocab_size is {model.llm.vocab_size}"
        )
    if prompt.max_length == data.max_length:
        found += _check_room(manifest, config)
    return found


def _check_room(manifest: Manifest, config: RunConfig) -> list[str]:
    """Checks that every sample has room for its visual tokens. Any neck whose tokens fit can read the shards."""
    visual_tokens, limit = config.model.visual_tokens, config.data.max_length
    longest = _longest(manifest, visual_tokens)
    if longest <= limit:
        return []
    return [
        f"visual tokens: shards were cut for {manifest.prompt.visual_tokens}, recipe's model.neck makes "
        f"{visual_tokens}, so the longest sample has {longest} positions, over data.max_length {limit}: prepare the "
        f"shards with this recipe, or choose a model.neck or model.vision.readout with at most "
        f"{max(0, visual_tokens - (longest - limit))}"
    ]


def check_images(manifest: Manifest, config: RunConfig) -> list[str]:
    """The part of check_manifest that is about pixels."""
    vision = config.model.vision
    if not vision:
        return []
    if not manifest.images:
        return ["images: shards hold none, recipe has model.vision"]
    pairs = [
        ("image size", manifest.images.size, vision.image_size),
        ("data.image_resize", manifest.images.resize, config.data.image_resize),
    ]
    return [f"{key}: shards {ours}, recipe {theirs}" for key, ours, theirs in pairs if ours != theirs]


def _check_features(manifest: Manifest, config: RunConfig, clip_sha256: str | None) -> list[str]:
    entry, vision = manifest.features, config.model.vision
    if entry is None:
        return ["features: shards hold none, recipe has model.vision_source cached (see `lavin-ds prep features`)"]
    pairs = [
        ("rows (F) of an image's features", entry.rows_per_image, vision.rows),
        ("width (W) of the features", entry.width, vision.width),
    ]
    if all(ours == theirs for _, ours, theirs in pairs):  # else it is another ViT, and these two say so already
        pairs = [(f"model.vision.{key}", ours, getattr(vision, key)) for key, ours in entry.vision]
        pairs.append(("normalisation of the features' pixels", entry.normalise, normalisation(config)))
    found = [f"{key}: shards {ours}, recipe {theirs}" for key, ours, theirs in pairs if ours != theirs]
    if clip_sha256 and clip_sha256 != entry.clip_sha256:
        ours, theirs = entry.clip_sha256[:12], clip_sha256[:12]
        found.append(
            f"CLIP of the features: SHA-256 {ours}.. in the shards, {theirs}.. where the adapters were trained"
        )
    return found


def normalisation(config: RunConfig) -> Literal["clip", "imagenet"]:
    """The mean and standard deviation that normalise the ViT's pixels: CLIP's or ImageNet's (see VisionTower)."""
    return "imagenet" if config.compat else "clip"


def _longest(manifest: Manifest, visual_tokens: int) -> int:
    """Positions of the longest sample, with the modality token, if an image has `visual_tokens`."""
    image_head, text_head = (len(manifest.frame.head(has, visual_tokens)) for has in (True, False))
    splits = manifest.splits.values()
    longest_image = max((s.longest_image + image_head for s in splits if s.longest_image), default=0)
    longest_text = max((s.longest_text + text_head for s in splits if s.longest_text), default=0)
    return 1 + max(longest_image, longest_text)
