"""`lavin-ds generate`: answers to one prompt, or to a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lavin_ds.cli import console
from lavin_ds.cli.model_options import Adapter, Clip, Llama, MaxNewTokens, Recipe, Run, Seed, Temperature, TopP
from lavin_ds.errors import UserError


def generate(
    text: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="What to ask.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to ask about.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON Lines of {"id", "prompt", "image"}; images are paths beside the file.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --prompts: JSON Lines to write or to continue.")] = None,
    run: Run = None,
    recipe: Recipe = None,
    llama: Llama = None,
    clip: Clip = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="With --prompts: prompts answered at a time.")] = 16,
) -> None:
    """Ask a run, an exported adapter or a base one prompt, or a file of prompts."""
    from lavin_ds.generation.request import Sampling
    from lavin_ds.generation.subject import find_subject

    if (text is None) == (prompts is None):
        raise UserError("Give a PROMPT in quotes, or --prompts FILE with --out FILE.")
    if (prompts is None) != (out is None):
        raise UserError("--prompts and --out go together.")
    if prompts is not None and image is not None:
        raise UserError("--image goes with one PROMPT; in --prompts each line names its own.")
    sampling = Sampling(temperature, top_p, seed=seed)
    subject = find_subject(run, recipe, [], llama, clip, adapter)
    if text is not None:
        _answer_one(subject, text, image, max_new_tokens, sampling)
    else:
        _answer_file(subject, prompts, out, max_new_tokens, sampling, batch_size)


def _answer_one(subject, text: str, image: Path | None, max_new_tokens: int, sampling) -> None:
    with console.err.status("loading"):
        from lavin_ds.generation.assistant import Assistant

        assistant = Assistant(subject)
        picture = assistant.read_image(image) if image else None
    prompt = assistant.prompt(text, picture, max_new_tokens)
    console.stream(
        answer.text.strip()
        for answer in assistant.stream(assistant.request("prompt", prompt, max_new_tokens, sampling))
    )


def _answer_file(subject, prompts: Path, out: Path, max_new_tokens: int, sampling, batch_size: int) -> None:
    from lavin_ds.generation.prompt_file import AnswerFile, read_prompts

    records = read_prompts(prompts)
    answers = AnswerFile(out, records)
    left = [record for record in records if record.id not in answers.done]
    if answers.done:
        console.err.print(f"{len(answers.done):,} of {len(records):,} are already answered in {out}.", highlight=False)
    if left:
        from lavin_ds.generation.assistant import Assistant

        with console.progress("loading weights") as update:
            assistant = Assistant(subject, batch_size, on_progress=lambda _, done, total: update(done, total))
        with console.progress("answering", len(left)) as update, answers:
            for number, answer in enumerate(answers.ask(assistant, left, max_new_tokens, sampling), start=1):
                answers.write(answer)
                update(number)
    console.out.print(f"{len(records):,} answers in {out}", highlight=False)
