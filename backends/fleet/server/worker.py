"""A thread for the page server's slow work, so that its loop never waits for a disk or a large array.

Threads: ``put`` and ``results`` are for the loop; jobs run in the pool's own thread, one after the other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)

Job = Callable[[], Callable[[], None]]
"""Runs in the thread, and returns a callback that the loop runs."""

CLOSE_TIMEOUT_S = 6.0


class JobPool:
    """Takes at most ``depth`` jobs whose results were not collected. ``fd`` is readable while there are results."""

    def __init__(self, name: str, depth: int) -> None:
        self._depth = depth
        self._jobs: SimpleQueue[tuple[Job, Callable[[], None]] | None] = SimpleQueue()
        self._results: deque[Callable[[], None]] = deque()
        self._open = 0
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """True if ``put`` would take a job."""
        return self._open < self._depth

    def put(self, job: Job, failed: Callable[[], None]) -> bool:
        """Run a job; False: there are too many. ``failed``: the loop's callback if the job raises."""
        if not self.has_room:
            return False
        self._open += 1
        self._jobs.put((job, failed))
        return True

    def results(self) -> list[Callable[[], None]]:
        """Collect the callbacks of the jobs that have ended."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        ended = [self._results.popleft() for _ in range(len(self._results))]
        self._open -= len(ended)
        return ended

    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, failed = entry
            try:
                result = job()
            except Exception:
                logger.exception("a request could not be served")
                result = failed
            self._results.append(result)
            os.eventfd_write(self.fd, 1)

    def close(self) -> bool:
        """Wait for the running job. False: it hangs."""
        self._jobs.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            return False
        os.close(self.fd)
        return True
