"""CacheEngine: plan, move, commit. The only place that knows index, tier, neighbours and mover together.

``_lock`` guards the index and is held for dict work only: never for I/O, never while logging.
``_publish`` puts journal appends and the index changes they announce into one order; it is taken before
``_lock``, never after it, and no read takes it. Bytes move under neither: pins, WRITING slots and the
second look at a neighbour's journal protect them.

Failures of the world end here: they are counted and become misses.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from flexkv_sglang.backends.checksum import WRITTEN_KIND, ChecksumKind, page_checksum
from flexkv_sglang.backends.local_tier import Recovered
from flexkv_sglang.backends.neighbours import NeighbourPage, NeighbourStore
from flexkv_sglang.backends.slot_file import Extents, SlotFileTier
from flexkv_sglang.errors import JournalError, TierError
from flexkv_sglang.eviction import ReuseDensity
from flexkv_sglang.index import TierIndex
from flexkv_sglang.metrics import Metrics
from flexkv_sglang.prefix import cut_after_first_failure
from flexkv_sglang.transfer import Outcome, PageMover
from flexkv_sglang.types import PageBuffers, PageKey, SlotId

logger = logging.getLogger(__name__)

_SCAN_INTERVAL_S = 0.25
_JOIN_TIMEOUT_S = 2.0
_LOCK_SPAN = 512  # keys looked up under one hold of the lock


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one page of a get comes from: an own slot, or a neighbour's claim."""

    key: PageKey
    slot: SlotId | None
    neighbour: NeighbourPage | None
    kind: ChecksumKind
    checksum: int


class GetPlan:
    """The leading run of a request that can be read, pinned until the block is left."""

    def __init__(self, engine: CacheEngine, keys: Sequence[PageKey]) -> None:
        self._engine = engine
        self.sources: list[_Source] = []
        try:
            self._collect(keys)
        except BaseException:
            self._release()
            raise

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
        engine = self._engine
        with engine._lock:
            engine._index.unpin([s.slot for s in self.sources if s.slot is not None])
        engine._neighbours.release([s.neighbour for s in self.sources if s.neighbour is not None])

    def _collect(self, keys: Sequence[PageKey]) -> None:
        """Alternate between own pages and neighbours' pages until neither goes on."""
        engine = self._engine
        while len(self.sources) < len(keys):
            start = len(self.sources)
            with engine._lock:
                slots = engine._index.pin(keys[start : start + _LOCK_SPAN])
            checks = engine._tier.checksums(slots)
            self.sources += [
                _Source(keys[start + i], slot, None, *checks[i]) for i, slot in enumerate(slots)
            ]
            after = len(self.sources)
            if after < len(keys):
                claims = engine._neighbours.find(keys[after:])
                self.sources += [_Source(c.key, None, c, c.kind, c.checksum) for c in claims]
            if len(self.sources) == start:
                return


