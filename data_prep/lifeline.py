"""The entry point of `Runner`'s worker processes. A worker ends when the process that started it ends.

This file imports almost nothing, so that a worker can be ended while it still imports what its tasks need.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

_worker: Any = None


def start(lifeline: Connection, worker: bytes) -> None:
    """Unpickles the worker, and ends this process when the other end of `lifeline` is closed."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    _worker = pickle.loads(worker)


def do(task: Any) -> dict:
    return _worker.do(task)


def _end_with(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)
