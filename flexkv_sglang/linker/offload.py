"""Offloads: pages from device slots into the tiers, in the order in which SGLang inserts them.

    scheduler:  accept(...)                    completed() -> count    pop() -> stored?
    thread:     pages are gathered into staging (SGLang may reuse the slots) | written | settled

Each accepted offload is settled exactly once and reported in the order of acceptance, because all ranks pop the same
number. SGLang keeps the pages' slots until then, so an offload that takes too long is given up: before or after its
pages are read from the device, never during that read, which takes milliseconds.

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
from flexkv_sglang.linker.device_pages import DevicePages
from flexkv_sglang.linker.side_stream import SideStream, synchronize
from flexkv_sglang.linker.staging import StagingRows, chunks
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.pools.transfers import write
from flexkv_sglang.threads import JobThread
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

OFFLOAD_S = 30.0
"""Seconds after which an offload that is not done is given up: its pages occupy device memory."""

CALL_S = 8.0
"""Time limit for the write of one chunk, as in the storage backend."""

COPY_S = 5.0
"""A copy from the device that runs longer than this hangs."""

WAITING_BYTES_MAX = 4 << 30
"""When more bytes wait, an offload is refused (accepted, and reported as not stored)."""


@dataclass(slots=True)
class Offload:
    """One accepted offload. ``reading`` is held while its pages are read from the device."""

    pages: list[DevicePages]
    ready: list[Any]
    deadline: float
    epoch: int
    parent: PageKey | None
    byte_count: int
    reading: threading.Lock = field(default_factory=threading.Lock)
    settle_lock: threading.Lock = field(default_factory=threading.Lock)
    result: bool | None = None

    def settle(self, result: bool) -> bool:
        """Set the result unless it is set; True when this call set it."""
        with self.settle_lock:
            if self.result is not None:
                return False
            self.result = result
            return True

    def give_up(self) -> bool:
        """Settle as not stored, unless a read of its pages is running."""
        if not self.reading.acquire(blocking=False):
            return False
        try:
            return self.settle(False)
        finally:
            self.reading.release()


class Offloader:
    """The offloads of one linker. ``epoch()``: a number that each weight update changes."""

    def __init__(
        self,
        stores: PoolStores,
        staging: Mapping[str, StagingRows],
        device: torch.device,
        metrics: Metrics,
        epoch: Callable[[], int],
        seconds: float = OFFLOAD_S,
    ) -> None:
        self._stores, self._staging, self._metrics = stores, staging, metrics
        self._epoch, self._seconds = epoch, seconds
        self._accepted: deque[Offload] = deque()  # only the scheduler uses it
        self._stream = SideStream(device)
        self._worker = JobThread[Offload](
            "flexkv-offload", self._run, self._failed, self._stream.current
        )

    def accept(self, pages: list[DevicePages], ready: list[Any], parent: PageKey | None) -> None:
        """Queue pages to be stored when the events ``ready`` have happened. ``parent``: the page before them."""
        byte_count = sum(len(item.texts) * item.pool.layout.block_bytes for item in pages)
        job = Offload(
            pages, ready, time.monotonic() + self._seconds, self._epoch(), parent, byte_count
        )
        waiting = sum(job.byte_count for job in self._accepted if job.result is None)
        self._accepted.append(job)
        self._metrics.count("linker_offloads")
        if waiting + byte_count > WAITING_BYTES_MAX or not self._worker.put(job):
            self._settle(job, False)

    def refuse(self) -> None:
        """Accept an offload that cannot be done: its result, in its turn, is False."""
        job = Offload([], [], 0.0, self._epoch(), None, 0)
        self._settle(job, False)
        self._accepted.append(job)

    def completed(self) -> int:
        """Number of offloads settled from the oldest on without a gap; gives up overdue ones."""
        now, count = time.monotonic(), 0
        for job in self._accepted:
            if job.result is None and (job.deadline > now or not self._give_up(job)):
                break
            count += 1
        return count

    def pop(self) -> bool:
        """The result of the oldest; False, and nothing is popped, if it is not settled."""
        if not self._accepted or self._accepted[0].result is None:
            return False
        return bool(self._accepted.popleft().result)

    def quiesce(self, seconds: float) -> None:
        """Wait for running offloads, give up the rest after ``seconds``, and forget all results."""
        self._worker.wait_idle(seconds)
        for job in self._accepted:
            if job.result is None and not self._give_up(job):
                done = job.reading.acquire(timeout=COPY_S)  # after it, no page is read any more
                self._settle(job, False)
                if done:
                    job.reading.release()
        self._accepted = deque()

    def stop(self, seconds: float) -> bool:
        """End the thread, after ``quiesce``; False if it still runs after ``seconds``."""
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
        self._stream.continue_after(job.ready)
        with self._stores.in_use():
            stored = [self._store(job, pages) for pages in job.pages]
        self._settle(job, all(stored))

    def _store(self, job: Offload, pages: DevicePages) -> bool:
        """Store pages of one pool; True without a write if another rank writes it."""
        pages.check()
        if job.epoch != self._epoch():
            raise TierError("the weights have changed")
        opened = self._stores.get(pages.pool.name)
        if opened is None:
            raise TierError(f"pool {pages.pool.name} is not open")
        if not opened.spec.writes:
            return True
        staging, keys = self._staging[pages.pool.name], page_keys(pages.texts)
        parent, good = job.parent if pages.pool.for_every_page else None, True
        for part, rows, _ in chunks(len(keys), staging.halves("offload")):
            with job.reading:
                if job.result is not None:
                    return False
                pages.pool.gather(pages.page_ids[part], staging.device_rows(rows))
                staging.to_host(rows)
                synchronize(self._stream.record())
            end = time.monotonic() + CALL_S
            flags = write(opened, keys[part], staging.tokens(rows), parent, end)
            good = good and flags is not None and all(flags)
            parent = keys[part][-1]
        return good
