"""The sequence layout: the position of every token of a sample. Pure functions on numpy arrays.

Dimensions: T tokens of a laid-out sample, P visual tokens, S label spans.

    image: [BOS]["Image: "   ][P placeholders, id 0][prompt][response][EOS]
    text : [BOS]["Image: N/A"                      ][prompt][response][EOS]

The ids do not include the modality token t_m. The model puts it before them, at RoPE position 0, so BOS has position 1.
`max_length` counts it, so a sample has at most max_length - 1 ids.

There is one label per id, and labels are not shifted: label[i] is ids[i] in the response and its EOS, and IGNORE
elsewhere. The model's loss shifts them: position i - 1 predicts label i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lavin_ds.data.tokenizer import Tokenizer

IGNORE = -100
PLACEHOLDER = 0  # the model replaces it with a visual token; the same id as padding
IMAGE_PREFIX = "Image: "
TEXT_PREFIX = "Image: N/A"


@dataclass(frozen=True)
class Frame:
    """The ids that stand before a sample's own tokens. They depend on the tokenizer alone."""

    bos: int
    prefix_image: tuple[int, ...]
    prefix_text: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Frame:
        """Encodes the prefixes.

        LLaMA's tokenizer puts a space between "Image: N/A" and the prompt. If a tokenizer does not, a line break is
        put there: byte-level vocabularies have a token for it.
        """
        text_prefix = TEXT_PREFIX if tokenizer.adds_space else TEXT_PREFIX + "\n"
        return cls(tokenizer.bos_id, tuple(tokenizer.encode(IMAGE_PREFIX)), tuple(tokenizer.encode(text_prefix)))

    def head(self, has_image: bool, visual_tokens: int) -> list[int]:
        """Everything before the prompt. If `visual_tokens` is 0, every sample is laid out as text."""
        if has_image and visual_tokens:
            return [self.bos, *self.prefix_image, *[PLACEHOLDER] * visual_tokens]
        return [self.bos, *self.prefix_text]

    def visual_start(self, has_image: bool, visual_tokens: int) -> int:
        """Index of the first visual token among the ids, or -1."""
        return 1 + len(self.prefix_image) if has_image and visual_tokens else -1


@dataclass(frozen=True)
class Layout:
    """One laid-out sample: ids [T] and labels [T], int64. visual_start is the first visual token's index, or -1."""

    ids: np.ndarray
    labels: np.ndarray
    visual_start: int


def lay_out(
    token_ids: np.ndarray, label_spans: np.ndarray, has_image: bool, frame: Frame, visual_tokens: int
) -> Layout:
    """Puts BOS, prefix and visual placeholders before a sample's own tokens (prompt, response, EOS).

    token_ids [n]; label_spans [S, 2], half-open and over token_ids.
    """
    head = frame.head(has_image, visual_tokens)
    ids = np.concatenate([np.asarray(head, dtype=np.int64), np.asarray(token_ids, dtype=np.int64)])
    labels = np.full_like(ids, IGNORE)
    for start, end in np.asarray(label_spans, dtype=np.int64).reshape(-1, 2) + len(head):
        labels[start:end] = ids[start:end]
    return Layout(ids, labels, frame.visual_start(has_image, visual_tokens))


def laid_out_lengths(token_counts, has_image, frame: Frame, visual_tokens: int) -> np.ndarray:
    """The number of ids, without the modality token, of samples that have `token_counts` own tokens; [rows]."""
    heads = np.where(has_image, len(frame.head(True, visual_tokens)), len(frame.head(False, visual_tokens)))
    return np.asarray(token_counts, dtype=np.int64) + heads


def room(max_length: int, has_image: bool, frame: Frame, visual_tokens: int) -> int:
    """How many own tokens (prompt, response, EOS) a sample may have; below 1 if nothing fits."""
    return max_length - 1 - len(frame.head(has_image, visual_tokens))


def official_layout(
    ids: np.ndarray,
    labels: np.ndarray,
    is_image: bool,
    prefix_ids: np.ndarray,
    visual_tokens: int,
    max_length: int,
) -> Layout:
    """Lays out an item of the authors' data set as their model does, without the modality token.

    ids [n] start with BOS and end with EOS and padding (id 0); labels [n] are 0 where there is no label. Prefix and
    visual slots are inserted after BOS, and the end is cut off at `max_length`. The authors cut twice, before and
    after they add the modality token; one cut gives the same. Returns ids and labels of
    min(max_length - 1, n + prefix + visual) positions, padding included. Labels with id 0 (<unk>) are lost, as in
    the authors' code.
    """
    visual = visual_tokens if is_image else 0
    inserted = np.concatenate([np.asarray(prefix_ids, dtype=np.int64), np.full(visual, PLACEHOLDER)])
    full_ids = np.concatenate([ids[:1], inserted, ids[1:]]).astype(np.int64)[: max_length - 1]
    full_labels = np.concatenate([labels[:1], np.zeros_like(inserted), labels[1:]]).astype(np.int64)
    full_labels = full_labels[: max_length - 1]
    visual_start = 1 + len(prefix_ids) if visual else -1
    return Layout(full_ids, np.where(full_labels == 0, IGNORE, full_labels), visual_start)
