"""Worker: one thread that does jobs in their order. A failed job is handed to its owner, never to the thread's end."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

J = TypeVar("J")


class JobThread(Generic[J]):
    """``work(job)`` for each job, ``failed(job, error)`` when it raises; both on the thread, ``within`` its context.

    ``put``, ``wait_idle`` and ``stop``: any thread. A daemon: a disk that hangs for ever does not keep the process.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[J], None],
        failed: Callable[[J, Exception], None],
        within: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._work, self._failed, self._within = work, failed, within
        self._changed = threading.Condition()  # guards what follows
        self._jobs: deque[J] = deque()
        self._busy = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: J) -> bool:
        """Queue a job; False after ``stop``."""
        with self._changed:
            if self._stopped:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
        return True

    def wait_idle(self, seconds: float) -> bool:
        """Until all jobs are done; False if they are not after ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def stop(self, seconds: float) -> bool:
        """Begin no further job and wait for the one that runs; False if it still does. Idempotent."""
        end = time.monotonic() + seconds
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _next(self) -> J | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._jobs or self._stopped)
            if self._stopped:
                return None
            self._busy = True
            return self._jobs.popleft()

    def _run(self) -> None:
        with self._within():
            while (job := self._next()) is not None:
                try:
                    self._work(job)
                except Exception as exc:  # noqa: BLE001 - a thread of ours: its end would end all jobs to come
                    self._failed(job, exc)
