"""Runs those tasks of a job that no earlier run finished, in worker processes if there are several."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import Pipe, get_context

from lavin_ds.data_prep import lifeline
from lavin_ds.data_prep.worker import Job, Task, Worker
from lavin_ds.data_prep.workspace import Workspace
from lavin_ds.errors import UserError

Progress = Callable[[str, int, int], None]  # called with the pass, the work done and the work in all


class Runner:
    """A context manager. Its worker processes end with the block, or with this process if it is killed."""

    def __init__(self, job: Job, workspace: Workspace, workers: int, on_progress: Progress | None):
        self.worker, self.workspace, self.workers = Worker(job), workspace, workers
        self.on_progress = on_progress or (lambda stage, done, total: None)

    def __enter__(self) -> Runner:
        # Nothing is sent through the pipe. Workers end when this end of it closes, which also happens if this process
        # dies.
        theirs, self._ours = Pipe(duplex=False)
        # Spawned, because forked processes would inherit this one's threads.
        self._pool = ProcessPoolExecutor(
            self.workers, get_context("spawn"), lifeline.start, (theirs, pickle.dumps(self.worker))
        )
        return self

    def __exit__(self, *_) -> None:
        self._ours.close()  # first: it ends the workers, so the pool does not wait for tasks that still run
        self._pool.shutdown()

    def run(self, stage: str, tasks: list[Task]) -> Iterator[dict]:
        """Yields the results of all tasks in order. A result is dropped once it is yielded.

        Raises:
            UserError: from a task, or a worker process was killed.
        """
        results = self.workspace.done
        todo = [task for task in tasks if task.name not in results]
        total = sum(task.size for task in tasks)
        done = total - sum(task.size for task in todo)
        names = deque(task.name for task in tasks)
        self.on_progress(stage, done, total)
        for task, result in self._in_parallel(todo) if min(self.workers, len(todo)) > 1 else self._here(todo):
            self.workspace.record(task.name, result)
            done += task.size
            self.on_progress(stage, done, total)
            while names and names[0] in results:
                yield results.pop(names.popleft())
        while names:
            yield results.pop(names.popleft())

    def _here(self, tasks: list[Task]) -> Iterator[tuple[Task, dict]]:
        for task in tasks:
            yield task, self.worker.do(task)

    def _in_parallel(self, tasks: list[Task]) -> Iterator[tuple[Task, dict]]:
        """Tasks and their results, in the order in which they finish."""
        try:
            futures = {self._pool.submit(lifeline.do, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "A worker process was killed, most likely because memory ran out. Finished files are kept: run the "
                "same command again with fewer --workers."
            ) from None
