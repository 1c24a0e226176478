"""A loaded model that answers people. It turns text and pictures into requests to the generation engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lavin_ds.data.images import ImageError, decode, resize
from lavin_ds.errors import UserError
from lavin_ds.generation.engine import Engine
from lavin_ds.generation.request import GREEDY, Answer, Request, Sampling
from lavin_ds.generation.subject import Subject, find_tokenizer
from lavin_ds.generation.wording import Exchange, Wording
from lavin_ds.parallel import initialize_single_process
from lavin_ds.weights.base import Progress, build_model, check_inputs

LARGEST_FILE = 50 * 2**20  # bytes of a picture's file


@dataclass(frozen=True)
class Prompt:
    """A person's question. earlier_turns: the number of earlier turns that `ids` include."""

    text: str
    image: np.ndarray | None
    ids: list[int]
    earlier_turns: int


class Assistant:
    """The model of a subject, with `slots` slots of `max_length` positions (default: the recipe's data.max_length)."""

    def __init__(
        self,
        subject: Subject,
        slots: int = 1,
        max_length: int | None = None,
        on_progress: Progress | None = None,
    ):
        """Raises UserError if a file is missing or does not fit the recipe, or memory is short."""
        config = subject.config
        check_inputs(config, subject.llama, subject.clip)
        if config.model.vision_source == "cached":
            raise UserError(
                f"Recipe {config.name} reads cached features, which a new picture does not have: give a recipe with "
                "model.vision_source pixels, and --clip."
            )
        tokenizer = find_tokenizer(subject)
        initialize_single_process()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = config
        self.model = build_model(config, subject.llama, subject.clip, subject.adapter, device, on_progress)
        slots = 1 if self.model.compat else slots
        # max_length also counts the modality token, which takes no place in a slot.
        self.engine = Engine(self.model, tokenizer, slots, (max_length or config.data.max_length) - 1)
        self.wording = Wording(config, tokenizer)

    def read_image(self, path: Path) -> np.ndarray:
        """Pixels of a file as the model sees them, uint8 [S, S, 3].

        Raises:
            UserError: the model sees no images, or the file is not an image that can be used.
        """
        if not self.model.sees:
            raise UserError(f"Recipe {self.config.name} is text-only: it sees no pictures.")
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise UserError(f"{path} has more than {LARGEST_FILE // 2**20} MiB: give a smaller picture.")
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from None
        try:
            return resize(decode(content), self.config.model.vision.image_size, self.config.data.image_resize)
        except ImageError as error:
            raise UserError(f"{path} {error}.") from None

    def prompt(
        self, text: str, image: np.ndarray | None, max_new_tokens: int, history: Sequence[Exchange] = ()
    ) -> Prompt:
        """Makes the prompt of a question. If earlier turns leave no room for an answer, the oldest are left out.

        Raises:
            UserError: the question leaves no room for an answer.
        """
        head = len(self.engine.frame.head(image is not None, self.model.visual_count))
        room = self.engine.cache.capacity - head
        ids, earlier = self.wording.prompt_ids(text, history, room, max_new_tokens)
        return Prompt(text, image, ids, earlier)

    def request(
        self, id: str, prompt: Prompt, max_new_tokens: int, sampling: Sampling = GREEDY, stop: tuple[str, ...] = ()
    ) -> Request:
        return Request(id, np.asarray(prompt.ids), prompt.image, max_new_tokens, sampling, stop)

    def stream(self, request: Request) -> Iterator[Answer]:
        """Yields the answer each time it has grown. Ending the iteration early cancels the request."""
        answer = self.engine.submit(request)
        try:
            while not answer.finish:
                self.engine.step()
                yield answer
        finally:
            self.engine.cancel(request.id)
