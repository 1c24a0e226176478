"""A small ScienceQA: generated questions and pictures in the official schema and folder layout.

Half the questions are about a picture, half are text alone. There are seven kinds of each, used in turn.

No picture question can be answered from its text. What the picture shows is drawn first, then the wrong
choices from the same pool, then the order; the question, the hint and the lecture do not depend on what is
shown. Every choice is therefore equally likely given the text: a reader who cannot see scores 1 / choices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

SIZE = 64  # pixels a side of a finished picture
CANVAS = 2 * SIZE  # drawn at twice the size, then reduced, for smooth edges
MAX_CHOICES = 5

NUMBERS = ("one", "two", "three", "four", "five")
COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (235, 215, 30),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = ("north", "east", "south", "west")  # clockwise from the top
DEGREES = ("10", "20", "30", "40", "50")
ATTRACTING = {"top": (True, False), "bottom": (False, True), "both": (True, True), "neither": (False, False)}

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Sam")
THINGS = ("kite", "ball", "cup", "hat", "book", "box")
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("old", "new"),
    ("wet", "dry"),
)
TENSES = {"past": "{name} walked home.", "present": "{name} walks home.", "future": "{name} will walk home."}
ANIMALS = {
    "mammal": ("dog", "cat", "horse"),
    "bird": ("owl", "duck", "eagle"),
    "fish": ("shark", "tuna", "salmon"),
    "insect": ("ant", "bee", "fly"),
}
MATTER = {
    "solid": ("rock", "coin", "brick"),
    "liquid": ("milk", "rain", "juice"),
    "gas": ("air", "steam", "helium"),
}
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
}

PICTURE_HINTS = ("", "", "Look at the picture.", "The picture shows what you need.")  # half have a hint

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Item:
    """One drawn question. Only picture questions have `picture` and `caption`."""

    question: str
    pool: Sequence[str]  # every possible choice, the right one included
    value: str  # the right choice
    solution: str
    hint: str = ""
    caption: str = ""
    picture: Callable[[Random], Image.Image] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of question: how to draw one, and the constants of its ScienceQA record."""

    draw: Callable[[Random], Item]
    subject: str
    topic: str
    category: str
    skill: str
    lecture: str


@dataclass(frozen=True)
class Sample:
    """One generated record, and for a picture question its picture and caption."""

    problem: dict
    caption: str = ""
    picture: Image.Image | None = None


