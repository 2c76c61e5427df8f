"""CacheEngine: a tier in slot files. It plans a call, moves the bytes, and commits the result.

Bytes move under no lock: pins, WRITING slots and the second look at a neighbour's journal protect them.
``local_pages`` explains the two locks. Failures of the disk end here: they are counted, reported to the
directory's breaker, and become misses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from flexkv_sglang.backends.checksum import WRITTEN_KIND, ChecksumKind, page_checksum
from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.backends.io.transfer import Extents, Outcome, PageTransfer
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.following.neighbour_journal import NeighbourPage
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.opening import Recovered
from flexkv_sglang.backends.slots.retired import discard
from flexkv_sglang.backends.slots.slot_file import SlotFileTier
from flexkv_sglang.cache.disks.call_watch import CallWatch
from flexkv_sglang.cache.disks.directories import directories_of
from flexkv_sglang.cache.health.free_space import FreeSpace
from flexkv_sglang.cache.local_pages import LOCK_SPAN, LocalPages
from flexkv_sglang.cache.stats_file import Reporter
from flexkv_sglang.cache.upkeep import Upkeep
from flexkv_sglang.errors import TierError
from flexkv_sglang.metrics.registry import Metrics, SlotAges
from flexkv_sglang.prefix import cut_after_first_failure
from flexkv_sglang.threads import OVERDUE_S, succeeded, wait_for
from flexkv_sglang.tier import Tier
from flexkv_sglang.types import PageBuffers, PageKey, SlotId

logger = logging.getLogger(__name__)

CLOSE_S = 3.0
"""Limit of ``close``. Of this, for the last stats files, and for what is in flight:"""

_REPORT_S, _DRAIN_S = 0.5, 1.0
_LOOK_S = 0.25


class GetPlan:
    """The leading run of a request that can be read. Its pages are pinned until the ``with`` block ends.

    Columns, no object per own page. ``keys``, ``kinds``, ``sums``: per page of the run, its key and the checksum
    that its bytes must have. ``own`` and ``slots``: positions of own pages and their slots. ``foreign`` and
    ``claims``: positions of neighbours' pages and their claims.
    """

    def __init__(
        self, pages: LocalPages, neighbours: NeighbourStore, keys: Sequence[PageKey]
    ) -> None:
        self._pages = pages
        self._neighbours = neighbours
        self.keys: Sequence[PageKey] = ()
        self.kinds: list[ChecksumKind] = []
        self.sums: list[int] = []
        self.own: list[int] = []
        self.slots: list[SlotId] = []
        self.foreign: list[int] = []
        self.claims: list[NeighbourPage] = []
        try:
            self._collect(keys)
        except BaseException:
            self._release()
            raise
        self.keys = keys[: len(self.sums)]

    def __enter__(self) -> GetPlan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self.slots:
            self._pages.unpin(self.slots)
        if self.claims:
            self._neighbours.release(self.claims)

    def _collect(self, keys: Sequence[PageKey]) -> None:
        """Alternate between own pages and neighbours' pages until neither has the next one."""
        count = 0
        while count < len(keys):
            start = count
            slots = self._pages.pin(keys[start : start + LOCK_SPAN])
            self.slots += slots
            kinds, sums = self._pages.tier.checksums(slots)
            self.kinds += kinds
            self.sums += sums
            count += len(slots)
            self.own += range(start, count)
            if count < len(keys):
                claims = self._neighbours.find(keys[count:])
                self.claims += claims
                self.kinds += [claim.kind for claim in claims]
                self.sums += [claim.checksum for claim in claims]
                self.foreign += range(count, count + len(claims))
                count += len(claims)
            if count == start:
                return


