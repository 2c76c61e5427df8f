"""PosixIo: the same batches with threads and ``preadv``/``pwritev``, where io_uring is refused.

Each worker takes a contiguous share of the batch and loops over it: one future per page costs seven
times the Python and loses beside a busy interpreter, because each blocking call must win the GIL back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io import CLOSE_TIMEOUT_S, IOV_MAX, NOT_TRIED, IoBatch, OnDone
from flexkv_sglang.types import I64

_CHUNK = 8  # pages between two reports of completion


class PosixIo:
    """``workers`` threads. ``kind`` tells whether the files were opened O_DIRECT ("threads") or not."""

    def __init__(self, workers: int = 8, *, kind: str = "threads") -> None:
        self.kind = kind
        self._workers = workers
        self._lock = threading.Lock()  # one batch at a time, as for the ring
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="flexkv-io")
        self._closed = False

    def read(self, batch: IoBatch, deadline: float, on_done: OnDone | None = None) -> I64:
        """Medium to memory; see ``IoEngine``."""
        return self._run(batch, deadline, on_done, writing=False)

    def write(self, batch: IoBatch, deadline: float, on_done: OnDone | None = None) -> I64:
        """Memory to medium; see ``IoEngine``."""
        return self._run(batch, deadline, on_done, writing=True)

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
        self, batch: IoBatch, deadline: float, on_done: OnDone | None, *, writing: bool
    ) -> I64:
        results = np.full(len(batch), NOT_TRIED, np.int64)
        if not len(batch):
            return results
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the I/O threads are closed")
            shares = np.array_split(np.arange(len(batch)), min(self._workers, len(batch)))
            futures = [
                self._pool.submit(_share, batch, share, results, deadline, on_done, writing)
                for share in shares
            ]
            errors = [
                future.exception() for future in futures
            ]  # waits for all: nothing stays in flight
        for error in errors:
            if error is not None:
                raise error
        return results


def _share(
    batch: IoBatch,
    share: npt.NDArray[np.intp],
    results: I64,
    deadline: float,
    on_done: OnDone | None,
    writing: bool,
) -> None:
    for start in range(0, len(share), _CHUNK):
        positions = share[start : start + _CHUNK]
        tried = []
        for position in positions.tolist():
            if time.monotonic() >= deadline:
                break
            results[position] = _move(batch, position, writing)
            tried.append(position)
        if on_done is not None and tried:
            on_done(np.array(tried, np.intp), results[tried])
        if len(tried) < len(positions):
            return


def _move(batch: IoBatch, position: int, writing: bool) -> int:
    fd, offset = int(batch.fds[position]), int(batch.offsets[position])
    views = [
        memoryview((ctypes.c_ubyte * length).from_address(address))
        for address, length in zip(
            batch.addresses[position].tolist(), batch.lengths.tolist(), strict=True
        )
    ]
    moved = 0
    try:
        for start in range(0, len(views), IOV_MAX):
            part = views[start : start + IOV_MAX]
            got = _transfer(fd, part, offset + moved, writing)
            moved += got
            if got != sum(len(view) for view in part):
                break
    except OSError as exc:
        return -(exc.errno or errno.EIO)
    return moved


def _transfer(fd: int, views: Sequence[memoryview], offset: int, writing: bool) -> int:
    return os.pwritev(fd, views, offset) if writing else os.preadv(fd, views, offset)
