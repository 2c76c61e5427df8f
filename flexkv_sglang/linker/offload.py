"""Offloads: pages from device slots into the tiers, in the order in which SGLang inserts them.

    scheduler:  accept(...)                    completed() -> how many    pop() -> stored?
    thread:     pages are gathered into staging (the slots are SGLang's again) | written | settled

Every accepted offload is settled exactly once and reported in the order of acceptance, because all ranks pop the same
number. SGLang keeps the pages' slots until then, so one that takes too long is given up: not while its pages are being
read from the device, which takes milliseconds, but before or after.

Threads: as above.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flexkv_sglang.errors import TierError
from flexkv_sglang.identity.keys import page_keys
from flexkv_sglang.linker.device_pages import DevicePool
from flexkv_sglang.linker.side_stream import SideStream, finish
from flexkv_sglang.linker.staging import StagingPool, chunks
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.pools.transfers import write
from flexkv_sglang.threads import JobThread
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

OFFLOAD_S = 30.0
"""After so many seconds an offload that is not done is given up: its pages keep device memory from others."""

CALL_S = 8.0
"""A write of one chunk is given this long, as in the storage backend."""

COPY_S = 5.0
"""A copy from the device that runs longer hangs."""

WAITING_BYTES_MAX = 4 << 30
"""Beyond so many bytes that wait, offloads are refused (accepted, and reported as not stored)."""


@dataclass(frozen=True, slots=True)
class Given:
    """Pages of one pool, one chain. ``page_ids``: int64 ``[len(texts)]``, where the device pool is."""

    pool: DevicePool
    texts: list[str]
    page_ids: torch.Tensor

    @property
    def byte_count(self) -> int:
        """Bytes of the pages."""
        return len(self.texts) * self.pool.layout.block_bytes


@dataclass(slots=True)
class Offload:
    """One accepted offload. ``reading`` is held while its pages are read from the device."""

    given: list[Given]
    ready: list[Any]
    deadline: float
    epoch: int
    parent: PageKey | None
    byte_count: int
    reading: threading.Lock = field(default_factory=threading.Lock)
    settle_lock: threading.Lock = field(default_factory=threading.Lock)
    result: bool | None = None

    def settle(self, result: bool) -> bool:
        """Set the result unless it is set; was this call the one that did?"""
        with self.settle_lock:
            if self.result is not None:
                return False
            self.result = result
            return True

    def give_up(self) -> bool:
        """Settle as not stored, unless its pages are being read at this moment."""
        if not self.reading.acquire(blocking=False):
            return False
        try:
            return self.settle(False)
        finally:
            self.reading.release()


class Offloader:
    """Of one linker. ``epoch()``: a number that a weight update changes."""

    def __init__(
        self,
        stores: PoolStores,
        staging: Mapping[str, StagingPool],
        device: torch.device,
        metrics: Metrics,
        epoch: Callable[[], int],
        seconds: float = OFFLOAD_S,
    ) -> None:
        self._stores, self._staging, self._metrics = stores, staging, metrics
        self._epoch, self._seconds = epoch, seconds
        self._accepted: deque[Offload] = deque()  # the scheduler's alone
        self._stream = SideStream(device)
        self._worker = JobThread[Offload](
            "flexkv-offload", self._run, self._failed, self._stream.current
        )

    def accept(self, given: list[Given], ready: list[Any], parent: PageKey | None) -> None:
        """Queue pages to be stored when the events ``ready`` have happened. ``parent``: the page before them."""
        byte_count = sum(item.byte_count for item in given)
        job = Offload(
            given, ready, time.monotonic() + self._seconds, self._epoch(), parent, byte_count
        )
        waiting = sum(job.byte_count for job in self._accepted if job.result is None)
        self._accepted.append(job)
        self._metrics.count("linker_offloads")
        if waiting + byte_count > WAITING_BYTES_MAX or not self._worker.put(job):
            self._settle(job, False)

    def refuse(self) -> None:
        """An offload was accepted and cannot be done: its result, in its turn, is False."""
        job = Offload([], [], 0.0, self._epoch(), None, 0)
        self._settle(job, False)
        self._accepted.append(job)

    def completed(self) -> int:
        """Offloads settled from the oldest on without a gap; what is overdue is given up."""
        now, count = time.monotonic(), 0
        for job in self._accepted:
            if job.result is None and (job.deadline > now or not self._give_up(job)):
                break
            count += 1
        return count

    def pop(self) -> bool:
        """Result of the oldest; False, and nothing popped, if it is not settled."""
        if not self._accepted or self._accepted[0].result is None:
            return False
        return bool(self._accepted.popleft().result)

    def quiesce(self, seconds: float) -> None:
        """Wait for what runs, give up what is left after ``seconds``, and forget all results."""
        self._worker.wait_idle(seconds)
        for job in self._accepted:
            if job.result is None and not self._give_up(job):
                done = job.reading.acquire(timeout=COPY_S)  # after it, no page is read any more
                self._settle(job, False)
                if done:
                    job.reading.release()
        self._accepted = deque()

    def stop(self, seconds: float) -> bool:
        """After ``quiesce``: end the thread; False if it still runs after ``seconds``."""
        return self._worker.stop(seconds)

    def _give_up(self, job: Offload) -> bool:
        given_up = job.give_up()
        if given_up:
            self._metrics.count("linker_failed_offloads")
        return job.result is not None

    def _settle(self, job: Offload, result: bool) -> None:
        if job.settle(result) and not result:
            self._metrics.count("linker_failed_offloads")

    def _failed(self, job: Offload, error: Exception) -> None:
        self._settle(job, False)
        logger.warning("flexkv: an offload failed: %s: %s", type(error).__name__, error)

    def _run(self, job: Offload) -> None:
        if job.result is not None:
            return
        self._stream.wait_for(job.ready)
        with self._stores.in_use():
            stored = [self._store(job, given) for given in job.given]
        self._settle(job, all(stored))

    def _store(self, job: Offload, given: Given) -> bool:
        """Pages of one pool; True if another rank writes it."""
        if job.epoch != self._epoch():
            raise TierError("the weights have changed")
        opened = self._stores.get(given.pool.name)
        if opened is None:
            raise TierError(f"pool {given.pool.name} is not open")
        if not opened.spec.writes:
            return True
        staging, keys = self._staging[given.pool.name], page_keys(given.texts)
        parent, good = job.parent if given.pool.for_every_page else None, True
        for part, rows, _ in chunks(len(keys), staging.halves("offload")):
            with job.reading:
                if job.result is not None:
                    return False
                given.pool.gather(given.page_ids[part], staging.device_rows(rows))
                staging.to_host(rows)
                finish(self._stream.record())
            end = time.monotonic() + CALL_S
            flags = write(opened, keys[part], staging.tokens(rows), parent, end)
            good = good and flags is not None and all(flags)
            parent = keys[part][-1]
        return good
