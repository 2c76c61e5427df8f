"""PosixIo: the same batches with threads and ``preadv``/``pwritev``, where io_uring is refused.

Each worker takes the next run of adjacent pages and moves it with one call: one future per page costs seven
times the Python and loses beside a busy interpreter, because each blocking call must win the GIL back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from flexkv_sglang.backends.io.batch import CLOSE_TIMEOUT_S, NOT_TRIED, IoBatch, Progress
from flexkv_sglang.backends.io.operations import Positions, runs, share
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.types import I64

_SHY_PAUSE_S = 0.001


class PosixIo:
    """``workers`` threads. ``kind`` tells whether the files were opened O_DIRECT ("threads") or not.

    ``counts``: "operations", runs of adjacent pages that were to be moved.
    """

    def __init__(
        self, workers: int = 8, *, kind: str = "threads", traffic: ReadPriority | None = None
    ) -> None:
        self.kind = kind
        self._workers = workers
        self._traffic = traffic or ReadPriority()
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # one batch at a time, as for the ring
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="flexkv-io")
        self._closed = False

    def read(self, batch: IoBatch, deadline: float, progress: Progress | None = None) -> I64:
        """Medium to memory; see ``IoEngine``."""
        with self._traffic.reading():
            return self._run(batch, deadline, progress, writing=False)

    def write(self, batch: IoBatch, deadline: float, progress: Progress | None = None) -> I64:
        """Memory to medium; see ``IoEngine``. Few workers at a time while reads are under way."""
        return self._run(batch, deadline, progress, writing=True)

    def register_memory(self, _address: int, _byte_count: int) -> None:
        """Nothing to do: threads pin nothing."""

    def close(self) -> bool:
        """End the threads once no batch runs; see ``IoEngine``."""
        if not self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
            return False
        try:
            self._closed = True
            self._pool.shutdown(wait=True)
        finally:
            self._lock.release()
        return True

    def _run(
        self, batch: IoBatch, deadline: float, progress: Progress | None, *, writing: bool
    ) -> I64:
        if not len(batch):
            return np.full(0, NOT_TRIED, np.int64)
        borders = runs(batch)
        count = len(borders) - 1
        results = np.full(len(batch), NOT_TRIED, np.int64)
        call = _Call(batch, deadline, progress, writing, borders, deque(range(count)), results)
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the I/O threads are closed")
            self.counts["operations"] += count
            futures = [
                self._pool.submit(self._serve, call, worker)
                for worker in range(min(self._workers, count))
            ]
            errors = [
                future.exception() for future in futures
            ]  # waits for all: nothing stays in flight
        for error in errors:
            if error is not None:
                raise error
        return results

    def _serve(self, call: _Call, worker: int) -> None:
        """One worker: the next run, until there is none or time is up."""
        while call.queue and call.left():
            if call.writing and worker >= self._depth(call):
                time.sleep(_SHY_PAUSE_S)  # reads are under way; worker 0 always goes on
                continue
            try:
                run = call.queue.popleft()
            except IndexError:
                return
            first, end = int(call.borders[run]), int(call.borders[run + 1])
            _move_run(call, run, first, end)
            if call.progress is not None:
                positions = np.arange(first, end)
                call.progress.landed(positions, call.results[first:end])
                call.progress.work()

    def _depth(self, call: _Call) -> int:
        mean = max(1, call.batch.page_bytes * len(call.batch) // (len(call.borders) - 1))
        return self._traffic.write_depth(self._workers, mean)


@dataclass(frozen=True, slots=True)
class _Call:
    """One batch, cut into runs of pages by ``operations.runs``; ``queue``: runs nobody has taken yet."""

    batch: IoBatch
    deadline: float
    progress: Progress | None
    writing: bool
    borders: Positions
    queue: deque[int]
    results: I64

    def left(self) -> bool:
        """Is there time?"""
        return time.monotonic() < self.deadline


def _move_run(call: _Call, run: int, first: int, end: int) -> None:
    """Move pages ``[first, end)`` with one call; those that did not come whole once more, alone."""
    batch = call.batch
    moved = _move(batch, first, end, call.writing)
    ids, sizes = np.array([run]), np.array([moved])
    _, got = share(call.borders, ids, sizes, batch.page_bytes)
    call.results[first:end] = got
    if moved < 0 and end - first == 1:
        return
    for page in (first + np.flatnonzero(got != batch.page_bytes)).tolist():
        call.results[page] = (
            _move(batch, page, page + 1, call.writing) if call.left() else NOT_TRIED
        )


def _move(batch: IoBatch, first: int, end: int, writing: bool) -> int:
    """Pages ``[first, end)``, adjacent on the medium, in one call: bytes moved or -errno."""
    lengths = batch.lengths.tolist()
    views = [
        memoryview((ctypes.c_ubyte * length).from_address(address))
        for addresses in batch.addresses[first:end].tolist()
        for address, length in zip(addresses, lengths, strict=True)
    ]
    try:
        return _transfer(int(batch.fds[first]), views, int(batch.offsets[first]), writing)
    except OSError as exc:
        return -(exc.errno or errno.EIO)


def _transfer(fd: int, views: Sequence[memoryview], offset: int, writing: bool) -> int:
    return os.pwritev(fd, views, offset) if writing else os.preadv(fd, views, offset)
