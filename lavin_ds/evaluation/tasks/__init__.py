"""The benchmarks that `lavin-ds eval NAME` knows."""

from lavin_ds.errors import UserError
from lavin_ds.evaluation.tasks.scienceqa import ScienceQA
from lavin_ds.evaluation.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (ScienceQA,)}


def find_task(name: str) -> type[Task]:
    """Raises UserError if there is no such task."""
    if name not in TASKS:
        raise UserError(f"There is no evaluation task '{name}': choose one of {', '.join(TASKS)}.")
    return TASKS[name]
