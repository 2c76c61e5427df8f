"""Which leaf goes next: one policy object behind one interface. Pure: no I/O, no lock, no wall clock.

The index guarantees, outside of any policy, that only leaves are offered (``offer``, ``used``) and that
a page which gets a child is used again, so that its old offer is stale. Time is counted in uses.
Not thread-safe: the index calls under the engine's lock.

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

from array import array
from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from typing import Protocol

import numpy as np

from flexkv_sglang.leaf_queue import LeafQueue
from flexkv_sglang.types import F64, I64, PageKey

_CLASSES = 4
_BUCKETS = 64  # two per octave of age
_GHOSTS_PER_SLOT = 4
_WHEN_BITS = (
    18  # of a ghost: when the page was last used, in units of slot_count / 1024 ticks or so
)
_WHEN_MASK = (1 << _WHEN_BITS) - 1
_FADE = 0.95  # of what was learned, each time the tables are made anew
_PRIOR_PAGES = 50.0  # a class counts as this many average pages until it has its own
_CHAIN_PAGES = 32  # victims: values change with the half-octaves of age, far more slowly than this

_first_u64 = Struct("<Q").unpack_from


class EvictionPolicy(Protocol):
    """What ``TierIndex`` asks. A slot is known from its first ``used`` to ``forget``."""

    last_use: array[int]  # per slot: tick of the last use, 0 if unknown

    def used(
        self, slots: Sequence[int], key_of: Sequence[PageKey | None], children: Sequence[int]
    ) -> None:
        """READY pages were written or read, in this order: one call per chain, not per page.

        ``key_of``, ``children``: the index's columns, by slot. Who has no cached child may be a victim.
        """

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
        self.last_use = array("Q", [0]) * slot_count
        self._now = 0
        self._queues = [LeafQueue(self.last_use) for _ in range(self._classes)]
        # The parent of the last victim, if it was used right after it: the oldest leaf of their class,
        # known without a queue. Most victims are found so, as chains go from the tail.
        self._next = -1
        self._next_tick = 0  # its last use; if that has changed, it is not to be taken
        self._victim_tick = 0
        self._chain_left = 0  # pages that may go before the classes are compared again

    def used(
        self,
        slots: Sequence[int],
        key_of: Sequence[PageKey | None],  # noqa: ARG002
        children: Sequence[int],
    ) -> None:
        """See ``EvictionPolicy``."""
        last_use, now = self.last_use, self._now
        for slot in slots:
            now += 1
            last_use[slot] = now
            if not children[slot]:
                self._queues[0].append(slot, now)
        self._now = now

    def offer(self, slot: int) -> None:
        """See ``EvictionPolicy``."""
        self._put_back()
        tick = self.last_use[slot]
        if tick == self._victim_tick + 1:
            self._next, self._next_tick = slot, tick
        else:
            self._queues[0].offer(slot)

    def _put_back(self) -> None:
        slot, self._next = self._next, -1
        if slot >= 0 and self.last_use[slot] == self._next_tick:
            self._queue_of(slot).offer(slot)

    def _queue_of(self, slot: int) -> LeafQueue:  # noqa: ARG002
        return self._queues[0]

    def forget(self, slot: int, key: PageKey) -> None:  # noqa: ARG002
        """See ``EvictionPolicy``."""
        self.last_use[slot] = 0

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        """See ``EvictionPolicy``."""
        slot, tick = self._next, self._next_tick
        if slot >= 0 and self._chain_left and self.last_use[slot] == tick and may_go(slot):
            self._chain_left -= 1
            self._victim_tick = tick
            return slot
        self._put_back()
        found = self._choose(may_go)
        if found is not None:
            oldest = not self._queue_of(found).passed_over
            self._victim_tick = self.last_use[found] if oldest else -1
        return found

    def _choose(self, may_go: Callable[[int], bool]) -> int | None:
        self._chain_left = _CHAIN_PAGES
        return self._queues[0].oldest(may_go)

    def retain(self, keep: Callable[[int], bool]) -> None:
        """See ``EvictionPolicy``."""
        self._put_back()
        for queue in self._queues:
            queue.retain(keep)

    def load(self, slots: I64, leaves: Iterable[int]) -> None:
        """See ``EvictionPolicy``."""
        self._now = len(slots)
        np.frombuffer(self.last_use, np.uint64)[slots] = np.arange(
            1, len(slots) + 1, dtype=np.uint64
        )
        self._queues[0].load(leaves)

    def clear(self) -> None:
        """See ``EvictionPolicy``."""
        np.frombuffer(self.last_use, np.uint64)[:] = 0
        self._next = -1
        for queue in self._queues:
            queue.clear()

    def offers(self) -> set[int]:
        """See ``EvictionPolicy``."""
        alive = self._next >= 0 and self.last_use[self._next] == self._next_tick
        waiting = {self._next} if alive else set()
        return waiting.union(*(queue.slots() for queue in self._queues))


class ReuseDensity(Recency):
    """The leaf with the least hits to expect per slot and tick. See the module docstring.

    A ghost is one u32: 12 bits of the key, 2 of the class, 18 of the last use. 16 B per slot.
    """

    _classes = _CLASSES

    def __init__(self, slot_count: int) -> None:
        super().__init__(slot_count)
        self._class = bytearray(slot_count)
        self._ghosts = array("I", [0]) * (_GHOSTS_PER_SLOT * slot_count + 1)
        self._unit_bits = max(0, slot_count.bit_length() - 10)
        self._waits = np.zeros((_CLASSES, _BUCKETS))  # next uses, by class and age
        self._pages = np.zeros(_CLASSES)  # uses after which a next one could come
        self._counted = [0] * (_CLASSES * _BUCKETS)  # next uses since the last table
        self._fresh = 0  # new pages since then
        self._period = max(slot_count // 2, 1000)
        self._due = max(slot_count, 1000)
        self._chosen = 0  # the class that gives the victims ...
        self._limit = 0.0  # ... up to this value: that of the next best class
        # Before anything is learned: the older, the less.
        self._value = [[1.0 / (bucket + 1) for bucket in range(_BUCKETS)] for _ in range(_CLASSES)]

    def used(
        self, slots: Sequence[int], key_of: Sequence[PageKey | None], children: Sequence[int]
    ) -> None:
        """See ``EvictionPolicy``."""
        last_use, group_of, counted, queues = (
            self.last_use,
            self._class,
            self._counted,
            self._queues,
        )
        ghosts, ghost_count = self._ghosts, len(self._ghosts)
        now, age, bucket = self._now, -1, 0
        for slot in slots:
            last = last_use[slot]
            group = group_of[slot]
            if not last:
                (digest,) = _first_u64(key_of[slot] or b"")
                ghost = ghosts[digest % ghost_count]
                last = -1
                if ghost >> 20 == digest >> 52:
                    last, group = self._recall(ghost, now)
            if last < 0:
                self._fresh += 1
                group = 0
            else:
                if (
                    now - last != age
                ):  # else of one chain, and used one after the other last time too
                    age = now - last
                    bucket = _bucket(age)
                counted[group << 6 | bucket] += 1
                group += group + 1 < _CLASSES
            now += 1
            last_use[slot] = now
            group_of[slot] = group
            if not children[slot]:
                queues[group].append(slot, now)
        self._now = now
        if now >= self._due:
            self._learn()

    def offer(self, slot: int) -> None:
        """See ``EvictionPolicy``."""
        self._put_back()
        tick, group = self.last_use[slot], self._class[slot]
        if group != self._chosen:
            self._queues[group].offer(slot)
            self._chain_left = 0
        elif tick == self._victim_tick + 1:
            self._next, self._next_tick = slot, tick
        else:
            self._queues[group].offer(slot)

    def _queue_of(self, slot: int) -> LeafQueue:
        return self._queues[self._class[slot]]

    def forget(self, slot: int, key: PageKey) -> None:
        """See ``EvictionPolicy``."""
        (digest,) = _first_u64(key)
        ghosts = self._ghosts
        ghosts[digest % len(ghosts)] = (
            digest >> 52 << 20
            | self._class[slot] << _WHEN_BITS
            | self.last_use[slot] >> self._unit_bits & _WHEN_MASK
        )
        self.last_use[slot] = 0

    def _recall(self, ghost: int, now: int) -> tuple[int, int]:
        """(last use, class) of an evicted page; (-1, 0) if there is no ghost."""
        if not ghost:
            return -1, 0
        units = (now >> self._unit_bits) - ghost & _WHEN_MASK
        return max(now - (units << self._unit_bits), 0), ghost >> _WHEN_BITS & 3

    def _choose(self, may_go: Callable[[int], bool]) -> int | None:
        if self._chain_left:
            self._chain_left -= 1
            found = self._queues[self._chosen].oldest(may_go)
            if found is not None and self._worth(found) <= self._limit:
                return found
        heads = [
            (self._worth(slot), slot)
            for queue in self._queues
            if (slot := queue.oldest(may_go)) is not None
        ]
        if not heads:
            return None
        heads.sort()
        self._chosen = self._class[heads[0][1]]
        self._limit = heads[1][0] if len(heads) > 1 else float("inf")
        self._chain_left = _CHAIN_PAGES
        return heads[0][1]

    def _worth(self, slot: int) -> float:
        return self._value[self._class[slot]][_bucket(self._now - self.last_use[slot])]

    def _learn(self) -> None:
        waits = np.array(self._counted, float).reshape(_CLASSES, _BUCKETS)
        self._waits = self._waits * _FADE + waits
        uses = waits.sum(1)
        begun = np.array([self._fresh, uses[0], uses[1], uses[2] + uses[3]], float)
        self._pages = self._pages * _FADE + begun
        self._counted, self._fresh = [0] * (_CLASSES * _BUCKETS), 0
        share = _PRIOR_PAGES / (self._pages.sum() + 1.0)
        all_waits, all_pages = self._waits.sum(0) * share, self._pages.sum() * share
        self._value = [
            _best_rates(self._waits[number] + all_waits, self._pages[number] + all_pages)
            for number in range(_CLASSES)
        ]
        for queue in self._queues:  # a class that gets no pages any more would keep stale entries
            queue.tidy()
        self._due = self._now + self._period
        self._chain_left = 0


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
    hits = before[1:] - before[:-1, None]
    cost = spent[1:] - spent[:-1, None]
    # An end before its beginning has neither hits nor cost above 0, so it is never the best.
    best: list[float] = (np.maximum(hits, 0.0) / np.maximum(cost, 1e-9)).max(1).tolist()
    return best
