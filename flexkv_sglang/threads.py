"""Threads of ours: ``PeriodicThread`` repeats a step, ``JobThread`` does jobs in their order, ``JobPool`` for a loop.

All are daemons, so a disk that hangs for ever does not keep the process, and every wait for their end has a bound.
A step or a job that raises is reported; the thread goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

from flexkv_sglang.log_limit import RateLimitedLog

logger = logging.getLogger(__name__)

J = TypeVar("J")

_RETRY_S = 1.0
_POOL_CLOSE_S = 6.0


class PeriodicThread:
    """Repeats ``step`` on a thread; ``step`` returns the seconds until the next one. Set ``event`` to have it at once.

    When a step raises, ``failed`` is called on the thread, ``trouble`` is logged with the traceback (at most once a
    minute), and the next step follows after ``retry_s``. The first step comes ``first_s`` after ``start``.
    Threads: all methods any, ``pause`` within a step.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], float],
        failed: Callable[[], None],
        *,
        trouble: str = "",
        first_s: float = 0.0,
        retry_s: float = _RETRY_S,
    ) -> None:
        self.event = threading.Event()
        self._step = step
        self._failed = failed
        self._trouble = trouble or f"flexkv: {name} failed and goes on"
        self._first_s, self._retry_s = first_s, retry_s
        self._log = RateLimitedLog(logger)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def pause(self, seconds: float) -> None:
        """Wait inside a step; ends early at ``stop``."""
        self._stop.wait(seconds)

    @property
    def stopped(self) -> bool:
        """Has ``stop`` been called?"""
        return self._stop.is_set()

    def is_alive(self) -> bool:
        """Does the thread run?"""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Begin no further step. Does not wait."""
        self._stop.set()
        self.event.set()

    def join(self, deadline: float) -> bool:
        """Wait until ``deadline`` (``time.monotonic()``) for the thread's end. True: it has ended."""
        if self._thread.ident is None or self._thread is threading.current_thread():
            return True
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._stop.wait(self._first_s)
        while not self._stop.is_set():
            self.event.wait(self._once())
            self.event.clear()

    def _once(self) -> float:
        try:
            return self._step()
        except Exception as exc:  # noqa: BLE001 - a thread of ours: its end would end all steps to come
            self._failed()
            self._log.log("", logging.ERROR, self._trouble, exc_info=exc)
            return self._retry_s


class JobThread(Generic[J]):
    """``work(job)`` for each job, ``failed(job, error)`` when it raises; both on the thread, ``within`` its context.

    The thread starts at construction. Threads: any.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[J], None],
        failed: Callable[[J, Exception], None],
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._work, self._failed, self._within = work, failed, within
        self._changed = threading.Condition()  # guards the three below
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
        """Wait until all jobs are done; False if they are not after ``seconds``."""
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


PoolJob = Callable[[], Callable[[], None]]
"""Work for the thread. It returns the part that the loop does with the result."""


class JobPool:
    """A ``JobThread`` for a loop that must not wait: at most ``depth`` jobs whose results are not collected.

    ``fd`` becomes readable when a result is there. Threads: ``put``, ``results`` and ``close`` belong to the loop.
    """

    def __init__(self, name: str, depth: int) -> None:
        self._depth = depth
        self._results: deque[Callable[[], None]] = deque()
        self._open = 0
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = JobThread[tuple[PoolJob, Callable[[], None]]](name, self._work, self._failed)

    @property
    def has_room(self) -> bool:
        """Would ``put`` take a job?"""
        return self._open < self._depth

    def put(self, job: PoolJob, failed: Callable[[], None]) -> bool:
        """Run ``job`` soon; False: no room. ``failed``: the part that the loop does if it raises."""
        if not self.has_room:
            return False
        self._open += 1
        return self._thread.put((job, failed))

    def results(self) -> list[Callable[[], None]]:
        """The parts that the loop has to do for the jobs that have ended."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        ended = [self._results.popleft() for _ in range(len(self._results))]
        self._open -= len(ended)
        return ended

    def _work(self, entry: tuple[PoolJob, Callable[[], None]]) -> None:
        self._done(entry[0]())

    def _failed(self, entry: tuple[PoolJob, Callable[[], None]], exc: Exception) -> None:
        logger.error("a request could not be served", exc_info=exc)
        self._done(entry[1])

    def _done(self, result: Callable[[], None]) -> None:
        self._results.append(result)
        os.eventfd_write(self.fd, 1)

    def close(self) -> bool:
        """Drop the jobs that wait, wait for the one that runs; False: it hangs."""
        if not self._thread.stop(_POOL_CLOSE_S):
            return False
        os.close(self.fd)
        return True
