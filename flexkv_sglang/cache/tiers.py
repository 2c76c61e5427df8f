"""Tiers: several tiers as one, the fastest first; each is a ``CacheEngine`` of its own.

Written through: a put goes to every tier, so evicting from a fast one loses nothing. Read from the
fastest that has the page; a page that is bad there is read from the next. Promotion: a page that is read
from a lower tier for the second time is put into the tier above, from the host pages it has just been
read into, before the call returns (later they are not ours any more).

With one tier (the common case) every call goes straight to it.

Below the lowest tier are other nodes (``remote``): asked for what no tier here has, while the tiers read what
they have. What comes from there is put into the tiers afterwards, by a thread of ours (``keeping``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise

from flexkv_sglang.backends.io.huge_pages import huge_pages
from flexkv_sglang.backends.slots.retired import discard
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.backfill import Backfill
from flexkv_sglang.sharing.remote_pages import RemotePages
from flexkv_sglang.types import PageBuffers, PageKey, SlotId

Held = tuple[int, SlotId]
"""Where a page is kept by ``hold``: (number of the tier, slot)."""

logger = logging.getLogger(__name__)

_HUGE_PAGES_HINT = " (transfers cost less CPU with them: docs/OPERATING.md, 'Huge pages')"


class Tiers:
    """``tiers`` (at least one) as one store; owns and closes them. Thread-safe as they are."""

    def __init__(
        self,
        tiers: Sequence[CacheEngine],
        metrics: Metrics,
        remote: RemotePages | None = None,
        *,
        keep_bytes: int = 0,
    ) -> None:
        """``keep_bytes``: bytes of a page if pages of other nodes are to be kept here, else 0."""
        assert tiers
        self.tiers = tuple(tiers)
        self._metrics = metrics
        self._remote = remote
        self._keeping = Backfill(keep_bytes, self.put, metrics) if keep_bytes else None
        self._seen = [_SeenOnce(max(1024, tier.slot_count)) for tier in self.tiers[:-1]]

    def prefix(self, keys: Sequence[PageKey], *, promise: bool = True) -> int:
        """Length of the leading run of pages that some tier has. See ``CacheEngine.prefix``."""
        count = self._local_prefix(keys, promise=promise)
        while self._remote is not None and count < len(keys):
            further = self._remote.prefix(keys[count:])
            if not further:
                break
            count += further
            count += self._local_prefix(keys[count:], promise=promise)
        return count

    def _local_prefix(self, keys: Sequence[PageKey], *, promise: bool) -> int:
        if len(self.tiers) == 1:
            return self.tiers[0].prefix(keys, promise=promise)
        count = 0
        while count < len(keys):
            start = count
            for tier in reversed(self.tiers):  # the lowest is the largest
                if count < len(keys):
                    count += tier.prefix(keys[count:], promise=promise)
            if count == start:
                break
        return count

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: has some tier the page? Pages behind a hole count as well. Memory only, promises nothing."""
        flags = self.tiers[-1].holds(keys)
        for tier in self.tiers[:-1]:
            if all(flags):
                break
            flags = [a or b for a, b in zip(flags, tier.holds(keys), strict=True)]
        if self._remote is not None and not all(flags):
            flags = [a or b for a, b in zip(flags, self._remote.holds(keys), strict=True)]
        return flags

    def hold(self, keys: Sequence[PageKey]) -> list[Held | None]:
        """Keep those of these pages that this process has: none is evicted before ``release``. Memory only.

        Per key where it is kept, in the fastest tier that has it; None: here it is not, though a neighbour may have it.
        """
        held: list[Held | None] = [None] * len(keys)
        for level, tier in enumerate(self.tiers):
            absent = [position for position, place in enumerate(held) if place is None]
            if not absent:
                break
            slots = tier.local.hold([keys[position] for position in absent])
            for position, slot in zip(absent, slots, strict=True):
                held[position] = None if slot is None else (level, slot)
        return held

    def lost(self, held: Mapping[PageKey, Held]) -> list[PageKey]:
        """Which of the pages that are kept are gone all the same: found to be bad, cleared, on a disk that fails."""
        gone: list[PageKey] = []
        for level, tier in enumerate(self.tiers):
            pages = [(key, slot) for key, (where, slot) in held.items() if where == level]
            flags = tier.local.still(pages) if pages else []
            gone += [key for (key, _), flag in zip(pages, flags, strict=True) if not flag]
        return gone

    def release(self, held: Sequence[Held]) -> None:
        """Undo ``hold``, once per page; also after ``close``."""
        for level, tier in enumerate(self.tiers):
            slots = [slot for where, slot in held if where == level]
            if slots:
                tier.local.unpin(slots)

    def get(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> list[bool]:
        """As ``CacheEngine.get``, from whichever tiers and other nodes have the pages."""
        if self._remote is None:
            done = self._get_local(keys, targets, deadline)
        else:
            done = self._get_shared(self._remote, keys, targets, deadline)
        self._metrics.count("read_miss_pages", len(keys) - done)
        return [True] * done + [False] * (len(keys) - done)

    def _get_shared(
        self, remote: RemotePages, keys: Sequence[PageKey], targets: PageBuffers, deadline: float
    ) -> int:
        """Pages here and pages elsewhere by turns, both at once. A page that is bad here is asked for elsewhere.

        Other nodes are given one time limit for all turns: a slow one must not take it anew with each.
        """
        done, failed = 0, -1
        remote_deadline = remote.latest(len(keys), deadline)
        while done < len(keys):
            here = self._local_prefix(keys[done:], promise=False)
            split = done + here
            further = None
            if split < len(keys):
                further = remote.begin(
                    keys[split:], targets.take(slice(split, None)), remote_deadline
                )
            try:
                got = self._get_local(keys[done:split], targets.take(slice(done, split)), deadline)
            finally:
                came = further.wait() if further is not None else 0  # the targets are ours again
            done += got
            if got < here:
                if done == failed:
                    break
                failed = done
            elif came:
                self._keep(keys, split, came, targets)
                done += came
            else:
                break
        return done

    def _keep(self, keys: Sequence[PageKey], start: int, count: int, targets: PageBuffers) -> None:
        if self._keeping is not None:
            rows = slice(start, start + count)
            self._keeping.keep(keys[rows], keys[start - 1] if start else None, targets.take(rows))

    def _get_local(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> int:
        """Length of the leading run that tiers here delivered."""
        done = 0
        while done < len(keys):
            start = done
            for level, tier in enumerate(self.tiers):
                if done == len(keys):
                    break
                stop = done + self._until_faster(level, keys[done:])
                part = targets.take(slice(done, stop))
                got = sum(tier.get(keys[done:stop], part, deadline))
                self._metrics.count(f"tier{level}_hit_pages", got)
                if level:
                    self._promote(level - 1, keys, done, got, targets, deadline)
                done += got
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
        """As ``CacheEngine.put``, into every tier. True where one of them has the page now."""
        results = [False] * len(keys)
        for tier in reversed(self.tiers):  # the lowest first: it is the one that lasts
            flags = tier.put(keys, sources, parent, deadline, own=own)
            results = [a or b for a, b in zip(results, flags, strict=True)]
        return results

    def clear(self) -> None:
        """Forget every page of this process in every tier."""
        for tier in self.tiers:
            tier.clear()

    def close(self) -> None:
        """Close every tier, also when one fails. Idempotent."""
        with ExitStack() as stack:  # last in, first out: whoever puts pages ends before the tiers
            for tier in self.tiers:
                stack.callback(tier.close)
            if self._remote is not None:
                stack.callback(self._remote.close)
            if self._keeping is not None:
                stack.callback(self._keeping.close)

    def released(self) -> bool:
        """After ``close``: no transfer runs any more, the files are nobody's."""
        return not any(store.lock.held for tier in self.tiers for store in tier.files.stores)

    def discard(self) -> None:
        """When ``released``: delete every tier's files, unless another process took them over. Raises ``OSError``."""
        for tier in self.tiers:
            discard(tier.files)

    def register_memory(self, address: int, byte_count: int) -> None:
        """Announce the host pool's memory; see ``PageMover.register_memory``."""
        kind = huge_pages(address)
        logger.info(
            "flexkv: %.2f GiB of host memory, huge pages: %s%s",
            byte_count / 2**30,
            kind,
            _HUGE_PAGES_HINT if kind == "none" else "",
        )
        for tier in self.tiers:
            tier.register_memory(address, byte_count)

    def page_count(self) -> int:
        """Own READY pages of the lowest tier."""
        return self.tiers[-1].page_count()

    def neighbour_page_count(self) -> int:
        """Pages that neighbours claim in the lowest tier."""
        return self.tiers[-1].neighbour_page_count()

    def remote_page_count(self) -> int:
        """Pages that other nodes claim."""
        return 0 if self._remote is None else self._remote.page_count()

    def check(self) -> None:
        """Assert every index's invariants."""
        for tier in self.tiers:
            tier.check()

    def _until_faster(self, level: int, keys: Sequence[PageKey]) -> int:
        """How many pages to ask this tier for: up to the next one that a faster tier has."""
        if not level:
            return len(keys)
        for position in range(1, len(keys)):
            if any(tier.find(keys[position]) for tier in self.tiers[:level]):
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
                tier, wanted = self.tiers[level], keys[run[0] : run[-1] + 1]
                tier.put(wanted, part, parent, deadline)  # True for a page that was declined, too
                self._metrics.count("promoted_pages", sum(map(tier.find, wanted)))


class _SeenOnce:
    """Keys read from below lately: the last ``room`` to ``2 * room`` of them. Races cost a promotion."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._now: set[PageKey] = set()
        self._before: set[PageKey] = set()

    def again(self, keys: Sequence[PageKey]) -> list[int]:
        """Positions of keys seen before; they are forgotten, the others remembered."""
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
