"""Loads: pages from the tiers into device slots, a batch of requests at a time, layer by layer.

    scheduler:  queue(rid, ...)   start() -> index   ...forward, waits for layers...   finish(index) -> landed?
    thread:     blocks are read whole and verified | copied to the device | scattered, layer 0 first

Blocks go through the two halves of a staging lane: one is read from disk while the other is on its way to the device.
The last chunk of each pool is scattered layer by layer for all pools, and each layer is released as soon as its copies
are issued: whoever consumes it lets its stream wait for the layer's event (``follow_layer``).

A batch that fails in any page is a failed batch: SGLang aborts its requests. After ``fail`` (an error, a deadline, a
reset) nothing more is written to the device, which ``finish`` waits for: SGLang gives the slots to others next.

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
from flexkv_sglang.linker.device_pages import DevicePool
from flexkv_sglang.linker.side_stream import SideStream, finish, follow, record_here
from flexkv_sglang.linker.staging import StagingPool, chunks
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.pool_rules import KV
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.pools.transfers import read
from flexkv_sglang.threads import JobThread

logger = logging.getLogger(__name__)

COPIES_END_S = 5.0
"""How long ``finish`` waits, after a batch is decided, until its last copies have ended."""


class Counter(Protocol):
    """SGLang's ``LayerWiseLoadCounter``: one future per layer of a batch."""

    def update_producer(self) -> int: ...
    def complete(self, index: int, layer: int) -> None: ...
    def fail(self, index: int, error: BaseException) -> None: ...
    def finish(self, index: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """How long a batch may take: ``base`` seconds and ``per_page`` more for each page, at most ``most``."""

    base: float = 5.0
    per_page: float = 0.02
    most: float = 60.0

    def seconds(self, pages: int) -> float:
        """For a batch of so many pages."""
        return min(self.most, self.base + self.per_page * pages)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Pages of one pool for one request. ``page_ids``: int64 ``[len(texts)]``, where the device pool is."""

    pool: DevicePool
    texts: list[str]
    page_ids: torch.Tensor


@dataclass(slots=True)
class LoadBatch:
    """One batch. ``lock`` is held while copies are issued; ``failed`` is set once and ends them."""

    index: int
    rids: list[str]
    wanted: list[Wanted]
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
        """The time in which copies to the device are issued. Raises ``TierError`` when the batch has failed."""
        with self.lock:
            if self.failed:
                raise TierError(self.failed)
            yield


class Loader:
    """Of one linker. ``layers``: SGLang's transfer layers. ``epoch()``: a number that a weight update changes."""

    def __init__(  # noqa: PLR0913 - one call, spelled out
        self,
        stores: PoolStores,
        staging: Mapping[str, StagingPool],
        counter: Counter,
        layers: int,
        device: torch.device,
        metrics: Metrics,
        epoch: Callable[[], int],
        times: LoadTimes,
    ) -> None:
        self._stores, self._staging, self._counter = stores, staging, counter
        self._layers, self._device, self._metrics = layers, device, metrics
        self._epoch, self._times = epoch, times
        self._queued: dict[str, list[Wanted]] = {}  # the scheduler's alone
        self._open: dict[
            int, LoadBatch
        ] = {}  # written by the scheduler; single operations are atomic
        self._busy: dict[
            tuple[str, int], Any
        ] = {}  # (pool, half) -> event of its last copy; the thread's alone
        self._stream = SideStream(device)
        self._worker = JobThread[LoadBatch](
            "flexkv-load", self._run, self._failed, self._stream.current
        )

    def queue(self, rid: str, wanted: list[Wanted]) -> bool:
        """Note a load for the next ``start``. False if one of this request waits already."""
        if rid in self._queued:
            return False
        self._queued[rid] = wanted
        return True

    def cancel(self, rid: str) -> bool:
        """True if a load of this request had not been started; it is forgotten."""
        return self._queued.pop(rid, None) is not None

    def start(self) -> int:
        """Start what is queued, as one batch; its index, or -1 if there is nothing."""
        if not self._queued:
            return -1
        queued, self._queued = self._queued, {}
        wanted = [item for items in queued.values() for item in items]
        seconds = self._times.seconds(sum(len(item.texts) for item in wanted))
        index = self._counter.update_producer()
        batch = LoadBatch(
            index,
            list(queued),
            wanted,
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
        """Wait until nothing writes device memory for this batch any more. (Did every layer land? its requests.)

        Bounded by the batch's deadline and ``COPIES_END_S``.
        """
        batch = self._open.get(index)
        if batch is None:
            return False, []
        if not batch.over.wait(max(0.0, batch.deadline - time.monotonic())):
            self.fail(batch, "its deadline has passed")
        landed = not batch.failed
        if batch.lock.acquire(timeout=COPIES_END_S):
            try:
                batch.failed = batch.failed or "it is over"
                finish(batch.last)
            finally:
                batch.lock.release()
        else:
            logger.error("flexkv: a copy to the device hangs")
            landed = False
        landed = self._counter.finish(index) and landed
        del self._open[index]
        return landed, batch.rids

    def follow_layer(self, index: int, layer: int) -> None:
        """The calling thread's stream waits for the copies of a released layer. As often as one likes."""
        batch = self._open.get(index)
        if batch is not None and layer < len(batch.events):
            follow(batch.events[layer], self._device)

    def fail(self, batch: LoadBatch, why: str) -> None:
        """Begin no further copy for the batch; every layer that was not released fails. Idempotent, bounded."""
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
        """Fail what has passed its deadline: a forward pass may be waiting for it."""
        now = time.monotonic()
        for batch in list(self._open.values()):
            if batch.deadline < now and not batch.over.is_set():
                self.fail(batch, "its deadline has passed")

    def quiesce(self) -> list[str]:
        """Forget what is queued, fail what runs, and wait (bounded) until nothing is copied. Its requests."""
        rids = list(self._queued)
        self._queued = {}
        for index, batch in list(self._open.items()):
            self.fail(batch, "the cache is reset")
            rids += self.finish(index)[1]
        return rids

    def stop(self, seconds: float) -> bool:
        """After ``quiesce``: end the thread; False if it still runs after ``seconds``."""
        return self._worker.stop(seconds)

    def _failed(self, batch: LoadBatch, error: Exception) -> None:
        self.fail(batch, f"{type(error).__name__}: {error}")

    def _run(self, batch: LoadBatch) -> None:
        self._stream.wait_for([batch.ready])
        with self._stores.in_use():
            if batch.epoch != self._epoch():
                raise TierError("the weights have changed")
            last = [self._fill(batch, items) for items in _by_pool(batch.wanted)]
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
                self._busy[pool.name, half] = batch.last
        with batch.copying():
            batch.over.set()

    def _fill(
        self, batch: LoadBatch, items: list[Wanted]
    ) -> tuple[DevicePool, torch.Tensor, torch.Tensor]:
        """Read all pages of one pool. All but the last chunk are scattered; that one is on its way to the device."""
        device = items[0].pool
        staging = self._staging[device.name]
        keys = page_keys([text for item in items for text in item.texts])
        ids = torch.cat([item.page_ids for item in items])
        opened = self._stores.get(device.name)
        if opened is None:
            raise TierError(f"pool {device.name} is not open")
        blocks = ids
        for part, rows, half in chunks(len(keys), staging.halves("load")):
            finish(self._busy.get((device.name, half)))
            flags = read(opened, keys[part], staging.tokens(rows), batch.deadline)
            if flags is None or not all(flags):
                good = sum(flags or ())
                raise TierError(f"{device.name}: page {part.start + good} of {len(keys)} is lost")
            with batch.copying():
                blocks = staging.to_device(rows)
                if part.stop == len(keys):
                    return device, ids[part], blocks
                device.scatter(ids[part], blocks)
                self._busy[device.name, half] = batch.last = self._stream.record()
        raise AssertionError("a load without pages")


def _by_pool(wanted: list[Wanted]) -> list[list[Wanted]]:
    """Grouped by pool, KV last: it has the most pages, and the others are kept for the end."""
    groups: dict[str, list[Wanted]] = {}
    for item in wanted:
        groups.setdefault(item.pool.name, []).append(item)
    return [groups[name] for name in sorted(groups, key=lambda name: name == KV)]
