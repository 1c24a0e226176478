"""The generation engine: requests in, tokens out, many at a time.

Each request has its own slot in the KV cache. Each step is one pass of the model over the tokens that are due: a part
of the prompts that are being read, and one token of each answer that is being written. They are packed into one row
without padding. When an answer ends, the next request gets its slot at once. A free slot keeps its content: if another
prompt begins in the same way (the next turn of a conversation, a benchmark's preset), only its rest is read.

With tensor parallelism each rank has its own engine, and all ranks get the same requests in the same order.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from lavin_ds.data.layout import Frame
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.generation.request import Answer, Finish, Logprob, Request, random_stream
from lavin_ds.generation.sampling import choose
from lavin_ds.generation.text import AnswerText
from lavin_ds.models.cache import KVCache, Reads
from lavin_ds.models.lavin import Lavin

READ_AT_ONCE = 2048  # prompt tokens per step; a limit, so that answers being written do not wait for long
SHARED = 32  # the shortest common beginning, in tokens, that is reused from another slot
IMAGES_KEPT = 64  # images whose visual tokens are kept, the most recent ones


@dataclass(eq=False)
class _Sequence:
    """A request in progress. `ids` are its tokens so far: the prompt's and the answer's."""

    request: Request
    answer: Answer
    ids: list[int]  # a visual token is a negative number, unique to its image and its place there
    prompt_length: int
    image_key: bytes | None  # its image's digest
    text: AnswerText
    stream: np.random.Generator
    slot: int = -1
    visual_PD: torch.Tensor | None = None
    scored: list[torch.Tensor] = field(default_factory=list)

    @property
    def has_image(self) -> bool:
        """Decides the routing, and so every key and value."""
        return self.image_key is not None

    @property
    def scored_count(self) -> int:
        return 0 if self.request.scored_ids is None else len(self.request.scored_ids)


@dataclass(frozen=True)
class _Held:
    """The content of a free slot."""

    ids: list[int]
    has_image: bool


class Engine:
    """Answers requests with `model`, in `slots` slots of `capacity` tokens each.

    capacity counts BOS, prefix, visual tokens, prompt and answer. The default `frame` is the tokenizer's. The KV cache
    is allocated here, once, and takes `KVCache.bytes_needed` bytes. Dropout is switched off.

    Raises:
        UserError: the device has no memory for the cache; or more than one slot with compat weights, whose answers
            depend on what else is in the batch.
    """

    def __init__(
        self,
        model: Lavin,
        tokenizer: Tokenizer,
        slots: int = 32,
        capacity: int = 2048,
        frame: Frame | None = None,
    ):
        if model.compat and slots != 1:
            raise UserError("compat: lavin-official answers one request at a time: use 1 slot.")
        self.model, self.tokenizer, self.frame = model.eval(), tokenizer, frame or Frame.of(tokenizer)
        self.weight = model.llm.norm.weight
        try:
            self.cache = KVCache(model.llm.config, slots, capacity, self.weight.dtype, self.weight.device)
        except torch.OutOfMemoryError:
            raise UserError(
                f"The GPU has no memory for {slots} slots of {capacity} tokens: use fewer or shorter ones."
            ) from None
        self.waiting: deque[_Sequence] = deque()
        self.running: dict[int, _Sequence] = {}  # by slot
        self.free = OrderedDict(
            (slot, _Held([], False)) for slot in range(slots)
        )  # the one free for longest comes first
        self.images: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    # -- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Answer:
        """Queues a request; the answer is filled by `step`.

        Raises:
            UserError: the prompt leaves no room for an answer, or has ids that the model does not know.
        """
        has_image = request.image is not None and self.model.sees
        head = self.frame.head(has_image, self.model.visual_count)
        image_key = _digest(request.image) if has_image else None
        if has_image:
            start, count = self.frame.visual_start(True, self.model.visual_count), self.model.visual_count
            head[start : start + count] = _image_ids(image_key, count)
        scored = [] if request.scored_ids is None else list(map(int, request.scored_ids))
        own = [*map(int, request.prompt_ids), *scored]
        if any(not 0 <= id < self.model.config.llm.vocab_size for id in own):
            raise UserError(f"Request {request.id} has an id that is not in the model's vocabulary.")
        ids = [*head, *own]
        if len(ids) + (request.max_new_tokens > 0) > self.cache.capacity:
            raise UserError(
                f"Request {request.id} has a prompt of {len(ids)} tokens, but there is room for only "
                f"{self.cache.capacity} with the answer: shorten it."
            )
        answer = Answer(request.id, prompt_tokens=len(ids))
        text = AnswerText(self.tokenizer, request.stop)
        stream = random_stream(request.sampling.seed, request.id)
        self.waiting.append(_Sequence(request, answer, ids, len(ids), image_key, text, stream))
        return answer

    def cancel(self, request_id: str) -> None:
        """Ends a request, if it is still there; its slot is free at once."""
        for sequence in [*self.waiting, *self.running.values()]:
            if sequence.request.id == request_id:
                self._finish(sequence, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.running)

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answers all requests, and yields each answer as soon as it is complete."""
        requests, answers = iter(requests), {}
        while True:
            while len(self.waiting) < self.cache.slots:
                request = next(requests, None)
                if request is None:
                    break
                answers[request.id] = self.submit(request)
            if not self.busy:
                return
            yield from (answer for answer in self.step() if answer.finish and answers.pop(answer.id, None))

    # -- a step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """One pass of the model. Returns the answers that have changed."""
        self._admit()
        if not self.running:
            return []
        due = self._due()
        hidden_ND, reads = self._read(due)
        return self._write(due, hidden_ND, reads)

    def _admit(self) -> None:
        """Gives free slots to waiting requests, first come first served."""
        admitted = []
        while self.waiting and self.free:
            sequence = self.waiting[0]
            source, shared = self._beginning(sequence)
            if shared > self.cache.lengths[source]:
                break  # another request is still reading this beginning; in a later step it can be copied
            target = next(iter(self.free))
            if source in self.free and shared == len(self.free[source].ids):
                target = source  # the request continues all that the slot holds
            elif shared:
                self.cache.copy(source, target, shared)
            self.cache.lengths[target] = shared
            del self.free[target]
            sequence.slot = target
            self.running[target] = sequence
            admitted.append(self.waiting.popleft())
        self._see([sequence for sequence in admitted if sequence.has_image])

    def _beginning(self, sequence: _Sequence) -> tuple[int, int]:
        """The slot with the longest common beginning, and its length in tokens. The slot may still be reading it."""
        best, shared = next(iter(self.free)), 0
        if self.model.compat:
            return best, shared
        # The last token before the first prediction is always read, because its hidden state makes the prediction.
        wanted = sequence.ids[: sequence.prompt_length - sequence.scored_count - 1]
        for slot, other in [*self.free.items(), *self.running.items()]:
            if other.has_image == sequence.has_image:
                common = _common(other.ids, wanted)
                if common >= max(SHARED, shared + 1):
                    best, shared = slot, common
        return best, shared

    def _due(self) -> list[tuple[_Sequence, int]]:
        """The tokens that this step reads: each running sequence, with the number of its tokens, by slot."""
        due, budget = [], READ_AT_ONCE
        for sequence in self.running.values():
            unread = len(sequence.ids) - self.cache.lengths[sequence.slot]
            if unread > 1:
                unread = min(unread, budget)
                budget -= unread
            if unread:
                due.append((sequence, unread))
        return sorted(due, key=lambda read: read[0].slot)

    def _read(self, due: Sequence[tuple[_Sequence, int]]) -> tuple[torch.Tensor, Reads]:
        """Runs the model: hidden states [N, D] of all tokens that are due."""
        reads = Reads(self.cache, [sequence.slot for sequence, _ in due], [count for _, count in due])
        ids, visual_rows, visual = [], [], []
        positions = []
        for (sequence, count), held in zip(due, reads.held, strict=True):
            part = sequence.ids[held : held + count]
            if sequence.has_image:
                rows = [n for n, id in enumerate(part) if id < 0]
                if rows:
                    first = sum(id < 0 for id in sequence.ids[:held])
                    visual_rows += [len(ids) + n for n in rows]
                    visual.append(sequence.visual_PD[first : first + len(rows)])
            # compat: the authors put generated tokens one position too early (reference.md, section 7).
            early = self.model.shifted_decoding and held >= sequence.prompt_length
            positions += range(held + (not early), held + count + (not early))
            ids += [max(id, 0) for id in part]
        device = self.weight.device

        def placed(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)

        hidden_ND = self.model.read(
            placed(ids),
            placed([int(sequence.has_image) for sequence, _ in due]),
            reads,
            placed(visual_rows),
            torch.cat(visual) if visual else None,
            placed(positions) if self.model.shifted_decoding else None,
        )
        return hidden_ND, reads

    def _write(self, due: Sequence[tuple[_Sequence, int]], hidden_ND: torch.Tensor, reads: Reads) -> list[Answer]:
        """Chooses a token for each sequence that is read to its end; returns the answers that have changed."""
        ready, last, row = [], [], 0
        for (sequence, count), held in zip(due, reads.held, strict=True):
            self._score(sequence, hidden_ND[row : row + count], held)
            row += count
            if held + count == len(sequence.ids):
                ready.append(sequence)
                last.append(row - 1)
        writing = [sequence for sequence in ready if sequence.request.max_new_tokens]
        for sequence in ready:
            if not sequence.request.max_new_tokens:
                self._finish(sequence, "length")
        if writing:
            kept = [at for at, sequence in zip(last, ready, strict=True) if sequence.request.max_new_tokens]
            logits_BV = self.model.llm.logits(hidden_ND[torch.tensor(kept).to(hidden_ND.device)])
            uniform = [float(sequence.stream.random(dtype=np.float32)) for sequence in writing]
            ids_B = choose(logits_BV, [sequence.request.sampling for sequence in writing], uniform)
            logprobs = self._logprobs(writing, logits_BV, ids_B)
            # Here the host waits for the device.
            for sequence, id, logprob in zip(writing, ids_B.tolist(), logprobs, strict=True):
                self._append(sequence, id, logprob)
        return [sequence.answer for sequence in ready]

    def _append(self, sequence: _Sequence, id: int, logprob: Logprob | None) -> None:
        answer, request = sequence.answer, sequence.request
        if logprob:
            answer.logprobs.append(logprob)
        if id == self.tokenizer.eos_id:
            return self._finish(sequence, "eos")
        answer.ids.append(id)
        sequence.ids.append(id)
        answer.text, stopped = sequence.text.growing(answer.ids)
        if stopped:
            self._finish(sequence, "stop")
        elif len(answer.ids) == request.max_new_tokens or len(sequence.ids) == self.cache.capacity:
            self._finish(sequence, "length")

    def _finish(self, sequence: _Sequence, how: Finish) -> None:
        answer = sequence.answer
        answer.finish = how
        answer.text, _ = sequence.text.whole(answer.ids)
        answer.scored_logprobs = [value for scored in sequence.scored for value in scored.tolist()]
        if sequence.slot in self.running and self.running[sequence.slot] is sequence:
            del self.running[sequence.slot]
            self.free[sequence.slot] = _Held(sequence.ids[: self.cache.lengths[sequence.slot]], sequence.has_image)
        else:
            self.waiting.remove(sequence)

    # -- probabilities ----------------------------------------------------------------------------------------------

    def _score(self, sequence: _Sequence, hidden_TD: torch.Tensor, held: int) -> None:
        """Adds the log-probabilities of the scored ids that these tokens predict. Each token predicts the next one."""
        start = max(held, sequence.prompt_length - sequence.scored_count - 1)
        end = min(held + len(hidden_TD), sequence.prompt_length - 1)
        if start >= end:
            return
        targets_T1 = torch.tensor(sequence.ids[start + 1 : end + 1]).to(hidden_TD.device)[:, None]
        logits_TV = self.model.llm.logits(hidden_TD[start - held : end - held])
        sequence.scored.append(torch.log_softmax(logits_TV.float(), -1).gather(1, targets_T1)[:, 0])

    @staticmethod
    def _logprobs(sequences: Sequence[_Sequence], logits_BV: torch.Tensor, ids_B: torch.Tensor) -> list[Logprob | None]:
        wanted = [b for b, sequence in enumerate(sequences) if sequence.request.top_logprobs is not None]
        found: list[Logprob | None] = [None] * len(sequences)
        if not wanted:
            return found
        row_B = torch.tensor(wanted).to(logits_BV.device)
        logprob_BV = torch.log_softmax(logits_BV[row_B].float(), -1)
        chosen_B = ids_B[row_B]
        values = logprob_BV.gather(1, chosen_B[:, None])[:, 0].tolist()
        most = max(sequences[b].request.top_logprobs for b in wanted)
        top = logprob_BV.topk(min(most, logprob_BV.shape[1]), dim=-1)
        for b, id, value, top_values, top_ids in zip(
            wanted, chosen_B.tolist(), values, top.values.tolist(), top.indices.tolist(), strict=True
        ):
            count = sequences[b].request.top_logprobs
            found[b] = Logprob(id, value, tuple(zip(top_ids[:count], top_values[:count], strict=True)))
        return found

    # -- images -----------------------------------------------------------------------------------------------------

    def _see(self, sequences: Sequence[_Sequence]) -> None:
        """Gives sequences their visual tokens [P, D]. An image whose visual tokens are kept is not encoded again."""
        new = {}
        for sequence in sequences:
            if sequence.image_key in self.images:
                self.images.move_to_end(sequence.image_key)
            else:
                new.setdefault(sequence.image_key, sequence.request.image)
        if new:
            stack = torch.from_numpy(np.stack(list(new.values()))).to(self.weight.device)
            self.images.update(zip(new, self.model.visual_tokens(stack), strict=True))
        for sequence in sequences:
            sequence.visual_PD = self.images[sequence.image_key]
        for key in list(islice(self.images, max(0, len(self.images) - IMAGES_KEPT))):
            del self.images[key]


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


def _image_ids(image_key: bytes, count: int) -> list[int]:
    """Negative numbers that stand for an image's visual tokens. Different images have different numbers."""
    number = int.from_bytes(image_key[:7], "big")
    return [-1 - number * count - p for p in range(count)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning of two lists."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    low, high = 0, shorter  # the lists agree up to low and differ somewhere before high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low
