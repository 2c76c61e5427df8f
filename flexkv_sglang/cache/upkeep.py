"""Upkeep: the background work of a tier.

One thread per engine, ``flexkv-watch``, touches no disk: it notices calls and jobs that hang, bypasses their
directories, and gives each directory its duties. These run on the directory's own thread (``disks``), where
a disk that hangs holds up nobody else: stats files, neighbours, free space, journal generations, and the probes
that bring a directory back. A thread that hangs is left alone; when its job returns, the directory is probed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.backends.io.probe import can_read, probe_directory
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.cache import stats_file
from flexkv_sglang.cache.disks.call_watch import CallWatch
from flexkv_sglang.cache.disks.directories import Directory, Duty, Plan
from flexkv_sglang.cache.health import in_place
from flexkv_sglang.cache.health.free_space import FreeSpace
from flexkv_sglang.cache.health.in_place import InPlace
from flexkv_sglang.cache.local_pages import LocalPages
from flexkv_sglang.errors import JournalError, TierError, TierUnavailableError
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

_ROUND_S = 0.25
_POLL_S, _POLL_LIMIT_S = 0.02, 5.0
_FLOOR_ROUND_S = 5.0
_ROOM_ROUND_S = 5.0
_PROBE_S = 30.0
_CATCH_UP_MAX = 8


class _Probe(NamedTuple):
    """The outcome of a probe. ``readable``: writes fail, for this ``reason``, and reads do not."""

    healthy: bool = False
    readable: bool = False
    reason: str = ""


class Upkeep:
    """Background work of one engine. ``start`` and ``stop`` are called once each.

    ``write_stats`` writes the stats files of a directory.
    """

    def __init__(  # noqa: PLR0913 - all that it looks after
        self,
        directories: Sequence[Directory],
        pages: LocalPages,
        neighbours: NeighbourStore,
        mover: PageMover,
        watch: CallWatch,
        metrics: Metrics,
        min_free: int | None,
        free_space: FreeSpace,
        write_stats: Callable[[Directory], None],
    ) -> None:
        self.directories = tuple(directories)
        self._pages = pages
        self._neighbours = neighbours
        self._mover = mover
        self._watch = watch
        self._metrics = metrics
        self._files = InPlace(pages, metrics, min_free)
        self._bypassed: dict[Directory, bool] = {}  # still read? Guarded by _state_lock
        self._state_lock = threading.Lock()  # held for work on the index
        self._causes: dict[Directory, str] = {}  # why its last probe failed; one probe at a time
        self._log = RateLimitedLog(logger)
        self._plan = Plan(
            [  # one line per duty
                Duty(lambda d: neighbours.scan_directory(d.path), _ROUND_S, limit_s=10.0),
                Duty(write_stats, stats_file.INTERVAL_S, always=True),
                Duty(free_space.keep_floor, _FLOOR_ROUND_S),
                Duty(free_space.look_for_room, _ROOM_ROUND_S),
                Duty(lambda d: self._files.look(d.stores), in_place.LOOK_S, in_order=True),
                Duty(self.rotate_if_due, _ROUND_S, limit_s=10.0, in_order=True),
            ]
        )
        self._round_at = 0.0
        self._thread = PeriodicThread(
            "flexkv-watch",
            self._step,
            lambda: metrics.count("upkeep_exceptions"),
            trouble="flexkv: upkeep failed",
            first_s=_ROUND_S,
            retry_s=_ROUND_S,
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, deadline: float) -> None:
        """Begin no more duties, and wait until ``deadline`` (``time.monotonic()``) for those under way."""
        self._thread.stop()
        self._thread.join(deadline)

    def _step(self) -> float:
        now = time.monotonic()
        if now >= self._round_at:
            self._round_at = now + _ROUND_S
            self.round()
        if not self._neighbours.neighbour_count:
            return _ROUND_S
        for directory in self.directories:
            if directory.breaker.is_readable and directory.neighbours.idle:
                poll = partial(self._neighbours.poll_directory, directory.path)
                directory.neighbours.post(poll, _POLL_LIMIT_S)
        return _POLL_S

    def round(self) -> None:
        """One look at everything. Memory only."""
        for breaker in self._watch.overdue():
            if breaker.trip("a transfer hangs"):
                self._mover.abandon()
        for directory in self.directories:
            if directory.hangs(time.monotonic()):
                directory.breaker.trip("a file operation hangs")
        self.bypass_failed()
        for directory in self.directories:
            bypassed = directory in self._bypassed
            if bypassed and directory.idle and directory.breaker.begin_probe():
                self._begin_probe(directory)
            elif directory.idle:
                self._give_duties(directory)

    def _give_duties(self, directory: Directory) -> None:
        for duty in self._plan.take(directory):
            thread = directory.journal if duty.in_order else directory.upkeep
            thread.post(partial(self._do, duty, directory), duty.limit_s)

    def _do(self, duty: Duty, directory: Directory) -> None:
        try:
            duty.work(directory)
        except Exception as exc:  # noqa: BLE001 - the duty comes again, and the others must go on
            self._report(directory, exc)

    def _report(self, directory: Directory, exc: BaseException) -> None:
        self._metrics.count("upkeep_exceptions")
        text = "flexkv: upkeep of %s failed"
        self._log.log(str(exc), logging.ERROR, text, directory.path, exc_info=exc)

    def bypass_failed(self) -> None:
        """Suspend the pages in directories whose breaker has opened. Any thread, after a failed call."""
        for directory in self.directories:
            breaker = directory.breaker
            if breaker.is_open and self._bypassed.get(directory) != breaker.is_readable:
                self._bypass(directory)

    def _bypass(self, directory: Directory) -> None:
        breaker, count = directory.breaker, 0
        with self._state_lock:
            readable = breaker.is_readable
            if not breaker.is_open or self._bypassed.get(directory) is readable:
                return
            back = self._bypassed.get(directory) is False
            self._bypassed[directory] = readable
            for region in directory.stores:
                count += self._pages.suspend(region, readable=readable)
        directory.journal.refuse()  # until the directory is in use again
        if not readable:
            self._neighbours.bypass(directory.path)
            directory.upkeep.drop()
            directory.neighbours.drop()
        if back:
            text = "flexkv: %s is read again, but takes no pages: %s"
            logger.error(text, directory.path, breaker.reason)
            return
        self._metrics.count("breaker_opened")
        logger.error(
            "flexkv: %s %s: %s",
            directory.path,
            "takes no more pages" if readable else f"is bypassed, {count} pages miss",
            breaker.reason,
        )

    def _begin_probe(self, directory: Directory) -> None:
        future = directory.upkeep.post(lambda: self._probe(directory), _PROBE_S)
        future.add_done_callback(lambda done: self._probed(directory, done))

    def _probed(self, directory: Directory, probe: Future[_Probe]) -> None:
        error = None if probe.cancelled() else probe.exception()
        if error is not None:
            self._report(directory, error)
        found = _Probe() if probe.cancelled() or error is not None else probe.result()
        if not found.healthy:
            directory.breaker.end_probe(healthy=False, readable=found.readable, reason=found.reason)
        else:
            self._causes.pop(directory, None)
            directory.journal.accept()
            self._metrics.count("breaker_closed")
            logger.warning("flexkv: %s is in use again", directory.path)

    def _probe(self, directory: Directory) -> _Probe:
        """Try the directory with real I/O; after a success its pages can be read again."""
        stores = list(directory.stores.values())
        try:
            if stores:
                self._files.make_folder(directory.path)
            engine = stores[0].slots.mode.engine if stores else "auto"
            probe_directory(str(directory.path), engine)
            if self._thread.stopped:
                return _Probe()
            for region, store in directory.stores.items():
                self._files.restore(region, store)
            self._bring_back(directory)
        except (OSError, TierError, JournalError) as exc:
            new = self._causes.get(directory) != str(exc)
            self._causes[directory] = str(exc)
            level = logging.WARNING if new else logging.INFO
            logger.log(level, "flexkv: %s still fails: %s", directory.path, exc)
            reads = all(can_read(store.slots.fd, store.slots.mode) for store in stores)
            return _Probe(readable=reads and bool(stores), reason=str(exc))
        return _Probe(healthy=True)

    def _bring_back(self, directory: Directory) -> None:
        """Start new journal generations, then use the pages again. The journal's thread is idle and refuses work.

        The regions are closed until the end, so pages only leave them meanwhile: they get tombstones.
        """
        pages, before = self._pages, {}
        for region, store in directory.stores.items():
            with pages.lock:
                before[region] = pages.index.snapshot()
            columns = before[region].by_age(suspended=True)
            store.revive(pages.tier.snapshot_records(*columns, region))
        for _ in range(_CATCH_UP_MAX):
            with self._state_lock, pages.lock:
                gone = [page for r, b in before.items() for page in pages.index.gone_since(b, r)]
                before = {region: pages.index.snapshot() for region in before}
                if not gone:
                    directory.breaker.end_probe(healthy=True)
                    self._bypassed.pop(directory, None)
                    for region in directory.stores:
                        pages.index.resume(region)
                    return
            if not pages.tier.publish_del(gone, revived=True):
                break
        raise TierUnavailableError(f"{directory.path}: its journal cannot be brought up to date")

    def rotate_if_due(self, directory: Directory) -> None:
        """Start a new journal generation where most records of the old one are outdated. On the journal's thread."""
        pages = self._pages
        for region, store in directory.stores.items():
            if store.failed or not store.journal.should_rotate(store.slots.slot_class.slot_count):
                continue
            try:
                with pages.lock:
                    snapshot = pages.index.snapshot()
                store.journal.rotate(pages.tier.snapshot_records(*snapshot.by_age(), region))
                self._metrics.count("journal_rotations")
            except (OSError, JournalError) as exc:
                self._metrics.count("journal_rotation_errors")
                if store.breaker.trip(f"journal rotation: {exc}", readable=True):
                    logger.warning("flexkv: journal rotation failed: %s", exc)