def _blank(rng: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    background = tuple(rng.randint(215, 255) for _ in range(3))
    image = Image.new("RGB", (CANVAS, CANVAS), background)
    return image, ImageDraw.Draw(image)


def _tint(rng: Random, color: str) -> RGB:
    return tuple(min(255, max(0, channel + rng.randint(-18, 18))) for channel in COLORS[color])


def _around(x: float, y: float, radii: Sequence[float], turn: float) -> list[tuple[float, float]]:
    """Corners around (x, y), one for each radius; the first is `turn` radians clockwise from the top."""
    step = 2 * math.pi / len(radii)
    return [(x + r * math.sin(turn + i * step), y - r * math.cos(turn + i * step)) for i, r in enumerate(radii)]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: RGB) -> None:
    """A shape of outer radius about `r` pixels, centred on (x, y)."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.polygon(_around(x, y, [1.2 * r] * 4, math.pi / 4), fill=fill)
    elif shape == "triangle":
        draw.polygon(_around(x, y, [1.2 * r] * 3, 0), fill=fill)
    elif shape == "star":
        draw.polygon(_around(x, y, [1.25 * r, 0.5 * r] * 5, 0), fill=fill)
    else:
        arm = 0.35 * r
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)


def _picture_of_shapes(rng: Random, count: int, color: str, shape: str) -> Image.Image:
    """`count` shapes of one colour, each in a cell of its own of a 3 x 3 grid, moved about within it."""
    image, draw = _blank(rng)
    cell = CANVAS / 3
    for place in rng.sample(range(9), count):
        x = (place % 3 + 0.5) * cell + rng.uniform(-3, 3)
        y = (place // 3 + 0.5) * cell + rng.uniform(-3, 3)
        _draw_shape(draw, shape, x, y, rng.uniform(0.3, 0.36) * cell, _tint(rng, color))
    return image


def _picture_of_one_shape(rng: Random, color: str, shape: str) -> Image.Image:
    """One large shape, anywhere."""
    image, draw = _blank(rng)
    r = rng.uniform(0.2, 0.32) * CANVAS
    x, y = (rng.uniform(1.2 * r, CANVAS - 1.2 * r) for _ in range(2))
    _draw_shape(draw, shape, x, y, r, _tint(rng, color))
    return image


def _picture_of_magnets(rng: Random, attracting: str) -> Image.Image:
    """Two pairs of bar magnets, one above the other; north poles red, south poles blue."""
    image, draw = _blank(rng)
    length, height = rng.uniform(0.36, 0.42) * CANVAS, rng.uniform(0.16, 0.22) * CANVAS
    gap = rng.uniform(0.04, 0.1) * CANVAS
    for row, attracts in enumerate(ATTRACTING[attracting]):
        middle = CANVAS / 2 + rng.uniform(-4, 4)
        top = (0.25 + 0.5 * row) * CANVAS + rng.uniform(-6, 6) - height / 2
        facing = rng.choice(("red", "blue"))
        opposite = "blue" if facing == "red" else "red"
        left = [opposite, facing]
        right = [opposite, facing] if attracts else [facing, opposite]
        for start, poles in ((middle - gap / 2 - length, left), (middle + gap / 2, right)):
            for half, pole in enumerate(poles):
                x = start + half * length / 2
                draw.rectangle((x, top, x + length / 2, top + height), fill=_tint(rng, pole))
    return image


def _picture_of_thermometer(rng: Random, degrees: str) -> Image.Image:
    """A thermometer with a mark for every ten degrees from 0 to 60."""
    image, draw = _blank(rng)
    x = rng.uniform(0.3, 0.7) * CANVAS
    zero, sixty = 0.78 * CANVAS + rng.uniform(-3, 3), 0.1 * CANVAS + rng.uniform(-3, 3)
    width = rng.uniform(0.045, 0.07) * CANVAS
    level = zero + (sixty - zero) * int(degrees) / 60
    fluid = _tint(rng, "red")
    draw.rectangle((x - width, sixty, x + width, zero), fill=(250, 250, 250), outline=(60, 60, 60), width=2)
    draw.rectangle((x - width, level, x + width, zero), fill=fluid)
    bulb = 2 * width
    draw.ellipse((x - bulb, zero, x + bulb, zero + 2 * bulb), fill=fluid)
    for mark in range(7):
        y = zero + (sixty - zero) * mark / 6
        draw.line((x + width, y, x + 2.5 * width, y), fill=(60, 60, 60), width=2)
    return image


def _picture_of_compass(rng: Random, direction: str) -> Image.Image:
    """An arrow in a ring, within 12 degrees of the direction it stands for."""
    image, draw = _blank(rng)
    r = rng.uniform(0.32, 0.42) * CANVAS
    x, y = (CANVAS / 2 + rng.uniform(-8, 8) for _ in range(2))
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 250, 250), outline=(60, 60, 60), width=3)
    turn = DIRECTIONS.index(direction) * math.pi / 2 + math.radians(rng.uniform(-12, 12))
    needle = _tint(rng, rng.choice(list(COLORS)))
    draw.line(_around(x, y, [0.75 * r] * 2, turn), fill=needle, width=6)
    tip = _around(x, y, [0.6 * r] * 2, turn)[0]
    draw.polygon(_around(*tip, [0.4 * r] * 3, turn), fill=needle)
    return image


def _picture_of_bars(rng: Random, tallest: str, bars: Sequence[str]) -> Image.Image:
    """One bar for each colour, in random order, on a common floor."""
    image, draw = _blank(rng)
    floor, step = rng.uniform(0.88, 0.95) * CANVAS, CANVAS / (len(bars) + 1)
    highest = rng.uniform(0.7, 0.85) * CANVAS
    for place, color in enumerate(rng.sample(bars, len(bars))):
        height = highest * (1 if color == tallest else rng.uniform(0.2, 0.7))
        x = (place + 1) * step
        draw.rectangle((x - 0.35 * step, floor - height, x + 0.35 * step, floor), fill=_tint(rng, color))
    draw.line((4, floor, CANVAS - 4, floor), fill=(60, 60, 60), width=3)
    return image


def _count(rng: Random) -> Item:
    number, color, shape = rng.choice(NUMBERS), rng.choice(list(COLORS)), rng.choice(SHAPES)
    shown = shape if number == "one" else _plural(shape)
    return Item(
        question=f"How many {_plural(shape)} are in the picture?",
        pool=NUMBERS,
        value=number,
        hint=rng.choice(PICTURE_HINTS),
        solution=f"The number is {number}.",
        caption=f"{number} {color} {shown}",
        picture=lambda rng: _picture_of_shapes(rng, NUMBERS.index(number) + 1, color, shape),
    )


def _color(rng: Random) -> Item:
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    return Item(
        question=f"What color is the {shape} in the picture?",
        pool=list(COLORS),
        value=color,
        hint=rng.choice(PICTURE_HINTS),
        solution=f"The color is {color}.",
        caption=f"{color} {shape}",
        picture=lambda rng: _picture_of_one_shape(rng, color, shape),
    )


def _shape(rng: Random) -> Item:
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    return Item(
        question="Which word names the shape in the picture?",
        pool=SHAPES,
        value=shape,
        hint=rng.choice(PICTURE_HINTS),
        solution=f"The shape is {shape}.",
        caption=f"{color} {shape}",
        picture=lambda rng: _picture_of_one_shape(rng, color, shape),
    )


def _magnets(rng: Random) -> Item:
    attracting = rng.choice(list(ATTRACTING))
    return Item(
        question="Which pair of magnets attracts?",
        pool=list(ATTRACTING),
        value=attracting,
        hint=rng.choice(PICTURE_HINTS),
        solution=f"The pair is {attracting}.",
        caption=f"magnets {attracting}",
        picture=lambda rng: _picture_of_magnets(rng, attracting),
    )


def _thermometer(rng: Random) -> Item:
    degrees = rng.choice(DEGREES)
    return Item(
        question="How many degrees does the thermometer show?",
        pool=DEGREES,
        value=degrees,
        hint=rng.choice(PICTURE_HINTS),
        solution=f"The reading is {degrees}.",
        caption=f"thermometer {degrees}",
        picture=lambda rng: _picture_of_thermometer(rng, degrees),
    )


def _compass(rng: Random) -> Item:
    direction = rng.choice(DIRECTIONS)
    return Item(
        question="Which way does the arrow point?",
        pool=DIRECTIONS,
        value=direction,
        hint=rng.choice(PICTURE_HINTS),
        solution=f"The way is {direction}.",
        caption=f"arrow {direction}",
        picture=lambda rng: _picture_of_compass(rng, direction),
    )


def _bars(rng: Random) -> Item:
    bars = rng.sample(list(COLORS), rng.randint(2, 4))
    tallest = rng.choice(bars)
    return Item(
        question="Which bar is the tallest?",
        pool=bars,
        value=tallest,
        hint=rng.choice(PICTURE_HINTS),
        solution=f"The bar is {tallest}.",
        caption=f"bar {tallest}",
        picture=lambda rng: _picture_of_bars(rng, tallest, bars),
    )


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


def _told_color(rng: Random) -> Item:
    name, thing, color = rng.choice(NAMES), rng.choice(THINGS), rng.choice(list(COLORS))
    return Item(
        question=f"What color is the {thing}?",
        pool=list(COLORS),
        value=color,
        hint=f"{name} has a {color} {thing}.",
        solution=f"The color is {color}.",
    )


def _told_number(rng: Random) -> Item:
    name, thing, number = rng.choice(NAMES), rng.choice(THINGS), rng.choice(NUMBERS)
    held = thing if number == "one" else _plural(thing)
    return Item(
        question=f"How many {_plural(thing)} does {name} have?",
        pool=NUMBERS,
        value=number,
        hint=f"{name} has {number} {held}.",
        solution=f"The number is {number}.",
    )


def _opposite(rng: Random) -> Item:
    pair = rng.choice(OPPOSITES)
    word, opposite = rng.sample(pair, 2)
    return Item(
        question=f"What is the opposite of {word}?",
        pool=[other for pair in OPPOSITES for other in pair if other != word],
        value=opposite,
        solution=f"The opposite is {opposite}.",
    )


def _tense(rng: Random) -> Item:
    tense = rng.choice(list(TENSES))
    return Item(
        question=f"Which tense is this? {TENSES[tense].format(name=rng.choice(NAMES))}",
        pool=list(TENSES),
        value=tense,
        solution=f"The tense is {tense}.",
    )


def _member(rng: Random, groups: dict[str, tuple[str, ...]]) -> tuple[str, str, list[str]]:
    """A group, one of its members, and a pool of that member and the members of all other groups."""
    group = rng.choice(list(groups))
    member = rng.choice(groups[group])
    outside = [other for name, members in groups.items() if name != group for other in members]
    return group, member, [member, *outside]


def _animal(rng: Random) -> Item:
    group, animal, pool = _member(rng, ANIMALS)
    return Item(
        question=f"Which animal is in the group {group}?",
        pool=pool,
        value=animal,
        solution=f"The {group} is {animal}.",
    )


def _matter(rng: Random) -> Item:
    group, thing, pool = _member(rng, MATTER)
    return Item(
        question=f"Which of these is a {group}?",
        pool=pool,
        value=thing,
        solution=f"The {group} is {thing}.",
    )


def _capital(rng: Random) -> Item:
    country = rng.choice(list(CAPITALS))
    return Item(
        question=f"What is the capital of {country}?",
        pool=list(CAPITALS.values()),
        value=CAPITALS[country],
        solution=f"The capital is {CAPITALS[country]}.",
    )


NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"
KINDS = {
    "count": Kind(_count, NATURAL, "science-and-engineering-practices", "Counting", "Count objects", "Count them all."),
    "opposite": Kind(_opposite, LANGUAGE, "vocabulary", "Opposites", "Find the opposite", "Opposites differ most."),
    "color": Kind(_color, LANGUAGE, "vocabulary", "Colors", "Name a color", "Look at the color."),
    "told color": Kind(_told_color, NATURAL, "physics", "Light", "Find a color in a text", "Read the text."),
    "shape": Kind(_shape, LANGUAGE, "vocabulary", "Shapes", "Name a shape", "Look at the sides."),
    "capital": Kind(_capital, SOCIAL, "geography", "Capitals", "Name a capital", "Countries have capitals."),
    "magnets": Kind(_magnets, NATURAL, "physics", "Magnets", "Predict attraction", "Opposite poles attract."),
    "tense": Kind(_tense, LANGUAGE, "verbs", "Verb tense", "Tell past from future", "Look at the verb."),
    "thermometer": Kind(_thermometer, NATURAL, "units", "Temperature", "Read a thermometer", "Read the scale."),
    "animal": Kind(_animal, NATURAL, "biology", "Classification", "Sort animals", "Animals form groups."),
    "compass": Kind(_compass, SOCIAL, "geography", "Maps", "Read a compass", "The top is north."),
    "matter": Kind(_matter, NATURAL, "chemistry", "Matter", "Tell states of matter", "Matter has states."),
    "bars": Kind(_bars, SOCIAL, "economics", "Charts", "Read a bar chart", "Compare the bars."),
    "told number": Kind(_told_number, SOCIAL, "economics", "Goods", "Find a number in a text", "Read the text."),
}


def _order_choices(rng: Random, item: Item) -> list[str]:
    """The right choice and wrong ones from the pool, two to five in all, in random order."""
    wrong = [choice for choice in item.pool if choice != item.value]
    count = rng.randint(1, min(MAX_CHOICES - 1, len(wrong)))
    choices = [item.value, *rng.sample(wrong, count)]
    rng.shuffle(choices)
    return choices


def make_sample(seed: int, split: str, index: int) -> Sample:
    """Record number `index` of a split. It depends on the three arguments alone; `index` chooses the kind in turn."""
    rng = Random(f"lavin-ds sample {seed} {split} {index}")
    kind = list(KINDS.values())[index % len(KINDS)]
    item = kind.draw(rng)
    choices = _order_choices(rng, item)
    problem = {
        "question": item.question,
        "choices": choices,
        "answer": choices.index(item.value),
        "hint": item.hint,
        "image": "image.png" if item.picture else None,
        "task": "closed choice",
        "grade": f"grade{rng.randint(1, 12)}",
        "subject": kind.subject,
        "topic": kind.topic,
        "category": kind.category,
        "skill": kind.skill,
        "lecture": kind.lecture,
        "solution": item.solution,
        "split": split,
    }
    picture = item.picture(rng).resize((SIZE, SIZE), Image.Resampling.BOX) if item.picture else None
    return Sample(problem, item.caption, picture)


def generate(out: Path, seed: int = 0, train: int = 4000, val: int = 140, test: int = 420) -> None:
    """Writes problems.json, pid_splits.json, captions.json and images/SPLIT/PID/image.png under `out`.

    The same arguments write the same bytes; another seed writes other questions of the same kinds.
    """
    problems, splits, captions = {}, {}, {}
    for split, size in {"train": train, "val": val, "test": test}.items():
        splits[split] = []
        for index in range(size):
            sample = make_sample(seed, split, index)
            pid = str(len(problems) + 1)
            problems[pid] = sample.problem
            splits[split].append(pid)
            if sample.picture is not None:
                captions[pid] = sample.caption
                folder = out / "images" / split / pid
                folder.mkdir(parents=True, exist_ok=True)
                sample.picture.save(folder / "image.png")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in [
        ("problems.json", problems),
        ("pid_splits.json", splits),
        ("captions.json", {"captions": captions}),
    ]:
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
