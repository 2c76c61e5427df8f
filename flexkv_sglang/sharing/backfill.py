"""Backfill: stores pages that came from other nodes in the written tiers, after the call that read them.

The host pages belong to SGLang again when its call returns. So their bytes are copied once, into a bounded buffer,
and one thread puts them into the tiers; no call waits for it. A full buffer drops pages.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flexkv_sglang.backends.memory import AlignedMemory
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.threads import JobThread
from flexkv_sglang.types import SECTOR, U64, PageBuffers, PageKey, round_up

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 128 << 20
_PUT_S = 8.0
_JOIN_S = 10.0

Put = Callable[[Sequence[PageKey], PageBuffers, PageKey | None, float], list[bool]]


@dataclass(frozen=True, slots=True)
class _BackfillJob:
    keys: Sequence[PageKey]
    parent: PageKey | None
    rows: list[int]


class Backfill:
    """``put`` stores pages, as ``Tiers.put``. The buffer takes memory only where pages were copied to.

    Threads: ``add`` any; ``close`` when no thread calls ``add`` any more.
    """

    def __init__(self, payload_bytes: int, put: Put, metrics: Metrics) -> None:
        self._put = put
        self._metrics = metrics
        self._row_bytes = round_up(payload_bytes, SECTOR)
        self._rows = max(1, _BUFFER_BYTES // self._row_bytes)
        self._lock = threading.Lock()  # guards _free and _closed
        self._closed = False
        self._free = list(range(self._rows))
        self._memory = AlignedMemory(self._rows * self._row_bytes)
        self._addresses = self._memory.rows(self._row_bytes, self._rows)
        self._lengths: U64 = np.zeros(
            0, np.uint64
        )  # of the parts of a page; the same in every call
        self._thread = JobThread[_BackfillJob]("flexkv-keeping", self._store, self._failed)

    def add(self, keys: Sequence[PageKey], parent: PageKey | None, pages: PageBuffers) -> None:
        """Copy these pages, one chain, and store them later. Pages for which the buffer has no room are dropped."""
        with self._lock:
            if self._closed:
                return
            self._lengths = pages.lengths
            count = min(len(keys), len(self._free))
            rows = [self._free.pop() for _ in range(count)]
        self._metrics.count("remote_unkept_pages", len(keys) - count)
        if not count:
            return
        for row, addresses in zip(rows, pages.addresses[:count].tolist(), strict=True):
            target = int(self._addresses[row])
            for address, length in zip(addresses, pages.lengths.tolist(), strict=True):
                ctypes.memmove(target, address, length)
                target += length
        self._thread.put(_BackfillJob(keys[:count], parent, rows))

    def close(self) -> None:
        """Drop the waiting pages and end the thread. Idempotent; takes no longer than one put."""
        with self._lock:
            self._closed = True
        self._thread.stop(_JOIN_S)

    def _store(self, job: _BackfillJob) -> None:
        done = self._put(job.keys, self._pages(job.rows), job.parent, time.monotonic() + _PUT_S)
        self._metrics.count("remote_kept_pages", sum(done))
        self._release(job)

    def _failed(self, job: _BackfillJob, error: Exception) -> None:
        self._metrics.count("upkeep_exceptions")
        logger.warning("flexkv: pages of another node are not kept", exc_info=error)
        self._release(job)

    def _release(self, job: _BackfillJob) -> None:
        with self._lock:
            self._free += job.rows

    def _pages(self, rows: list[int]) -> PageBuffers:
        starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]]).astype(np.uint64)
        return PageBuffers(self._addresses[rows][:, None] + starts, self._lengths)
