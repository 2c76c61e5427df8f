"""Loads: pages from the tiers into device slots, a batch of requests at a time, layer by layer.

    scheduler:  queue(rid, ...)   start() -> index   ...forward, waits for layers...   finish(index) -> loaded?
    thread:     blocks are read whole and verified | copied to the device | scattered, layer 0 first

Blocks go through two halves of the staging rows: one half is read from disk while the other is copied to the device.
The last chunk of each pool is scattered layer by layer for all pools. A layer is released as soon as its copies are
issued; a consumer lets its stream wait for the layer's event (``follow_layer``).

A wrong or missing page fails its whole batch: SGLang aborts its requests. After ``fail`` (an error, a deadline, a
reset) no further copy to the device begins, and ``finish`` waits for the last one: SGLang reuses the slots next.

Threads: as above; ``fail_overdue`` on the watchdog's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from flexkv_sglang.errors import TierError
from flexkv_sglang.identity.keys import page_keys
from flexkv_sglang.linker.device_pages import DevicePages, DevicePool
from flexkv_sglang.linker.side_stream import SideStream, continue_after, record_here, synchronize
from flexkv_sglang.linker.staging import StagingRows, chunks
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.pool_rules import KV
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.pools.transfers import read
from flexkv_sglang.threads import JobThread

logger = logging.getLogger(__name__)

COPIES_END_S = 5.0
"""Seconds that ``finish`` waits for the last copies of a batch that is over."""


class LayerCounter(Protocol):
    """SGLang's ``LayerWiseLoadCounter``: one future per layer of a batch."""

    def update_producer(self) -> int: ...
    def complete(self, index: int, layer: int) -> None: ...
    def fail(self, index: int, error: BaseException) -> None: ...
    def finish(self, index: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Time limit of a batch: ``base`` seconds and ``per_page`` more for each page, at most ``most``."""

    base: float = 5.0
    per_page: float = 0.02
    most: float = 60.0

    def seconds(self, pages: int) -> float:
        """Time limit of a batch of ``pages`` pages."""
        return min(self.most, self.base + self.per_page * pages)


@dataclass(slots=True)
class LoadBatch:
    """One batch. ``lock`` is held while copies are issued; ``failed`` is set once, and no copy is issued after it."""

    index: int
    rids: list[str]
    pages: list[DevicePages]
    ready: Any
    deadline: float
    epoch: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)
    failed: str = ""
    events: list[Any] = field(default_factory=list)  # of each layer that was released
    last: Any = None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Hold the lock while copies to the device are issued. Raises ``TierError`` when the batch has failed."""
        with self.lock:
            if self.failed:
                raise TierError(self.failed)
            yield


class Loader:
    """The loads of one linker. ``layers``: SGLang's transfer layers. ``epoch()``: changes with each weight update."""

    def __init__(  # noqa: PLR0913 - one call, spelled out
        self,
        stores: PoolStores,
        staging: Mapping[str, StagingRows],
        counter: LayerCounter,
        layers: int,
        device: torch.device,
        metrics: Metrics,
        epoch: Callable[[], int],
        times: LoadTimes,
    ) -> None:
        self._stores, self._staging, self._counter = stores, staging, counter
        self._layers, self._device, self._metrics = layers, device, metrics
        self._epoch, self._times = epoch, times
        self._queued: dict[str, list[DevicePages]] = {}  # only the scheduler uses it
        # The scheduler writes it; single operations are atomic.
        self._open: dict[int, LoadBatch] = {}
        # (pool, half) -> event of its last copy; only the thread uses it.
        self._last_copy: dict[tuple[str, int], Any] = {}
        self._stream = SideStream(device)
        self._worker = JobThread[LoadBatch](
            "flexkv-load", self._run, self._failed, self._stream.current
        )

    def queue(self, rid: str, pages: list[DevicePages]) -> bool:
        """Queue a load for the next ``start``. False if one of this request waits already."""
        if rid in self._queued:
            return False
        self._queued[rid] = pages
        return True

    def cancel(self, rid: str) -> bool:
        """Forget the load of this request; False if none waits."""
        return self._queued.pop(rid, None) is not None

    def start(self) -> int:
        """Start the queued loads as one batch; its index, or -1 if none is queued."""
        if not self._queued:
            return -1
        queued, self._queued = self._queued, {}
        pages = [item for items in queued.values() for item in items]
        seconds = self._times.seconds(sum(len(item.texts) for item in pages))
        index = self._counter.update_producer()
        batch = LoadBatch(
            index,
            list(queued),
            pages,
            record_here(self._device),
            time.monotonic() + seconds,
            self._epoch(),
        )
        self._open[index] = batch
        self._metrics.count("linker_loads")
        if not self._worker.put(batch):
            self.fail(batch, "the linker is closed")
        return index

    def finish(self, index: int) -> tuple[bool, list[str]]:
        """Wait until no copy of this batch writes device memory. Returns (every layer is loaded, its requests).

        Bounded by the batch's deadline and ``COPIES_END_S``.
        """
        batch = self._open.get(index)
        if batch is None:
            return False, []
        if not batch.over.wait(max(0.0, batch.deadline - time.monotonic())):
            self.fail(batch, "its deadline has passed")
        loaded = not batch.failed
        if batch.lock.acquire(timeout=COPIES_END_S):
            try:
                batch.failed = batch.failed or "it is over"
                synchronize(batch.last)
            finally:
                batch.lock.release()
        else:
            logger.error("flexkv: a copy to the device hangs")
            loaded = False
        loaded = self._counter.finish(index) and loaded
        del self._open[index]
        return loaded, batch.rids

    def follow_layer(self, index: int, layer: int) -> None:
        """The calling thread's stream waits for the copies of a released layer. May be called again."""
        batch = self._open.get(index)
        if batch is not None and layer < len(batch.events):
            continue_after(batch.events[layer], self._device)

    def fail(self, batch: LoadBatch, why: str) -> None:
        """Begin no further copy for the batch; each layer that is not released fails. Idempotent, bounded."""
        held = batch.lock.acquire(timeout=COPIES_END_S)
        try:
            if batch.over.is_set():
                return
            batch.failed = batch.failed or why
            self._counter.fail(batch.index, TierError(why))
            batch.over.set()
            self._metrics.count("linker_failed_loads")
            logger.error(
                "flexkv: a load of %d requests failed, SGLang aborts them: %s", len(batch.rids), why
            )
        finally:
            if held:
                batch.lock.release()

    def fail_overdue(self) -> None:
        """Fail batches that have passed their deadline: a forward pass may be waiting for them."""
        now = time.monotonic()
        for batch in list(self._open.values()):
            if batch.deadline < now and not batch.over.is_set():
                self.fail(batch, "its deadline has passed")

    def quiesce(self) -> None:
        """Forget queued loads, fail running ones, and wait (bounded) until no copy runs."""
        self._queued = {}
        for index, batch in list(self._open.items()):
            self.fail(batch, "the cache is reset")
            self.finish(index)

    def stop(self, seconds: float) -> bool:
        """End the thread, after ``quiesce``; False if it still runs after ``seconds``."""
        return self._worker.stop(seconds)

    def _failed(self, batch: LoadBatch, error: Exception) -> None:
        self.fail(batch, f"{type(error).__name__}: {error}")

    def _run(self, batch: LoadBatch) -> None:
        self._stream.continue_after([batch.ready])
        with self._stores.in_use():
            if batch.epoch != self._epoch():
                raise TierError("the weights have changed")
            for item in batch.pages:
                item.check()  # before any page is written
            last = [self._fill(batch, items) for items in _by_pool(batch.pages)]
        for layer in range(self._layers):
            with batch.copying():
                for pool, ids, blocks in last:
                    if layer in pool.layers:
                        pool.scatter(ids, blocks, pool.layers[layer])
                batch.last = self._stream.record()
                batch.events.append(batch.last)
                self._counter.complete(batch.index, layer)
        for pool, _, _ in last:
            for half in (0, 1):
                self._last_copy[pool.name, half] = batch.last
        with batch.copying():
            batch.over.set()

    def _fill(
        self, batch: LoadBatch, items: list[DevicePages]
    ) -> tuple[DevicePool, torch.Tensor, torch.Tensor]:
        """Read all pages of one pool and scatter all chunks but the last, whose blocks on the device are returned."""
        device = items[0].pool
        staging = self._staging[device.name]
        keys = page_keys([text for item in items for text in item.texts])
        ids = torch.cat([item.page_ids for item in items])
        opened = self._stores.get(device.name)
        if opened is None:
            raise TierError(f"pool {device.name} is not open")
        blocks = ids
        for part, rows, half in chunks(len(keys), staging.halves("load")):
            synchronize(self._last_copy.get((device.name, half)))
            flags = read(opened, keys[part], staging.tokens(rows), batch.deadline)
            if flags is None or not all(flags):
                good = sum(flags or ())
                raise TierError(f"{device.name}: page {part.start + good} of {len(keys)} is lost")
            with batch.copying():
                blocks = staging.to_device(rows)
                if part.stop == len(keys):
                    return device, ids[part], blocks
                device.scatter(ids[part], blocks)
                self._last_copy[device.name, half] = batch.last = self._stream.record()
        raise AssertionError("a load without pages")


def _by_pool(pages: list[DevicePages]) -> list[list[DevicePages]]:
    """Grouped by pool, KV last: it has the most pages."""
    groups: dict[str, list[DevicePages]] = {}
    for item in pages:
        groups.setdefault(item.pool.name, []).append(item)
    return [groups[name] for name in sorted(groups, key=lambda name: name == KV)]
