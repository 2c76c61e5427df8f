"""PosixIo: the same transfers with threads and ``preadv``/``pwritev``, where io_uring is refused.

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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext

import numpy as np

from flexkv_sglang.backends.io.operations import runs
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.transfer import (
    CLOSE_TIMEOUT_S,
    NOT_TRIED,
    PageTransfer,
    Positions,
    take_turn,
)
from flexkv_sglang.threads import OVERDUE_S
from flexkv_sglang.types import I64

_THROTTLED_PAUSE_S = 0.001
_START_S = 10.0


class PosixIo:
    """``workers`` threads, started here. ``kind`` tells whether the files were opened O_DIRECT ("threads") or not.

    ``OSError`` from the constructor: the process has no threads left. ``counts``: "operations", runs of adjacent pages
    that were to be moved.
    """

    def __init__(
        self, workers: int = 8, *, kind: str = "threads", traffic: ReadPriority | None = None
    ) -> None:
        self.kind = kind
        self._workers = workers
        self._traffic = traffic or ReadPriority()
        self.counts: Counter[str] = Counter()
        self.given_up = False
        self._lock = threading.Lock()  # one batch at a time, as for the ring
        self._pool = _started(workers)
        self._closed = False

    def move(self, transfer: PageTransfer) -> None:
        """See ``IoEngine``. A write has few workers while reads are under way."""
        if not len(transfer):
            return
        borders = runs(transfer)
        count = len(borders) - 1
        queue = deque(range(count))
        with nullcontext() if transfer.writing else self._traffic.reading():
            if not take_turn(self._lock, self, transfer.deadline):
                return
            futures: list[Future[None]] = []
            try:
                if self._closed:
                    raise OSError(errno.EBADF, "the I/O threads are closed")
                self.counts["operations"] += count
                futures += [
                    self._pool.submit(self._serve, transfer, borders, queue, worker)
                    for worker in range(min(self._workers, count))
                ]
                # Waits for all: nothing stays in flight, but of a write that hangs.
                limit = transfer.deadline + OVERDUE_S - time.monotonic()
                wait(futures, max(0.0, limit) if transfer.writing else None)
            finally:
                left = [future for future in futures if not future.done()]
                if not left:
                    self._lock.release()
            if left:
                self._leave(transfer, left)
        for future in futures:
            error = future.exception() if future.done() else None
            if error is not None:
                raise error

    def _leave(self, transfer: PageTransfer, left: Sequence[Future[None]]) -> None:
        """A write hangs: the caller goes, the workers stay until their operations end."""

        def drain() -> None:
            wait(left)
            self._lock.release()
            transfer.settle()

        self.given_up = True
        threading.Thread(target=drain, name="flexkv-drain", daemon=True).start()

    def register_memory(self, _address: int, _byte_count: int) -> None:
        """Nothing to do: threads pin nothing."""

    def close(self, seconds: float = CLOSE_TIMEOUT_S) -> bool:
        """End the threads once no batch runs; see ``IoEngine``."""
        self._closed = True
        if not self._lock.acquire(timeout=max(0.0, seconds)):
            return False
        try:
            self._pool.shutdown(wait=True)
        finally:
            self._lock.release()
        return True

    def _serve(
        self, transfer: PageTransfer, borders: Positions, queue: deque[int], worker: int
    ) -> None:
        """One worker: move the next run of pages, until ``queue`` is empty or time is up."""
        mean = max(1, transfer.page_bytes * len(transfer) // (len(borders) - 1))
        while queue and not self._closed and time.monotonic() < transfer.deadline:
            if transfer.writing and worker >= self._traffic.write_depth(self._workers, mean):
                time.sleep(_THROTTLED_PAUSE_S)  # reads are under way; worker 0 always goes on
                continue
            try:
                run = queue.popleft()
            except IndexError:
                return
            first, end = int(borders[run]), int(borders[run + 1])
            transfer.begin(slice(first, end))
            transfer.on_complete(np.arange(first, end), _move_run(transfer, first, end))
            transfer.run_pending()


def _started(workers: int) -> ThreadPoolExecutor:
    """All threads at once: one that cannot be started in the middle of a transfer would leave work without a worker."""
    pool, all_there = ThreadPoolExecutor(workers, "flexkv-io"), threading.Barrier(workers)
    try:
        for started in [pool.submit(all_there.wait, _START_S) for _ in range(workers)]:
            started.result()
    except (RuntimeError, threading.BrokenBarrierError) as exc:
        all_there.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise OSError(errno.EAGAIN, "the I/O threads cannot be started") from exc
    return pool


def _move_run(transfer: PageTransfer, first: int, end: int) -> I64:
    """Move pages ``[first, end)`` with one call; those that did not move whole once more, alone. Per page: bytes
    moved, -errno or ``NOT_TRIED``."""
    moved = _transfer(transfer, first, end)
    if end - first == 1 and moved < 0:
        return np.array([moved])
    size = transfer.page_bytes
    starts = np.arange(end - first) * size
    got = np.clip(moved - starts, 0, size) if moved >= 0 else np.full(end - first, moved)
    for place in np.flatnonzero(got != size).tolist():
        late = time.monotonic() >= transfer.deadline
        page = first + place
        got[place] = NOT_TRIED if late else _transfer(transfer, page, page + 1)
    return got


def _transfer(transfer: PageTransfer, first: int, end: int) -> int:
    """Pages ``[first, end)``, adjacent on the medium, in one call: bytes moved or -errno."""
    lengths = transfer.buffers.lengths.tolist()
    views = [
        memoryview((ctypes.c_ubyte * length).from_address(address))
        for addresses in transfer.buffers.addresses[first:end].tolist()
        for address, length in zip(addresses, lengths, strict=True)
    ]
    call = os.pwritev if transfer.writing else os.preadv
    try:
        return call(int(transfer.fds[first]), views, int(transfer.offsets[first]))
    except OSError as exc:
        return -(exc.errno or errno.EIO)
