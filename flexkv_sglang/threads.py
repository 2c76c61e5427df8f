"""Threads of ours: ``PeriodicThread`` repeats a step, ``JobThread`` does jobs in their order, ``JobPool`` for a loop,
``DiskThread`` for jobs that may hang.

All are daemons, so a disk that hangs for ever does not keep the process, and every wait for their end has a bound.
A step or a job that raises is reported, and so is a report that raises; the thread goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.log_limit import RateLimitedLog

logger = logging.getLogger(__name__)

J = TypeVar("J")
T = TypeVar("T")

OVERDUE_S = 1.0
"""Past its deadline a job or a call only ends what is in flight: tens of milliseconds. After this time it hangs."""

_DISK_QUEUE_MAX = 64
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
            self._report(exc)
            return self._retry_s

    def _report(self, exc: Exception) -> None:
        try:
            self._log.log("", logging.ERROR, self._trouble, exc_info=exc)
            self._failed()
        except Exception as second:  # noqa: BLE001 - of a log handler or of ``failed``; as above
            _report_raised(second)


def _report_raised(exc: Exception) -> None:
    """Log the error of a report. A log that raises as well is left: there is nowhere to say it."""
    with suppress(Exception):
        logger.error("flexkv: the report of a failure failed", exc_info=exc)


class Companion:
    """Work beside that of the caller, who waits for it: for calls that use two disks, of which one may be slow."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="flexkv-companion", daemon=True)
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Wait for its end, which ``work`` bounds. Returns what it raised."""
        self._thread.join()
        return self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as exc:  # noqa: BLE001 - raised by the caller, on its own thread
            self._error = exc


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

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._jobs)

    @property
    def idle(self) -> bool:
        """Does no job run or wait?"""
        return not self._jobs and not self._busy

    def put(self, job: J) -> bool:
        """Queue a job; False after ``stop``."""
        with self._changed:
            if self._stopped:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
        return True

    def drop(self) -> list[J]:
        """Take back the jobs that wait."""
        with self._changed:
            dropped = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        return dropped

    def wait_idle(self, seconds: float) -> bool:
        """Wait until all jobs are done; False if they are not after ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def stop(self, seconds: float) -> bool:
        """Begin no further job and wait for the one that runs; False if it still does. Idempotent.

        Called by a job it does not wait: the thread ends after this job.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._changed.notify_all()
        if self._thread is threading.current_thread():
            return True
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
                    self._report(job, exc)

    def _report(self, job: J, exc: Exception) -> None:
        try:
            self._failed(job, exc)
        except Exception as second:  # noqa: BLE001 - as above
            _report_raised(second)


@dataclass(slots=True)
class _DiskJob:
    """A job of a ``DiskThread``. ``limit_s``: it should take no longer. ``begun_at``: monotonic seconds."""

    work: Callable[[], Any]
    limit_s: float
    future: Future[Any]
    begun_at: float = 0.0


class DiskThread:
    """Jobs on the files of one directory, one after the other, on a thread that may hang in any of them.

    Whoever must not hang gives it the work and waits for it no longer than until his own deadline. ``hangs`` says
    that the job under way should have ended. After ``refuse`` nothing is queued until ``accept``: what a job that
    hangs holds stays held, and its return says that the directory answers again. So a directory never holds more
    than this one thread, however long it hangs.

    The thread starts at construction. Threads: any; no method waits for a file but ``run``, which ends at its deadline,
    and ``stop``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # held for a queue operation; guards _refused
        self._refused = False
        self._running: _DiskJob | None = None
        self._thread = JobThread[_DiskJob](name, self._work, self._ignore)

    @property
    def idle(self) -> bool:
        """Does no job run or wait?"""
        return self._thread.idle

    @property
    def refused(self) -> bool:
        """Is nothing taken since ``refuse``?"""
        return self._refused

    def hangs(self, now: float) -> bool:
        """Has the job under way taken ``OVERDUE_S`` longer than its limit at ``now`` (monotonic seconds)?"""
        job = self._running
        return job is not None and now > job.begun_at + job.limit_s + OVERDUE_S

    def post(self, work: Callable[[], T], limit_s: float) -> Future[T]:
        """Queue ``work``. Its future is cancelled if it will never begin: refused, stopped, or too many wait."""
        job = _DiskJob(work, limit_s, Future())
        with self._lock:
            taken = (
                not self._refused and len(self._thread) < _DISK_QUEUE_MAX and self._thread.put(job)
            )
        if not taken:
            job.future.cancel()
        return job.future

    def run(self, work: Callable[[], T], deadline: float) -> T:
        """Have ``work`` done and wait for its result until ``deadline``. What it raises is raised here.

        Raises ``TierUnavailableError`` if there is no result: it will never begin, or it has begun and hangs.
        """
        limit_s = max(0.0, deadline - time.monotonic())
        future = self.post(work, limit_s)
        if wait_for([future], deadline):
            return future.result()
        raise TierUnavailableError(f"{self._name}: the directory does not answer")

    def drop(self) -> None:
        """Cancel the jobs that wait."""
        for job in self._thread.drop():
            job.future.cancel()

    def refuse(self) -> None:
        """Take nothing until ``accept``, and cancel the jobs that wait."""
        with self._lock:
            self._refused = True
        self.drop()

    def accept(self) -> None:
        """Take jobs again."""
        with self._lock:
            self._refused = False

    def stop(self, deadline: float) -> bool:
        """Begin no further job, and wait for the one that runs until ``deadline``. False: it still does."""
        self.refuse()
        return self._thread.stop(max(0.0, deadline - time.monotonic()))

    def _work(self, job: _DiskJob) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        job.begun_at = time.monotonic()
        self._running = job
        try:
            result = job.work()
        except Exception as exc:  # noqa: BLE001 - raised where the result is waited for
            self._running = None
            job.future.set_exception(exc)
        else:
            self._running = None
            job.future.set_result(result)

    @staticmethod
    def _ignore(_job: _DiskJob, _exc: Exception) -> None:
        """Errors are in the futures."""


def wait_for(futures: Sequence[Future[Any]], deadline: float) -> bool:
    """Wait until ``deadline`` for jobs of ``DiskThread``s. True: each has ended, with a result or an error.

    False: the others have been cancelled, or they have begun and cannot be stopped any more (``running``).
    """
    whole = True
    for future in futures:
        try:
            future.exception(max(0.0, deadline - time.monotonic()))
        except (CancelledError, TimeoutError):
            future.cancel()
            whole = False
    return whole


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


def succeeded(job: Future[Any]) -> bool:
    """Has this job of a ``DiskThread`` ended with a result?"""
    return job.done() and not job.cancelled() and job.exception() is None
