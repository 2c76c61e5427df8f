"""Tiers: several tiers as one, the fastest first. It knows nothing of a tier but ``Tier`` and its ``traits``.

Written through: a put goes to every written tier, so evicting from a fast one loses nothing. A page is read from the
fastest local tier that has it; if it is bad there, the next one reads it. Promotion: a page that is read from a lower
tier for the second time is put into the tier above, from the host pages that it has just been read into. That happens
before the call returns, because afterwards these host pages belong to SGLang.

Tiers that are not local (other machines) are asked for pages that no local tier has, and read while the local tiers
read. Their pages are put into the written tiers afterwards, by the thread of ``Backfill``.

With one tier (the common case) every call goes straight to it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise

from flexkv_sglang.backends.io.pinned_memory import huge_pages
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.backfill import Backfill
from flexkv_sglang.tier import PendingGet, Tier
from flexkv_sglang.types import PageBuffers, PageKey, SlotId

PinnedPage = tuple[int, SlotId]
"""A page that is pinned: (number of the tier, the tier's own number for the page)."""

logger = logging.getLogger(__name__)

_HOLDS_SPAN = 32
"""Keys that a faster tier is asked for at once: a page that it has ends the search."""

_HUGE_PAGES_HINT = " (transfers cost less CPU with them: docs/OPERATING.md, 'Huge pages')"


class Tiers:
    """``tiers`` as one store, at least one of them local. Owns and closes them. Thread-safe as they are."""

    def __init__(self, tiers: Sequence[Tier], metrics: Metrics, *, backfill_bytes: int = 0) -> None:
        """``backfill_bytes``: bytes of a page; 0: pages of tiers that are not local are not stored here."""
        self.tiers = tuple(tiers)
        self._local = tuple(tier for tier in tiers if tier.traits.local)
        self._remote = tuple(tier for tier in tiers if not tier.traits.local)
        self._written = tuple(tier for tier in tiers if tier.traits.written)
        assert self._local
        self._only = self.tiers[0] if len(self.tiers) == 1 else None
        self._metrics = metrics
        self._backfill: Backfill | None = None
        if backfill_bytes and any(tier.traits.backfills for tier in tiers):
            self._backfill = Backfill(backfill_bytes, self.put, metrics)
        self._seen = [_SeenOnce(max(1024, tier.slot_count)) for tier in self._local[:-1]]

    @property
    def may_grow(self) -> bool:
        """Would a tier get more space if all were closed and opened again now? Memory only."""
        return any(tier.may_grow for tier in self.tiers)

    def prefix(self, keys: Sequence[PageKey], *, promise: bool = True) -> int:
        """Length of the leading run of pages that some tier has. See ``Tier.prefix``."""
        if self._only is not None:
            return self._only.prefix(keys, promise=promise)
        count = self._local_prefix(keys, promise=promise)
        while count < len(keys):
            further = 0
            for tier in self._remote:
                further = tier.prefix(keys[count:], promise=promise)
                if further:
                    break
            if not further:
                break
            count += further
            count += self._local_prefix(keys[count:], promise=promise)
        return count

    def _local_prefix(self, keys: Sequence[PageKey], *, promise: bool) -> int:
        if len(self._local) == 1:
            return self._local[0].prefix(keys, promise=promise)
        count = 0
        while count < len(keys):
            start = count
            for tier in reversed(self._local):  # the lowest is the largest
                if count < len(keys):
                    count += tier.prefix(keys[count:], promise=promise)
            if count == start:
                break
        return count

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: does some tier have the page? Pages behind a missing one count as well. Memory only."""
        flags = self._local[-1].holds(keys)
        for tier in (*self._local[:-1], *self._remote):
            if all(flags):
                break
            flags = [a or b for a, b in zip(flags, tier.holds(keys), strict=True)]
        return flags

    def pin(self, keys: Sequence[PageKey]) -> list[PinnedPage | None]:
        """Keep pages of this process from eviction until ``unpin``. Memory only.

        Per key the fastest tier that could pin it; None: no tier could, though a neighbour may have the page.
        """
        pinned: list[PinnedPage | None] = [None] * len(keys)
        for level, tier in enumerate(self.tiers):
            absent = [position for position, place in enumerate(pinned) if place is None]
            if not absent:
                break
            slots = tier.pin([keys[position] for position in absent])
            for position, slot in zip(absent, slots, strict=True):
                pinned[position] = None if slot is None else (level, slot)
        return pinned

    def invalidated(self, pinned: Mapping[PageKey, PinnedPage]) -> list[PageKey]:
        """Pinned pages that are no longer valid: damaged, cleared, or on a failed disk."""
        gone: list[PageKey] = []
        for level, tier in enumerate(self.tiers):
            pages = [(key, slot) for key, (where, slot) in pinned.items() if where == level]
            flags = tier.is_valid(pages) if pages else []
            gone += [key for (key, _), flag in zip(pages, flags, strict=True) if not flag]
        return gone

    def unpin(self, pinned: Sequence[PinnedPage]) -> None:
        """Undo ``pin``, once per page. Also called after ``close``."""
        for level, tier in enumerate(self.tiers):
            slots = [slot for where, slot in pinned if where == level]
            if slots:
                tier.unpin(slots)

    def get(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> list[bool]:
        """As ``Tier.get``, from all tiers."""
        read = self._get_shared if self._remote else self._get_local
        done = read(keys, targets, deadline)
        self._metrics.count("read_miss_pages", len(keys) - done)
        return [True] * done + [False] * (len(keys) - done)

    def _get_shared(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> int:
        """Turns of local pages and the remote pages that follow, both read at once.

        A page that is bad locally is asked for elsewhere. A remote tier has one time limit for all turns, so that a
        slow one costs it once.
        """
        limits = [tier.get_deadline(len(keys), deadline) for tier in self._remote]
        done, failed, first = 0, -1, 0
        while done < len(keys):
            here = self._local_prefix(keys[done:], promise=False)
            split = done + here
            number, read = self._begin_remote(first, keys[split:], targets, split, limits)
            try:
                got = self._get_local(keys[done:split], targets.take(slice(done, split)), deadline)
            finally:
                came = read.wait() if read is not None else 0  # no target is touched from here on
            done += got
            if got < here:
                if done == failed or time.monotonic() >= deadline:
                    break
                failed = done
            elif came:
                if self._remote[number].traits.backfills:
                    self._add_backfill(keys, split, came, targets)
                done, first = done + came, 0
            elif number + 1 < len(self._remote):
                first = number + 1  # this one delivered nothing: ask the next
            else:
                break
        return done

    def _begin_remote(
        self,
        first: int,
        keys: Sequence[PageKey],
        targets: PageBuffers,
        start: int,
        limits: Sequence[float],
    ) -> tuple[int, PendingGet | None]:
        """Begin reading ``keys`` from the first remote tier that has some: its number and the read."""
        if keys:
            part = targets.take(slice(start, None))
            for number in range(first, len(self._remote)):
                read = self._remote[number].begin_get(keys, part, limits[number])
                if read is not None:
                    return number, read
        return len(self._remote), None

    def _add_backfill(
        self, keys: Sequence[PageKey], start: int, count: int, targets: PageBuffers
    ) -> None:
        if self._backfill is not None:
            rows = slice(start, start + count)
            parent = keys[start - 1] if start else None
            self._backfill.add(keys[rows], parent, targets.take(rows))

    def _get_local(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> int:
        """Length of the leading run that local tiers delivered."""
        done = 0
        while done < len(keys):
            start = done
            for level, tier in enumerate(self._local):
                if done == len(keys):
                    break
                stop = done + self._until_faster(level, keys[done:])
                part = targets.take(slice(done, stop))
                got = sum(tier.get(keys[done:stop], part, deadline))
                self._metrics.count(f"tier{level}_hit_pages", got)
                if level and tier.traits.promotes:
                    self._promote(level - 1, keys, done, got, targets, deadline)
                done += got
                if done < stop and time.monotonic() >= deadline:
                    return done  # another tier would only be late with the same pages
            if done == start:
                break
        return done

    def put(
        self,
        keys: Sequence[PageKey],
        sources: PageBuffers,
        parent: PageKey | None,
        deadline: float,
        *,
        own: bool = False,
    ) -> list[bool]:
        """As ``Tier.put``, into every written tier. True where one of them has the page now."""
        results = [False] * len(keys)
        for tier in reversed(self._written):  # the lowest first: it keeps pages longest
            flags = tier.put(keys, sources, parent, deadline, own=own)
            results = [a or b for a, b in zip(results, flags, strict=True)]
        return results

    def clear(self) -> None:
        """Forget every page of this process in every tier."""
        for tier in self.tiers:
            tier.clear()

    def close(self) -> None:
        """Close every tier, also when one fails. Idempotent."""
        with (
            ExitStack() as stack
        ):  # last in, first out: the backfill puts pages, so it ends before the tiers
            for tier in self.tiers:
                stack.callback(tier.close)
            if self._backfill is not None:
                stack.callback(self._backfill.close)

    def released(self) -> bool:
        """After ``close``: has every transfer ended, so that the files may be deleted?"""
        return all(tier.released() for tier in self.tiers)

    def discard(self) -> None:
        """Delete every tier's files, once it ``released``. Raises ``OSError``."""
        for tier in self.tiers:
            tier.discard()

    def register_memory(self, address: int, byte_count: int) -> None:
        """Announce the host pool's memory; see ``Tier.register_memory``."""
        kind = huge_pages(address)
        logger.info(
            "flexkv: %.2f GiB of host memory, huge pages: %s%s",
            byte_count / 2**30,
            kind,
            _HUGE_PAGES_HINT if kind == "none" else "",
        )
        for tier in self.tiers:
            tier.register_memory(address, byte_count)

    def prepare(self, page: PageBuffers) -> None:
        """See ``Tier.prepare``."""
        for tier in self.tiers:
            tier.prepare(page)

    def page_count(self) -> int:
        """Pages of this process in the lowest local tier."""
        return self._local[-1].page_count()

    @property
    def slot_count(self) -> int:
        """Pages that the lowest local tier has room for."""
        return self._local[-1].slot_count

    def check(self) -> None:
        """Assert every tier's invariants; for tests."""
        for tier in self.tiers:
            tier.check()

    def _until_faster(self, level: int, keys: Sequence[PageKey]) -> int:
        """How many pages to ask this tier for: up to the next one that a faster tier has."""
        if not level:
            return len(keys)
        for start in range(1, len(keys), _HOLDS_SPAN):
            span = keys[start : start + _HOLDS_SPAN]
            flags = [tier.holds(span) for tier in self._local[:level]]
            for position, held in enumerate(zip(*flags, strict=True), start):
                if any(held):
                    return position
        return len(keys)

    def _promote(
        self,
        level: int,
        keys: Sequence[PageKey],
        start: int,
        count: int,
        targets: PageBuffers,
        deadline: float,
    ) -> None:
        """Pages ``start`` to ``start + count``, just read from below, go to ``level`` on their second hit."""
        again = self._seen[level].again(keys[start : start + count])
        rows = [start + offset for offset in again]
        breaks = [i + 1 for i, (a, b) in enumerate(pairwise(rows)) if b != a + 1]
        for low, high in pairwise([0, *breaks, len(rows)]):
            run = rows[low:high]
            if run and time.monotonic() < deadline:
                parent = keys[run[0] - 1] if run[0] else None
                part = targets.take(slice(run[0], run[-1] + 1))
                tier, wanted = self._local[level], keys[run[0] : run[-1] + 1]
                tier.put(wanted, part, parent, deadline)  # True for a page that was declined, too
                self._metrics.count("promoted_pages", sum(tier.holds(wanted)))


class _SeenOnce:
    """The last ``room`` to ``2 * room`` keys that were read from a lower tier. A race costs a promotion."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._now: set[PageKey] = set()
        self._before: set[PageKey] = set()

    def again(self, keys: Sequence[PageKey]) -> list[int]:
        """Positions of keys that are in the set. They leave it, the others join."""
        now, before = self._now, self._before
        found = []
        for position, key in enumerate(keys):
            if key in now or key in before:
                now.discard(key)
                before.discard(key)
                found.append(position)
            else:
                now.add(key)
        if len(now) > self._room:
            self._now, self._before = set(), now
        return found
