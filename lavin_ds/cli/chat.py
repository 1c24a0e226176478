"""`lavin-ds chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lavin_ds.cli import console
from lavin_ds.cli.model_options import Adapter, Clip, Llama, MaxNewTokens, Recipe, Run, Seed, Temperature, TopP
from lavin_ds.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import
    import numpy as np

    from lavin_ds.generation.assistant import Assistant
    from lavin_ds.generation.request import Sampling
    from lavin_ds.generation.wording import Exchange

HELP = """\
/image FILE   show the model a picture; /image alone removes it
/reset        forget the conversation and the picture
/save FILE    write the conversation as JSON
/help         list these commands
/quit         end; so does Ctrl-D. Ctrl-C stops an answer."""


def chat(
    run: Run = None,
    recipe: Recipe = None,
    llama: Llama = None,
    clip: Clip = None,
    adapter: Adapter = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin with.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a run, an exported adapter or a base, in the terminal."""
    from lavin_ds.generation.request import Sampling
    from lavin_ds.generation.subject import find_subject

    sampling = Sampling(temperature, top_p, seed=seed)
    subject = find_subject(run, recipe, [], llama, clip, adapter)
    with console.err.status("loading"):
        from lavin_ds.generation.assistant import Assistant

        assistant = Assistant(subject)
    with suppress(ImportError):
        import readline  # noqa: F401, gives `input` a history and the arrow keys
    console.err.print(f"{subject.config.name}. {assistant.wording.explain()}\n/help lists commands.", highlight=False)
    Chat(assistant, max_new_tokens, sampling).talk(image)


class Chat:
    """The conversation so far, and the current picture."""

    def __init__(self, assistant: Assistant, max_new_tokens: int, sampling: Sampling):
        self.assistant, self.max_new_tokens, self.sampling = assistant, max_new_tokens, sampling
        self.history: list[Exchange] = []
        self.image: np.ndarray | None = None
        self.image_file: Path | None = None
        self.asked = 0

    def talk(self, image: Path | None) -> None:
        """Reads questions until the input ends."""
        if image:
            self._look(image)
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                console.err.print("\n/quit or Ctrl-D ends.", highlight=False)
                continue
            if text == "/quit":
                return
            if text:
                with console.telling_errors():
                    self._command(text) if text.startswith("/") else self._ask(text)

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip().strip("'\"")
        if name == "/image" and rest:
            self._look(Path(rest).expanduser())
        elif name == "/image":
            self.image = self.image_file = None
            console.err.print("No picture.", highlight=False)
        elif name == "/reset":
            self.history, self.image, self.image_file = [], None, None
            console.err.print("Forgotten.", highlight=False)
        elif name == "/save" and rest:
            self._save(Path(rest).expanduser())
        elif name == "/help":
            console.err.print(HELP, highlight=False, markup=False)
        else:
            raise UserError(f"{text} is not a command: /help lists them.")

    def _look(self, file: Path) -> None:
        self.image, self.image_file = self.assistant.read_image(file), file
        console.err.print(f"Looking at {file}.", highlight=False, markup=False)
        if self.history and self.assistant.wording.remembers:
            self.history = []  # recipes train on one picture per conversation
            console.err.print("A new picture begins a new conversation.", highlight=False)

    def _ask(self, text: str) -> None:
        from lavin_ds.generation.wording import Exchange

        prompt = self.assistant.prompt(text, self.image, self.max_new_tokens, self.history)
        if self.assistant.wording.remembers and prompt.earlier_turns < len(self.history):
            dropped = len(self.history) - prompt.earlier_turns
            console.err.print(
                f"[dim]The first {dropped} turns do not fit any more and are left out.[/]", highlight=False
            )
        self.asked += 1
        request = self.assistant.request(f"turn-{self.asked}", prompt, self.max_new_tokens, self.sampling)
        stream, said = self.assistant.stream(request), ""
        try:
            said = console.stream(answer.text.strip() for answer in stream)
        except console.Stopped as stopped:
            stream.close()
            said = stopped.text
        self.history.append(Exchange(text, said))

    def _save(self, file: Path) -> None:
        from lavin_ds.files import write_json

        turns = [{"asked": turn.asked, "said": turn.said} for turn in self.history]
        try:
            write_json(file, {"image": str(self.image_file) if self.image_file else None, "turns": turns})
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}).") from None
        console.err.print(f"Saved {len(turns)} turns in {file}.", highlight=False, markup=False)
