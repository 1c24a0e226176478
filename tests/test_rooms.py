"""Each room of the package imports only from rooms below it, also inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import lavin_ds

# From the ground up. Modules that stand alone in lavin_ds/ are rooms too. Rooms in one line may not import each other.
FLOORS = [
    ["errors", "files", "machine"],
    ["config", "recipes", "devices"],
    ["run", "parallel"],
    ["data"],
    ["models"],
    ["weights"],
    ["data_prep", "generation"],
    ["evaluation", "training"],
    ["profiling"],
    ["launching", "serving"],
    ["quickstart"],
    ["cli"],
    ["launch"],
]
# A recipe names kinds of data and adapters; whether they exist, and whether their options are right, their rooms know.
REGISTRIES = {("config", "data_prep"), ("config", "models")}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = Path(lavin_ds.__file__).parent
OUTSIDE = {"data_prep": PACKAGE.parent / "data_prep", "launch": PACKAGE.parent / "launch"}


def sources() -> list[tuple[str, Path]]:
    """Every file with its room."""
    inside = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]
    outside = [(room, path) for room, folder in OUTSIDE.items() for path in folder.rglob("*.py")]
    return [(room, path) for room, path in inside + outside if room != "__init__"]


def imported_rooms(source: str) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("lavin_ds.")} - {"__version__"}


def test_every_room_has_its_floor():
    assert {room for room, _ in sources()} <= FLOOR.keys()


def test_a_room_imports_only_from_rooms_below_it():
    upward = [
        f"{path.name} in {room} imports from {other}"
        for room, path in sources()
        for other in sorted(imported_rooms(path.read_text(encoding="utf-8")) - {room})
        if FLOOR[other] >= FLOOR[room] and (room, other) not in REGISTRIES
    ]
    assert not upward, "\n".join(upward)


def test_imports_are_found_inside_functions_and_in_both_spellings():
    source = "def f():\n    from lavin_ds import profiling\n    import lavin_ds.launching.rank\n"
    assert imported_rooms(source) == {"profiling", "launching"}