class CacheEngine:
    """Look up, get, put and clear pages of one namespace. Thread-safe; see the module docstring.

    ``verify``: "full" (every byte of every read), "sampled" or "off". Tier and neighbours know no page that
    was written with less than is asked for. Owns everything it is given and closes it.
    """

    def __init__(
        self,
        tier: SlotFileTier,
        recovered: Recovered,
        neighbours: NeighbourStore,
        mover: PageMover,
        metrics: Metrics,
        verify: str,
    ) -> None:
        self._tier = tier
        self._neighbours = neighbours
        self._mover = mover
        self._metrics = metrics
        self._written_kind = WRITTEN_KIND[verify]
        self._lock = threading.Lock()
        self._publish = threading.Lock()
        self._index = TierIndex(tier.slot_count, ReuseDensity(tier.slot_count))  # guarded by _lock
        dropped = self._index.load(recovered.keys, recovered.slots, recovered.parents)
        metrics.count("recovered_pages", len(recovered.keys) - len(dropped))
        self._neighbours.scan()
        self._stop = threading.Event()
        self._tail = threading.Thread(
            target=self._follow_neighbours, name="flexkv-tail", daemon=True
        )
        self._tail.start()

    def prefix(self, keys: Sequence[PageKey]) -> int:
        """Length of the leading run of pages that are here or at a neighbour. Memory only."""
        count = 0
        while count < len(keys):
            start = count
            with self._lock:
                count += self._index.prefix(keys[count : count + _LOCK_SPAN])
            if count < len(keys):
                count += self._neighbours.prefix(keys[count:])
            if count == start:
                break
        return count

    def page_count(self) -> int:
        """Own READY pages."""
        with self._lock:
            return len(self._index)

    def neighbour_page_count(self) -> int:
        """Pages that neighbours claim."""
        return len(self._neighbours)

    def get(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> list[bool]:
        """Read pages into ``targets``. One bool per key; False from the first page that was not there,
        not right, or not in time (``time.monotonic()`` seconds)."""
        assert len(keys) == len(targets), (len(keys), len(targets))
        started = time.monotonic()
        with GetPlan(self, keys) as plan:
            results = self._read(plan, targets.take(slice(len(plan.sources))), deadline)
        results = cut_after_first_failure(results)
        pages = sum(results)
        self._metrics.transferred(
            "read", pages, pages * targets.payload_bytes, time.monotonic() - started
        )
        self._metrics.count("read_miss_absent", len(keys) - len(plan.sources))
        return results + [False] * (len(keys) - len(results))

    def _read(self, plan: GetPlan, targets: PageBuffers, deadline: float) -> list[bool]:
        sources = plan.sources
        if not sources:
            return []
        own = [i for i, source in enumerate(sources) if source.slot is not None]
        foreign = [i for i, source in enumerate(sources) if source.neighbour is not None]
        results = [False] * len(sources)
        bad: list[int] = []
        for rows, extents in (
            (own, self._tier.extents([_slot(sources[i]) for i in own])),
            (foreign, self._neighbours.extents([_claim(sources[i]) for i in foreign])),
        ):
            if rows:
                self._read_rows(sources, rows, extents, targets, deadline, results, bad)
        self._recheck_neighbours(sources, foreign, results, bad)
        self._drop_corrupt([sources[i] for i in bad])
        return results

    def _read_rows(
        self,
        sources: list[_Source],
        rows: list[int],
        extents: Extents,
        targets: PageBuffers,
        deadline: float,
        results: list[bool],
        bad: list[int],
    ) -> None:
        def inspect(position: int, parts: list[tuple[int, int]]) -> bool:
            source = sources[rows[position]]
            if source.kind is ChecksumKind.NONE or self._written_kind is ChecksumKind.NONE:
                return True
            return page_checksum(source.kind, source.key, parts) == source.checksum

        try:
            outcomes = self._mover.read(extents, targets.take(rows), deadline, inspect)
        except (OSError, TierError) as exc:
            self._trouble("read", exc)
            return
        for row, outcome in zip(rows, outcomes, strict=True):
            results[row] = outcome is Outcome.DONE
            if outcome in (
                Outcome.REFUSED,
                Outcome.SHORT,
            ):  # it will not get better by asking again
                bad.append(row)
        self._metrics.count("read_failed_pages", outcomes.count(Outcome.FAILED))

    def _recheck_neighbours(
        self, sources: list[_Source], foreign: list[int], results: list[bool], bad: list[int]
    ) -> None:
        """The owner may have rewritten a slot while we read it: its journal says so by now."""
        claims = [_claim(sources[i]) for i in foreign]
        for row, valid in zip(foreign, self._neighbours.still_valid(claims), strict=True):
            if not valid:
                self._metrics.count("neighbour_lost_pages", int(results[row]))
                results[row] = False
                if row in bad:
                    bad.remove(row)  # torn, not corrupt
        self._metrics.count("neighbour_read_pages", sum(results[i] for i in foreign))

    def _drop_corrupt(self, sources: list[_Source]) -> None:
        """Refuse these pages from now on, here and for the neighbours."""
        if not sources:
            return
        self._metrics.count("corrupt_pages", len(sources))
        logger.error(
            "flexkv: %d pages failed their checksum and are dropped (first: %s)",
            len(sources),
            sources[0].key.hex(),
        )
        own = [(source.key, source.slot) for source in sources if source.slot is not None]
        self._neighbours.forget(
            [source.neighbour for source in sources if source.neighbour is not None]
        )
        with self._publish:
            self._tier.publish_del(own)
            with self._lock:
                for key, slot in own:
                    self._index.discard(key, slot)

    def put(
        self, keys: Sequence[PageKey], sources: PageBuffers, parent: PageKey | None, deadline: float
    ) -> list[bool]:
        """Write the pages that are neither here nor at a neighbour. One bool per key: is it stored now?

        ``keys`` is one chain; ``parent`` the page before it, if known. Returns after the data is complete
        on the medium and its commit records are on the journal; the caller's memory is not read after.
        """
        assert len(keys) == len(sources), (len(keys), len(sources))
        started = time.monotonic()
        held = frozenset(i for i, flag in enumerate(self._neighbours.holds(keys)) if flag)
        with self._lock:
            reserved = self._index.reserve(keys, parent, held)
        results = [True] * len(keys)
        for position in reserved.refused:
            results[position] = False
        self._metrics.count("write_refused_pages", len(reserved.refused))
        self._metrics.count("evicted_pages", len(reserved.victims))
        self._metrics.count(
            "write_present_pages", len(keys) - len(reserved.granted) - len(reserved.refused)
        )
        if not reserved.granted:
            return results
        rows = [position for position, _ in reserved.granted]
        slots = [slot for _, slot in reserved.granted]
        with self._publish:  # before the slots are rewritten
            self._tier.publish_del(reserved.victims)
        done = self._write([keys[row] for row in rows], slots, sources.take(rows), deadline)
        for row, flag in zip(rows, done, strict=True):
            results[row] = flag
        pages = sum(done)
        self._metrics.transferred(
            "write", pages, pages * sources.payload_bytes, time.monotonic() - started
        )
        self._metrics.count("write_failed_pages", len(done) - pages)
        self._rotate_if_due()
        return results

    def _write(
        self, keys: list[PageKey], slots: list[SlotId], sources: PageBuffers, deadline: float
    ) -> list[bool]:
        """Move, record, commit. Slots that did not make it are free again when this returns."""
        sums = [0] * len(keys)
        kind = self._written_kind

        def inspect(position: int, parts: list[tuple[int, int]]) -> bool:
            sums[position] = page_checksum(kind, keys[position], parts)
            return True

        done = [False] * len(keys)
        try:
            usable = self._tier.writable(slots)
            if all(usable):
                extents = self._tier.extents(slots)
                outcomes = self._mover.write(extents, sources, deadline, inspect)
                done = [outcome is Outcome.DONE for outcome in outcomes]
        except (OSError, TierError) as exc:
            self._trouble("write", exc)
        finally:
            done = self._commit(keys, slots, sums, done)
        return done

    def _commit(
        self, keys: list[PageKey], slots: list[SlotId], sums: list[int], moved: list[bool]
    ) -> list[bool]:
        """Journal records, then the index; both under ``_publish`` so that CLEAR cannot come in between."""
        with self._publish:
            with self._lock:
                alive = self._index.still_writing(slots)
                parents = [self._index.parent_slot(slot) for slot in slots]
            good = [i for i in range(len(slots)) if moved[i] and alive[i]]
            entries = [(keys[i], slots[i], sums[i], parents[i]) for i in good]
            recorded = self._tier.publish_put(entries, self._written_kind) if entries else []
            done = [False] * len(slots)
            for i, flag in zip(good, recorded, strict=True):
                done[i] = flag
            with self._lock:
                self._index.commit([slot for slot, flag in zip(slots, done, strict=True) if flag])
                self._index.abort(
                    [slot for slot, flag in zip(slots, done, strict=True) if not flag]
                )
        return done

    def _rotate_if_due(self) -> None:
        """Start a new journal generation where most of the old one is history."""
        for index, store in enumerate(self._tier.stores):
            if store.failed or not store.journal.should_rotate(store.slots.slot_class.slot_count):
                continue
            with self._publish:
                with self._lock:
                    frozen = self._index.freeze()
                try:
                    live = self._tier.snapshot_records(*frozen.by_age(), index)
                    store.journal.rotate(live)
                    self._metrics.count("journal_rotations")
                except (OSError, JournalError) as exc:
                    store.failed = True
                    self._trouble("journal rotation", exc)

    def clear(self) -> None:
        """Forget every page of this process in this namespace, on disk and for the neighbours."""
        with self._publish:
            self._tier.publish_clear()
            with self._lock:
                self._index.clear()
        self._metrics.count("clears")

    def close(self) -> None:
        """Wait for running transfers, flush, mark the journals clean, release the owner locks. Idempotent."""
        self._stop.set()
        self._tail.join(timeout=_JOIN_TIMEOUT_S)
        if not self._mover.close():
            # A disk hangs. Whoever adopted these files now could be overwritten by what is in flight,
            # so the locks stay ours until this process ends.
            logger.error("flexkv: transfers are still in flight; the files stay locked")
            return
        self._neighbours.close()
        try:
            self._tier.close()
        except TierError as exc:
            self._trouble("close", exc)

    def check(self) -> None:
        """Assert the index's invariants (tests, ``flexkv check``)."""
        with self._lock:
            self._index.check()

    def _follow_neighbours(self) -> None:
        while not self._stop.wait(_SCAN_INTERVAL_S):
            self._neighbours.scan()

    def _trouble(self, what: str, exc: Exception) -> None:
        self._metrics.count(f"{what.replace(' ', '_')}_errors")
        logger.warning("flexkv: %s failed: %s: %s", what, type(exc).__name__, exc)


def _slot(source: _Source) -> SlotId:
    assert source.slot is not None
    return source.slot


def _claim(source: _Source) -> NeighbourPage:
    assert source.neighbour is not None
    return source.neighbour
