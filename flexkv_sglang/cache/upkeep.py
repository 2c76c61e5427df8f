"""Upkeep: the background work of a tier. One thread per engine.

It follows the neighbours' journals, bypasses a directory that fails or hangs and brings it back after a
probe, gives space back when others need the disk, and starts new journal generations. A probe runs in a
thread of its own, because the disk may never answer it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flexkv_sglang.backends.file_lock import is_at
from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.backends.io.probe import can_read, probe_directory
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.disk_space import floor_bytes, free_bytes
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.slot_file import OwnedStore
from flexkv_sglang.cache import in_place
from flexkv_sglang.cache.in_place import InPlace
from flexkv_sglang.cache.local_pages import LocalPages
from flexkv_sglang.cache.stats_file import Reporter
from flexkv_sglang.errors import JournalError, TierError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

_ROUND_S = 0.25
_FLOOR_ROUND_S = 5.0
_JOIN_TIMEOUT_S = 2.0
_PUBLISH_S = 2.0
_OVERDUE_S = 1.0  # past its deadline a call only drains what is in flight: tens of milliseconds
_SHRINK_PARTS = 32  # at least one slot in 32 is given back at once


class CallWatch:
    """Running transfers, with their deadlines and the directories that they use. Threads: any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for dict work
        self._calls: dict[int, tuple[float, frozenset[Breaker]]] = {}
        self._next = 0

    @contextmanager
    def call(self, deadline: float, breakers: frozenset[Breaker]) -> Iterator[None]:
        """Around a transfer. ``deadline``: ``time.monotonic()`` seconds."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._calls[number] = deadline, breakers
        try:
            yield
        finally:
            with self._lock:
                del self._calls[number]

    def overdue(self) -> set[Breaker]:
        """Directories of transfers that should have ended ``_OVERDUE_S`` ago."""
        limit = time.monotonic() - _OVERDUE_S
        with self._lock:
            return {b for deadline, used in self._calls.values() if deadline < limit for b in used}


class Upkeep:
    """Background work of one engine. ``start`` and ``stop`` are called once each."""

    def __init__(
        self,
        pages: LocalPages,
        neighbours: NeighbourStore,
        mover: PageMover,
        watch: CallWatch,
        metrics: Metrics,
        min_free: int | None,
    ) -> None:
        self._pages = pages
        self._neighbours = neighbours
        self._mover = mover
        self._watch = watch
        self._metrics = metrics
        self._min_free = min_free
        self._floor_at = time.monotonic() + _FLOOR_ROUND_S
        self._files = InPlace(pages, metrics, min_free)
        self._look_at = time.monotonic() + in_place.LOOK_S
        self._suspended: dict[int, bool] = {}  # region: still read? Guarded by _state_lock
        self._state_lock = threading.Lock()
        self.reporter: Reporter | None = None  # set before ``start``
        self._thread = PeriodicThread(
            "flexkv-upkeep",
            self._step,
            lambda: metrics.count("upkeep_exceptions"),
            trouble="flexkv: upkeep failed",
            first_s=_ROUND_S,
            retry_s=_ROUND_S,
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits a bounded time."""
        self._thread.stop()
        self._thread.join(time.monotonic() + _JOIN_TIMEOUT_S)

    def _step(self) -> float:
        self.round()
        return _ROUND_S

    def round(self) -> None:
        """One round of everything."""
        self._neighbours.scan()
        if self.reporter is not None:
            self.reporter.tick()
        for breaker in self._watch.overdue():
            if breaker.trip("a transfer hangs"):
                self._mover.abandon()
        self.bypass_failed()
        for breaker in self._breakers():
            if breaker.begin_probe():
                threading.Thread(
                    target=self._probe, args=(breaker,), name="flexkv-probe", daemon=True
                ).start()
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + in_place.LOOK_S
            self._files.look(dict(enumerate(self._pages.tier.stores)))
        if time.monotonic() >= self._floor_at:
            self._floor_at = time.monotonic() + _FLOOR_ROUND_S
            self.keep_floor()

    def bypass_failed(self) -> None:
        """Suspend the pages in directories whose breaker has opened. Any thread, after a failed call."""
        for region, store in enumerate(self._pages.tier.stores):
            if store.breaker.is_open and self._suspended.get(region) != store.breaker.is_readable:
                self._bypass(region, store)

    def _bypass(self, region: int, store: OwnedStore) -> None:
        with self._state_lock:
            readable = store.breaker.is_readable
            if not store.breaker.is_open or self._suspended.get(region, None) is readable:
                return
            back = self._suspended.get(region) is False
            self._suspended[region] = readable
            count = self._pages.suspend(region, readable=readable)
        text = "takes no more pages" if readable else f"is bypassed, {count} pages miss"
        if back:
            text = "is read again, but takes no pages"
        else:
            self._metrics.count("breaker_opened")
        logger.error("flexkv: %s %s: %s", store.lock.directory, text, store.breaker.reason)

    def _breakers(self) -> set[Breaker]:
        return {store.breaker for store in self._pages.tier.stores}

    def _probe(self, breaker: Breaker) -> None:
        """Try the directory with real I/O; after a success its pages can be read again."""
        mine = [s for s in self._pages.tier.stores if s.breaker is breaker]
        healthy = readable = False
        reason = ""
        try:
            self._files.make_folder(mine[0].lock.directory)
            probe_directory(str(mine[0].lock.directory), mine[0].slots.mode.engine)
            if not self._thread.stopped:
                self._bring_back(breaker, mine)
                healthy = True
        except (OSError, TierError, JournalError) as exc:
            logger.info("flexkv: %s still fails: %s", mine[0].lock.directory, exc)
            reason = str(exc)
            readable = all(can_read(store.slots.fd, store.slots.mode) for store in mine)
        finally:
            breaker.end_probe(healthy=healthy, readable=readable, reason=reason)
        if healthy:
            self._metrics.count("breaker_closed")
            logger.warning("flexkv: %s is in use again", mine[0].lock.directory)

    def _bring_back(self, breaker: Breaker, stores: list[OwnedStore]) -> None:
        pages = self._pages
        regions = [r for r, s in enumerate(pages.tier.stores) if s.breaker is breaker]
        for region, store in zip(regions, stores, strict=True):
            self._files.restore(region, store)
        with self._state_lock, pages.publishing(time.monotonic() + _PUBLISH_S):
            try:
                for region, store in zip(regions, stores, strict=True):
                    with pages.lock:
                        if region in self._suspended:
                            pages.index.resume(region)
                        snapshot = pages.index.snapshot()
                    store.revive(pages.tier.snapshot_records(*snapshot.by_age(), region))
            except (OSError, JournalError):
                for region in regions:
                    readable = self._suspended.setdefault(region, False)
                    pages.suspend(region, readable=readable)
                raise
            for region in regions:
                self._suspended.pop(region, None)

    def keep_floor(self) -> None:
        """Give slots back while the disk has less free space than the reserve for others."""
        for region, store in enumerate(self._pages.tier.stores):
            if store.failed or not store.slots.slot_class.slot_count:
                continue
            try:
                floor = floor_bytes(store.lock.directory, self._min_free)
                missing = floor - free_bytes(store.lock.directory)
                if missing > 0:
                    self._shrink(region, store, missing)
            except (OSError, TierError, JournalError) as exc:
                self._metrics.count("shrink_errors")
                logger.warning("flexkv: cannot shrink %s: %s", store.slots.path, exc)

    def _shrink(self, region: int, store: OwnedStore, missing: int) -> None:
        pages, before = self._pages, store.slots.slot_class
        wanted = max(-(-missing // before.slot_bytes), before.slot_count // _SHRINK_PARTS)
        pages.release_lookup_pins()
        with pages.publishing(time.monotonic() + _PUBLISH_S):
            with pages.lock:
                gone, left = pages.index.retire(region, wanted)
                snapshot = pages.index.snapshot()
            if left == before.slot_count:
                return
            pages.tier.publish_del(gone)
            store.shrink(left, pages.tier.snapshot_records(*snapshot.by_age(), region))
        self._metrics.count("given_back_slots", before.slot_count - left)
        logger.warning(
            "flexkv: %s: the disk is nearly full, %d slots are given back (%d pages), %d left",
            store.lock.directory,
            before.slot_count - left,
            len(gone),
            left,
        )

    def rotate_if_due(self) -> None:
        """Start a new journal generation where most records of the old one are outdated. Called after a put."""
        pages = self._pages
        for region, store in enumerate(pages.tier.stores):
            if store.failed or not store.journal.should_rotate(store.slots.slot_class.slot_count):
                continue
            try:
                if not is_at(store.slots.path, store.slots.fd):
                    continue  # the journal would appear alone
                with pages.publishing(time.monotonic() + _PUBLISH_S):
                    with pages.lock:
                        snapshot = pages.index.snapshot()
                    store.journal.rotate(pages.tier.snapshot_records(*snapshot.by_age(), region))
                self._metrics.count("journal_rotations")
            except (OSError, TierError, JournalError) as exc:
                self._metrics.count("journal_rotation_errors")
                if store.breaker.trip(f"journal rotation: {exc}", readable=True):
                    logger.warning("flexkv: journal rotation failed: %s", exc)
