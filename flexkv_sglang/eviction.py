"""Which leaf goes next: one policy object behind one interface. Pure: no I/O, no lock, no wall clock.

The index guarantees, outside of any policy, that only leaves are offered (``offer``, ``used`` with
``leaf=True``) and that a page which gets a child is used again, so that its old offer is stale.
Time is counted in uses. Not thread-safe: the index calls under the engine's lock.

* ``Recency``: least recently used; the reference.
* ``ReuseDensity``: the default. Pages are queued by how often they were used (once, twice, three times,
  more). For each such class the policy learns how long pages wait for their next use, and values a page
  of age *a* by the best rate of hits per slot and tick that keeping it on can reach: the index of
  Gittins ("Bandit Processes and Dynamic Allocation Indices", 1979), as EVA and LHD value lines by hit
  density (Beckmann and Sanchez, HPCA 2017; Beckmann et al., NSDI 2018). Waits that outlast a page's stay
  are seen through a table of evicted keys ("ghosts", as in ARC), else only what is kept could look good.
  Nothing is fitted to a trace; what was learned fades with a half-life of about 14 tables.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from flexkv_sglang.types import F64, I64, PageKey

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_CLASSES = 4
_BUCKETS = 64  # two per octave of age
_TICK_BITS = 42
_TICK_MASK = (1 << _TICK_BITS) - 1
_GHOSTS_PER_SLOT = 4
_FADE = 0.95  # of what was learned, each time the tables are made anew
_PRIOR_PAGES = 50.0  # a class counts as this many average pages until it has its own


class EvictionPolicy(Protocol):
    """What ``TierIndex`` asks. A slot is known from its first ``used`` to ``forget``."""

    last_use: array[int]  # per slot: tick of the last use, 0 if unknown

    def used(self, slot: int, key: PageKey, leaf: bool) -> None:
        """A READY page was written or read. ``leaf``: it has no cached child, so it may be a victim."""

    def offer(self, slot: int) -> None:
        """The last cached child of this page is gone: it may be a victim."""

    def forget(self, slot: int, key: PageKey) -> None:
        """The page has left its slot."""

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        """The leaf to evict, or None. Those that ``may_go`` refuses (pinned) are kept for later."""

    def retain(self, keep: Callable[[int], bool]) -> None:
        """Offer those that ``keep`` refuses no longer, until they are offered again."""

    def load(self, slots: I64, leaves: Iterable[int]) -> None:
        """Start from recovered pages, oldest first."""

    def clear(self) -> None:
        """Every page is gone."""

    def offers(self) -> set[int]:
        """Slots that can be found as victims. For checks."""


class Recency:
    """Least recently used leaf first."""

    _classes = 1

    def __init__(self, slot_count: int) -> None:
        self.last_use = array("Q", bytes(8 * slot_count))
        self._class = bytearray(slot_count)
        self._now = 0
        self._room = 2 * slot_count + 1024  # stale entries are thrown out when a heap reaches it
        # Heaps of last_use << 32 | slot. An entry whose tick is not the page's any more is stale.
        self._heaps: list[list[int]] = [[] for _ in range(self._classes)]

    def used(self, slot: int, key: PageKey, leaf: bool) -> None:  # noqa: ARG002
        """See ``EvictionPolicy``."""
        self._now += 1
        self.last_use[slot] = self._now
        if leaf:
            self.offer(slot)

    def offer(self, slot: int) -> None:
        """See ``EvictionPolicy``."""
        heap = self._heaps[self._class[slot]]
        if len(heap) >= self._room:
            heap[:] = [e for e in heap if self.last_use[e & _SLOT_MASK] == e >> _SLOT_BITS]
            heapq.heapify(heap)
        heapq.heappush(heap, self.last_use[slot] << _SLOT_BITS | slot)

    def forget(self, slot: int, key: PageKey) -> None:  # noqa: ARG002
        """See ``EvictionPolicy``."""
        self.last_use[slot] = 0

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        """See ``EvictionPolicy``."""
        refused: list[list[int]] = [[] for _ in self._heaps]
        heads = [
            entry
            for number in range(self._classes)
            if (entry := self._head(number, may_go, refused[number])) is not None
        ]
        found = self._least(heads) & _SLOT_MASK if heads else None
        for number, entries in enumerate(refused):
            for entry in entries:
                heapq.heappush(self._heaps[number], entry)
        return found

    def _head(self, number: int, may_go: Callable[[int], bool], refused: list[int]) -> int | None:
        heap, last_use = self._heaps[number], self.last_use
        while heap:
            entry = heap[0]
            slot = entry & _SLOT_MASK
            if last_use[slot] != entry >> _SLOT_BITS:
                heapq.heappop(heap)
            elif may_go(slot):
                return entry
            else:
                refused.append(heapq.heappop(heap))
        return None

    def _least(self, heads: Sequence[int]) -> int:
        """The entry to evict among the oldest of each class."""
        return heads[0]

    def retain(self, keep: Callable[[int], bool]) -> None:
        """See ``EvictionPolicy``."""
        for heap in self._heaps:
            heap[:] = [entry for entry in heap if keep(entry & _SLOT_MASK)]
            heapq.heapify(heap)

    def load(self, slots: I64, leaves: Iterable[int]) -> None:
        """See ``EvictionPolicy``."""
        self._now = len(slots)
        np.frombuffer(self.last_use, np.uint64)[slots] = np.arange(
            1, len(slots) + 1, dtype=np.uint64
        )
        heap = [self.last_use[slot] << _SLOT_BITS | slot for slot in leaves]
        heapq.heapify(heap)
        self._heaps[0] = heap

    def clear(self) -> None:
        """See ``EvictionPolicy``."""
        np.frombuffer(self.last_use, np.uint64)[:] = 0
        for heap in self._heaps:
            heap.clear()

    def offers(self) -> set[int]:
        """See ``EvictionPolicy``."""
        return {
            entry & _SLOT_MASK
            for heap in self._heaps
            for entry in heap
            if self.last_use[entry & _SLOT_MASK] == entry >> _SLOT_BITS
        }


class ReuseDensity(Recency):
    """The leaf with the least hits to expect per slot and tick. See the module docstring."""

    _classes = _CLASSES

    def __init__(self, slot_count: int) -> None:
        super().__init__(slot_count)
        # One u64 per entry: 20 bits of the key, 2 of the class, 42 of the last use. 32 B per slot.
        self._ghosts = array("Q", bytes(8 * (_GHOSTS_PER_SLOT * slot_count + 1)))
        self._waits = np.zeros((_CLASSES, _BUCKETS))  # next uses, by class and age
        self._pages = np.zeros(_CLASSES)  # uses after which a next one could come
        self._counted: list[
            int
        ] = []  # (class << 6 | bucket) + 1, or 0 for a new page; folded in bulk
        self._period = max(slot_count // 2, 1000)
        self._due = max(slot_count, 1000)
        # Before anything is learned: the older, the less.
        self._value = [[1.0 / (bucket + 1) for bucket in range(_BUCKETS)] for _ in range(_CLASSES)]

    def used(self, slot: int, key: PageKey, leaf: bool) -> None:
        """See ``EvictionPolicy``."""
        last, group = self.last_use[slot], self._class[slot]
        if last == 0:
            last, group = self._recall(key)
        if last:
            self._counted.append((group << 6 | _bucket(self._now - last)) + 1)
            self._class[slot] = group + 1 if group + 1 < _CLASSES else group
        else:
            self._counted.append(0)
            self._class[slot] = 0
        super().used(slot, key, leaf)
        if self._now >= self._due:
            self._learn()

    def forget(self, slot: int, key: PageKey) -> None:
        """See ``EvictionPolicy``."""
        digest = int.from_bytes(key[:12], "little")
        self._ghosts[digest % len(self._ghosts)] = (
            (digest >> 76) << 44
            | self._class[slot] << _TICK_BITS
            | (self.last_use[slot] & _TICK_MASK)
        )
        super().forget(slot, key)

    def _recall(self, key: PageKey) -> tuple[int, int]:
        """(last use, class) of an evicted page, or (0, 0)."""
        digest = int.from_bytes(key[:12], "little")
        ghost = self._ghosts[digest % len(self._ghosts)]
        if ghost >> 44 != digest >> 76 or ghost & _TICK_MASK > self._now:
            return 0, 0
        return ghost & _TICK_MASK, ghost >> _TICK_BITS & 3

    def _least(self, heads: Sequence[int]) -> int:
        value, group, now = self._value, self._class, self._now
        return min(
            heads,
            key=lambda e: value[group[e & _SLOT_MASK]][_bucket(now - (e >> _SLOT_BITS))],
        )

    def _learn(self) -> None:
        counts = np.bincount(np.array(self._counted, np.int64), minlength=_CLASSES * _BUCKETS + 1)
        waits = counts[1:].reshape(_CLASSES, _BUCKETS)
        self._counted.clear()
        self._waits = self._waits * _FADE + waits
        uses = waits.sum(1)
        begun = np.array([counts[0], uses[0], uses[1], uses[2] + uses[3]], float)
        self._pages = self._pages * _FADE + begun
        share = _PRIOR_PAGES / (self._pages.sum() + 1.0)
        all_waits, all_pages = self._waits.sum(0) * share, self._pages.sum() * share
        self._value = [
            _best_rates(self._waits[number] + all_waits, self._pages[number] + all_pages)
            for number in range(_CLASSES)
        ]
        self._due = self._now + self._period


def _bucket(age: int) -> int:
    """Two buckets per octave: the bit length and the bit below the highest."""
    bits = age.bit_length()
    return min(2 * bits + (age >> (bits - 2) & 1), _BUCKETS - 1) if bits > 1 else 2 * bits


def _widths() -> F64:
    edges = [0.0, 0.5, 1.0, 1.5]  # ages 0 and 1 are buckets 0 and 2; 1 and 3 stay empty
    for bits in range(2, _BUCKETS // 2 + 1):
        edges += [2.0 ** (bits - 1), 1.5 * 2.0 ** (bits - 1)]
    return np.diff(np.array(edges[: _BUCKETS + 1]))


_WIDTH = _widths()


def _best_rates(waits: F64, pages: float) -> list[float]:
    """Per age bucket: the largest (next uses) / (slot ticks) over all ways to stop keeping later.

    ``waits``: next uses per age bucket, shape (buckets,). ``pages``: how many pages could have had one.
    """
    before = np.concatenate(([0.0], np.cumsum(waits)))
    waiting = np.maximum(pages - before[:-1] - 0.5 * waits, 0.5)
    spent = np.concatenate(([0.0], np.cumsum(waiting * _WIDTH)))
    hits = before[None, 1:] - before[:-1, None]
    cost = spent[None, 1:] - spent[:-1, None]
    later = np.triu(np.ones(hits.shape, bool))
    rates = np.where(later, hits / np.where(later, cost, 1.0), 0.0)
    best: list[float] = rates.max(1).tolist()
    return best
