"""The benchmarks that `lavin-ds eval NAME` knows."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.evaluation.tasks.task import Task

# The class of each task. It is imported when the task is run, so that `lavin-ds --help` imports no pyarrow or numpy.
TASKS = {"scienceqa": "lavin_ds.evaluation.tasks.scienceqa:ScienceQA"}


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        UserError: there is no task of that name.
    """
    if name not in TASKS:
        raise UserError(f"There is no evaluation task '{name}': choose one of {', '.join(TASKS)}.")
    return resolve_name(TASKS[name])
