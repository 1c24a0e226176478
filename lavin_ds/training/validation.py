"""Loss and accuracy on held-out samples during a run. They do not affect the training.

The accuracy checks one token per sample: given the true response up to "The answer is", does the right letter have the
highest logit among the question's letters? It adds almost no cost to the loss. It is not the score of `lavin-ds eval`,
where the model generates the whole response. If the responses of a format begin with the answer (QCM-A, QCM-ALE, ...),
the two differ only as long as the model does not write "The answer is". Other formats have no accuracy here, because
their true response gives the answer away before the letter.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from lavin_ds.config import RunConfig
from lavin_ds.data.collate import Batch
from lavin_ds.data.layout import IGNORE
from lavin_ds.data.prompts import LETTERS, SCIENCEQA_FORMATS
from lavin_ds.data.sampler import epoch_order
from lavin_ds.data.shards import Row, ShardReader
from lavin_ds.parallel import data_parallel_rank, data_parallel_size, tensor_parallel_size
from lavin_ds.training.feed import Feed, in_background
from lavin_ds.training.stop import StopSignal

MOST_CHOICES = 5  # of a ScienceQA question


@dataclass(frozen=True)
class Scores:
    """val_loss: nats per labelled token. val_answer_accuracy: see above; None if the format does not allow it."""

    val_loss: float
    val_answer_accuracy: float | None
    val_seconds: float


class Validation:
    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: RunConfig, reader: ShardReader, device: torch.device):
        self.engine, self.reader, self.device = engine, reader, device
        self.feed = Feed(config, reader, device)
        self.answer = _AnswerToken.of(config, reader)
        rows = validation_rows(config, reader)
        rows = rows[np.argsort(self.feed.lengths[rows], kind="stable")]
        self.parts = np.array_split(rows, math.ceil(len(rows) / config.training.micro_batch))

    def run(self, stop: StopSignal) -> Scores | None:
        """Returns the scores, the same on all ranks; None if a stop was requested before the last batch. Every rank
        must call it."""
        began = time.perf_counter()
        ranks, rank = data_parallel_size(), data_parallel_rank()
        # sums of: loss, labels, right answers, questions
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        # Under ZeRO-3 all ranks must call the model the same number of times, so a rank with one part less repeats one.
        mine = range(rank, ranks * math.ceil(len(self.parts) / ranks), ranks)
        self.engine.eval()
        with torch.no_grad(), in_background(self.feed.batch(self.parts[i % len(self.parts)]) for i in mine) as batches:
            for i, batch in zip(mine, batches, strict=True):
                part = self._score(batch, self.parts[i % len(self.parts)])
                if i < len(self.parts):
                    sums += part
                if i != mine[-1] and self._is_stop_wanted(stop):
                    return None
        self.engine.train()
        sums /= tensor_parallel_size()
        dist.all_reduce(sums)
        loss, labels, right, questions = sums.tolist()
        accuracy = right / questions if questions else None
        return Scores(loss / labels, accuracy, time.perf_counter() - began)

    def _is_stop_wanted(self, stop: StopSignal) -> bool:
        """Whether any rank was asked to stop; the same on all ranks."""
        wanted = torch.tensor(float(stop.is_wanted()), device=self.device)
        dist.all_reduce(wanted)
        return bool(wanted)

    def _score(self, batch: Batch, rows: np.ndarray) -> torch.Tensor:
        if self.answer is None:
            loss_sum, labels = self.engine(batch.to(self.device))
            right = questions = 0
        else:
            letter_B = self.answer.position(batch)
            loss_sum, labels, logits_BV = self.engine(batch.to(self.device), letter_B.to(self.device))
            right, questions = self.answer.count(
                batch, letter_B, logits_BV.cpu(), [self.reader.row(int(i)) for i in rows]
            )
        return torch.stack([loss_sum.double(), *loss_sum.new_tensor([labels, right, questions], dtype=torch.float64)])


def validation_rows(config: RunConfig, reader: ShardReader) -> np.ndarray:
    """The samples that a run validates on. They are the same in every run on these shards."""
    order = epoch_order(len(reader.trainable), seed=0, epoch=0)
    return reader.trainable[order[: config.training.validation_samples]]


@dataclass(frozen=True)
class _AnswerToken:
    """The position of the answer's letter in a response, and the token ids of the letters."""

    offset: int  # tokens of the response before the letter
    letters: tuple[int, ...]

    @classmethod
    def of(cls, config: RunConfig, reader: ShardReader) -> _AnswerToken | None:
        """The position and ids for a recipe's format and tokenizer.

        None if the responses do not begin with the answer, or the letters do not have one token each.
        """
        format = config.data.prompt_format
        if format not in SCIENCEQA_FORMATS or not format.split("-")[1].startswith("A"):
            return None
        spelled = reader.tokenizer.encode_continuation_batch(
            [f" The answer is {letter}." for letter in LETTERS[:MOST_CHOICES]]
        )
        offset = next((i for i, ids in enumerate(zip(*spelled, strict=False)) if len(set(ids)) > 1), None)
        letters = tuple(ids[offset] for ids in spelled) if offset is not None else ()
        return cls(offset, letters) if len(set(letters)) == MOST_CHOICES else None

    def position(self, batch: Batch) -> torch.Tensor:
        """Index of each sample's letter in the flattened ids_BT; [B]."""
        is_label_N = batch.labels_BT.flatten() != IGNORE
        first_B = [int(is_label_N[start:].int().argmax()) + start for start in batch.first_B.tolist()]
        last = is_label_N.numel() - 1
        return torch.tensor([min(i + self.offset, last) for i in first_B], device=is_label_N.device)

    def count(self, batch: Batch, letter_B: torch.Tensor, logits_BV: torch.Tensor, rows: list[Row]) -> tuple[int, int]:
        """Numbers of right answers and of questions. A response that was cut before its letter is not counted."""
        right = questions = 0
        for row, token, logits_V in zip(rows, batch.ids_BT.flatten()[letter_B].tolist(), logits_BV, strict=True):
            if 0 < row.n_choices <= MOST_CHOICES and token == self.letters[row.answer]:
                questions += 1
                right += int(logits_V[list(self.letters[: row.n_choices])].argmax()) == row.answer
        return right, questions