class CacheEngine(Tier):
    """Pages of one namespace in slot files. Threads: any.

    ``verify``: "full" (every byte of every read), "sampled" or "off". ``tier`` and ``neighbours`` know no page that
    was written with a weaker checksum. ``min_free``: bytes left to other users of each disk. ``level``: number of
    the tier, the fastest is 0. The engine owns all that it is given and closes it.
    """

    def __init__(  # noqa: PLR0913 - one call, spelled out
        self,
        tier: SlotFileTier,
        recovered: Recovered,
        neighbours: NeighbourStore,
        mover: PageMover,
        metrics: Metrics,
        verify: str,
        *,
        min_free: int | None = None,
        level: int = 0,
    ) -> None:
        self._tier = tier
        self._neighbours = neighbours
        self._mover = mover
        self._metrics = metrics
        self._written_kind = WRITTEN_KIND[verify]
        directories = directories_of(tier.stores, neighbours.directories)
        self._pages = LocalPages(tier, recovered, directories)
        self._watch = CallWatch()
        metrics.count("recovered_pages", self._pages.recovered_count)
        self._ages = SlotAges(tier.slot_count, metrics)
        self._closed = False
        self._reporter = Reporter(metrics, tier, neighbours, self.page_count, level)
        self._free_space = FreeSpace(self._pages, metrics, min_free, recovered.short)
        self._upkeep = Upkeep(
            directories,
            self._pages,
            neighbours,
            mover,
            self._watch,
            metrics,
            min_free,
            self._free_space,
            self._reporter.write,
        )
        self._neighbours.scan()
        self._upkeep.start()

    def prefix(self, keys: Sequence[PageKey], *, promise: bool = True) -> int:
        """Length of the leading run of pages that are here or at a neighbour. Memory only.

        ``promise``: own pages stay until they are read, for a short time; see ``LookupPins``.
        """
        count = 0
        while count < len(keys):
            start = count
            count += self._pages.prefix(keys[count : count + LOCK_SPAN], promise=promise)
            if count < len(keys):
                count += self._neighbours.prefix(keys[count:])
            if count == start:
                break
        return count

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: can this page be read here or at a neighbour? Memory only."""
        flags: list[bool] = []
        for start in range(0, len(keys), LOCK_SPAN):
            flags += self._pages.holds(keys[start : start + LOCK_SPAN])
        if not all(flags):
            flags = [a or b for a, b in zip(flags, self._neighbours.holds(keys), strict=True)]
        return flags

    def page_count(self) -> int:
        """Own READY pages."""
        with self._pages.lock:
            return len(self._pages.index)

    def neighbour_page_count(self) -> int:
        """Pages that neighbours claim."""
        return len(self._neighbours)

    @property
    def slot_count(self) -> int:
        """Slots of this process, including those of directories that are bypassed."""
        return self._tier.slot_count

    @property
    def may_grow(self) -> bool:
        """It started with less than its share, and there is room now: opened again it gets more."""
        return self._free_space.may_grow

    def get(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> list[bool]:
        """Read pages. False from the first page on that was absent, damaged, or late."""
        assert len(keys) == len(targets), (len(keys), len(targets))
        started = time.monotonic()
        self._first_look(deadline)
        with GetPlan(self._pages, self._neighbours, keys) as plan:
            results = self._read(plan, targets.take(slice(len(plan.keys))), deadline)
        results = cut_after_first_failure(results)
        pages = sum(results)
        self._metrics.transferred(
            "read", pages, pages * targets.payload_bytes, time.monotonic() - started
        )
        return results + [False] * (len(keys) - len(results))

    def _read(self, plan: GetPlan, targets: PageBuffers, deadline: float) -> list[bool]:
        results = [False] * len(plan.keys)
        bad: list[int] = []
        if plan.own:
            extents = self._tier.extents(plan.slots)
            self._read_rows(plan, plan.own, plan.slots, extents, targets, deadline, results, bad)
        if plan.foreign:
            extents = self._neighbours.extents(plan.claims)
            self._read_rows(plan, plan.foreign, [], extents, targets, deadline, results, bad)
            self._recheck_neighbours(plan, results, bad, deadline)
        if bad:
            self._drop_corrupt(plan, frozenset(bad))
        return results

    def _read_rows(  # noqa: PLR0913 - one kind of rows of ``_read``
        self,
        plan: GetPlan,
        rows: list[int],
        own_slots: list[SlotId],
        extents: Extents,
        targets: PageBuffers,
        deadline: float,
        results: list[bool],
        bad: list[int],
    ) -> None:
        """``own_slots``: the slots of ``rows``; empty if these are neighbours' pages."""
        keys, kinds, sums = plan.keys, plan.kinds, plan.sums
        unchecked = self._written_kind is ChecksumKind.NONE

        def verify(position: int, parts: list[tuple[int, int]]) -> bool:
            row = rows[position]
            kind = kinds[row]
            if unchecked or kind is ChecksumKind.NONE:
                return True
            return page_checksum(kind, keys[row], parts) == sums[row]

        self._ages.touch(own_slots)
        breakers = self._tier.breakers(own_slots) if own_slots else self._claimed_in(plan.claims)
        outcomes = [Outcome.FAILED] * len(rows)
        try:
            part = targets if len(rows) == len(targets) else targets.take(rows)
            transfer = PageTransfer(*extents, part, deadline, verify)
            with self._watch.call(transfer, breakers):
                outcomes = self._mover.move(transfer)
        except (OSError, TierError) as exc:
            self._trouble("read", exc)
        if outcomes.count(Outcome.DONE) == len(rows):
            for row in rows:
                results[row] = True
        else:
            self._count_failures(rows, outcomes, results, bad)
        if own_slots:
            healthy = self._report_health(breakers, outcomes, "read")
            bad += [  # a bad spot on a disk that works: another read of it fails as well
                row
                for row, outcome, breaker in zip(rows, outcomes, breakers, strict=True)
                if outcome is Outcome.FAILED and breaker in healthy
            ]

    def _count_failures(
        self,
        rows: list[int],
        outcomes: Sequence[Outcome],
        results: list[bool],
        bad: list[int],
    ) -> None:
        for row, outcome in zip(rows, outcomes, strict=True):
            results[row] = outcome is Outcome.DONE
            if outcome in (Outcome.REFUSED, Outcome.SHORT):  # another read does not help
                bad.append(row)
        self._metrics.count("read_failed_pages", outcomes.count(Outcome.FAILED))
        self._metrics.count("read_late_pages", outcomes.count(Outcome.LATE))

    def _report_health(
        self, breakers: Sequence[Breaker], outcomes: Sequence[Outcome], what: str
    ) -> set[Breaker]:
        """Report the outcomes to each directory's breaker. Returns the breakers of directories where a page moved."""
        working, opened = set(), False
        distinct = set(breakers)
        for breaker in distinct:
            mine = outcomes
            if len(distinct) > 1:
                mine = [o for o, b in zip(outcomes, breakers, strict=True) if b is breaker]
            moved = mine.count(Outcome.DONE) + mine.count(Outcome.REFUSED)
            failed, writing = mine.count(Outcome.FAILED), what == "write"
            if breaker.record(moved, failed, f"{what} errors", writing=writing):
                opened = True
            if moved:
                working.add(breaker)
        if opened:
            self._upkeep.bypass_failed()
        return working

    def _recheck_neighbours(
        self, plan: GetPlan, results: list[bool], bad: list[int], deadline: float
    ) -> None:
        """Drop pages whose owner rewrote the slot during the read: its journal says so by now.

        So are pages in a directory whose journals cannot be read in time.
        """
        places = {claim.journal.directory for claim in plan.claims}
        seen = self._look(places, max(deadline, time.monotonic() + OVERDUE_S))
        known = self._neighbours.confirmed(plan.claims)
        for row, claim, same in zip(plan.foreign, plan.claims, known, strict=True):
            valid = same and claim.journal.directory in seen
            if not valid:
                self._metrics.count("neighbour_lost_pages", int(results[row]))
                results[row] = False
                if row in bad:
                    bad.remove(row)  # torn, not corrupt
        self._metrics.count("neighbour_read_pages", sum(results[i] for i in plan.foreign))

    def _look(self, places: Collection[Path], end: float) -> set[Path]:
        """Have neighbours' journals in ``places`` read now, until ``end``. Returns the places where that was done."""
        looks = {
            d.path: d.neighbours.post(
                partial(self._neighbours.poll_directory, d.path), end - time.monotonic()
            )
            for d in self._upkeep.directories
            if d.path in places and d.breaker.is_readable
        }
        wait_for(list(looks.values()), end)
        return {path for path, look in looks.items() if succeeded(look)}

    def _first_look(self, deadline: float) -> None:
        """Before neighbours' pages are looked for: what they have just stored counts, too."""
        if self._neighbours.neighbour_count:
            self._look(self._neighbours.directories, min(deadline, time.monotonic() + _LOOK_S))

    def _drop_corrupt(self, plan: GetPlan, bad: frozenset[int]) -> None:
        """Forget the pages at these positions, here and for the neighbours."""
        self._metrics.count("corrupt_pages", len(bad))
        logger.error(
            "flexkv: %d pages failed their checksum and are dropped (first: %s)",
            len(bad),
            plan.keys[min(bad)].hex(),
        )
        own = [
            (plan.keys[row], slot)
            for row, slot in zip(plan.own, plan.slots, strict=True)
            if row in bad
        ]
        self._neighbours.forget(
            [claim for row, claim in zip(plan.foreign, plan.claims, strict=True) if row in bad]
        )
        self._pages.drop(own)

    def put(
        self,
        keys: Sequence[PageKey],
        sources: PageBuffers,
        parent: PageKey | None,
        deadline: float,
        *,
        own: bool = False,
    ) -> list[bool]:
        """Write the pages that are neither here nor, unless ``own``, at a neighbour. Per key: is it stored now?

        True also for a declined page, which is worth less than the cached ones: it counts as written and evicted at
        once, because SGLang drops the rest of an operation at a False. Returns after the bytes are complete on the
        medium and their commit records are in the journal.
        """
        assert len(keys) == len(sources), (len(keys), len(sources))
        if self._closed:
            return [False] * len(keys)
        started = time.monotonic()
        if not own:
            self._first_look(deadline)
        claimed = [] if own else self._neighbours.holds(keys)
        held = frozenset(i for i, flag in enumerate(claimed) if flag)
        reserved = self._pages.reserve(keys, parent, held)
        results = [True] * len(keys)
        for position in reserved.refused:
            results[position] = False
        self._metrics.count("write_refused_pages", len(reserved.refused))
        self._metrics.count("write_declined_pages", len(reserved.declined))
        self._ages.evicted(slot for _, slot in reserved.victims)
        absent = len(reserved.granted) + len(reserved.refused) + len(reserved.declined)
        self._metrics.count("write_present_pages", len(keys) - absent)
        if not reserved.granted:
            return results
        rows = [position for position, _ in reserved.granted]
        slots = [slot for _, slot in reserved.granted]
        self._ages.touch(slots)
        written = [keys[row] for row in rows]
        done = self._write(written, slots, reserved.victims, sources.take(rows), deadline)
        for row, flag in zip(rows, done, strict=True):
            results[row] = flag
        pages = sum(done)
        self._metrics.transferred(
            "write", pages, pages * sources.payload_bytes, time.monotonic() - started
        )
        self._metrics.count("write_failed_pages", len(done) - pages)
        return results

    def _write(
        self,
        keys: list[PageKey],
        slots: list[SlotId],
        victims: list[tuple[PageKey, SlotId]],
        sources: PageBuffers,
        deadline: float,
    ) -> list[bool]:
        """Tombstones, bytes, records, index, in this order. Slots whose write failed are free when this returns.

        Those of a directory that hangs are freed when its operations have ended.
        """
        sums = [0] * len(keys)
        kind = self._written_kind

        def verify(position: int, parts: list[tuple[int, int]]) -> bool:
            row = rows[position]
            sums[row] = page_checksum(kind, keys[row], parts)
            return True

        done, left = [False] * len(keys), frozenset[int]()
        try:
            buried, left = self._pages.bury(victims, slots, deadline)  # before slots are rewritten
            writable = self._tier.writable(slots)
            rows = [i for i in range(len(slots)) if buried[i] and writable[i]]
            targets = [slots[row] for row in rows]
            breakers = self._tier.breakers(targets)
            if rows:
                extents, part = self._tier.extents(targets), sources.take(rows)
                transfer = PageTransfer(*extents, part, deadline, verify, writing=True)
                outcomes = [Outcome.FAILED] * len(rows)
                try:
                    with self._watch.call(transfer, breakers):
                        outcomes = self._mover.move(transfer)
                finally:
                    left |= self._left(transfer, rows, slots, breakers)
                    self._report_health(breakers, outcomes, "write")
                for row, outcome in zip(rows, outcomes, strict=True):
                    done[row] = outcome is Outcome.DONE
        except (OSError, TierError) as exc:
            self._trouble("write", exc)
        finally:
            end = max(deadline, time.monotonic() + OVERDUE_S)
            done = self._pages.record(keys, slots, sums, done, self._written_kind, end, left)
        return done

    def _left(
        self,
        transfer: PageTransfer,
        rows: list[int],
        slots: list[SlotId],
        breakers: Sequence[Breaker],
    ) -> frozenset[int]:
        """The rows whose write hangs. Their directories are bypassed, their slots are freed when it has ended."""
        flying = np.flatnonzero(transfer.flying).tolist()
        if not flying:
            return frozenset()
        for breaker in {breakers[position] for position in flying}:
            breaker.trip("a write hangs")
        self._mover.abandon()
        self._upkeep.bypass_failed()
        left = frozenset(rows[position] for position in flying)
        self._pages.abort_after(transfer.ended, [slots[row] for row in left])
        return left

    def _claimed_in(self, claims: Sequence[NeighbourPage]) -> list[Breaker]:
        breakers = {d.path: d.breaker for d in self._upkeep.directories}
        return [breakers[claim.journal.directory] for claim in claims]

    def pin(self, keys: Sequence[PageKey]) -> list[SlotId | None]:
        """Keep own pages from eviction; a neighbour's page is not pinned."""
        return self._pages.pin_each(keys)

    def unpin(self, slots: Sequence[SlotId]) -> None:
        """Undo ``pin``."""
        self._pages.unpin(slots)

    def is_valid(self, pages: Sequence[tuple[PageKey, SlotId]]) -> list[bool]:
        """Per pinned page: is it still READY in its slot?"""
        return self._pages.is_valid(pages)

    def register_memory(self, address: int, byte_count: int) -> None:
        """Announce the host pool's memory; see ``PageMover.register_memory``."""
        self._mover.register_memory(address, byte_count)

    def prepare(self, page: PageBuffers) -> None:
        """See ``Tier.prepare``."""
        self._mover.prepare(page)

    def clear(self) -> None:
        """Forget every page of this process in this namespace, at once; disk and neighbours follow.

        If the process dies before its journals say so, the pages are there again: right ones, found by their keys.
        """
        self._pages.clear()
        self._metrics.count("clears")

    def close(self) -> None:
        """Wait for running transfers, flush, mark the journals clean, release the owner locks: ``CLOSE_S`` for all.

        Directories that do not answer stay locked. Idempotent.
        """
        self._closed = True
        deadline = time.monotonic() + CLOSE_S
        directories = self._upkeep.directories
        self._upkeep.stop(deadline)
        self._reporter.close(directories, time.monotonic() + _REPORT_S)
        held = set() if self._mover.close(_DRAIN_S) else self._watch.busy()
        self._neighbours.close()
        problem = self._pages.close(held, deadline)
        if problem:
            self._metrics.count("close_errors")
            logger.error("flexkv: not closed in order: %s", problem)
        for directory in directories:
            if not directory.locked:
                directory.stop(min(deadline, time.monotonic() + _REPORT_S))

    def released(self) -> bool:
        """After ``close``: False while a directory that hangs keeps its files locked."""
        return not any(directory.locked for directory in self._upkeep.directories)

    def discard(self) -> None:
        """Delete the files, but for those that another process has adopted meanwhile. Raises ``OSError``."""
        discard(self._tier)

    def check(self) -> None:
        """Assert the index's invariants."""
        with self._pages.lock:
            self._pages.index.check()

    def _trouble(self, what: str, exc: Exception) -> None:
        self._metrics.count(f"{what.replace(' ', '_')}_errors")
        logger.warning("flexkv: %s failed: %s: %s", what, type(exc).__name__, exc)
