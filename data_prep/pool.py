"""Worker processes that do tasks side by side, and end when their parent does.

Plain subprocesses, not multiprocessing's: those import the parent's main program anew, and a fork would inherit its
threads and its records.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from lavin_ds.data_prep.worker import Job, Task, Worker
from lavin_ds.errors import UserError

ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PYTHONSAFEPATH": "1",  # a random.py where the command was typed is not ours
}


class Pool:
    """At most `size` processes, started when there is more than one task to do. Use as a context manager."""

    def __init__(self, job: Job, size: int):
        self.job, self.size = job, size
        self._here = Worker(job)
        self._processes: dict[Connection, subprocess.Popen] = {}

    def run(self, tasks: list[Task]) -> Iterator[tuple[Task, dict]]:
        """Does tasks, and yields each with its result as soon as it is done.

        Raises:
            UserError: from a task, or a process was killed.
        """
        if min(self.size, len(tasks)) <= 1:
            for task in tasks:
                yield task, self._here.do(task)
            return
        while len(self._processes) < min(self.size, len(tasks)):
            self._start()
        waiting = iter(tasks)
        at_work: dict[Connection, Task] = {}
        for connection, task in zip(self._processes, waiting, strict=False):
            self._send(connection, task)
            at_work[connection] = task
        while at_work:
            for connection in wait(list(at_work)):
                done = at_work.pop(connection)
                result = self._receive(connection, done)
                if (task := next(waiting, None)) is not None:
                    self._send(connection, task)
                    at_work[connection] = task
                yield done, result

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            connection.close()
            process.wait()

    def _start(self) -> None:
        ours, theirs = Pipe()
        call = (
            f"from lavin_ds.data_prep.lifeline import end_with; end_with({os.getpid()})\n"
            f"from lavin_ds.data_prep.worker import serve; serve({theirs.fileno()})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", call],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the parent's may be JSON
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent, which ends them
        )
        theirs.close()
        self._processes[ours] = process
        self._send(ours, self.job)

    def _send(self, connection: Connection, what: Job | Task) -> None:
        try:
            connection.send(what)
        except OSError:
            raise self._lost(connection) from None

    def _receive(self, connection: Connection, task: Task) -> dict:
        try:
            status, value = connection.recv()
        except (EOFError, OSError):
            raise self._lost(connection, f" at {task.name}") from None
        if status == "refused":
            raise UserError(value)
        if status == "failed":
            raise RuntimeError(f"A worker failed at {task.name}:\n{value}")
        return value

    def _lost(self, connection: Connection, where: str = "") -> UserError:
        code = self._processes[connection].wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return UserError(
            f"A worker process {how}{where}; most often memory ran out. What is finished is kept: "
            "run the same command again, with fewer --workers."
        )
