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
  A new page is worth something too: one that is worth less than every leaf is declined, and leaves its
  ghost. Nothing is fitted to a trace; what was learned fades with a half-life of about 14 tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Protocol

import numpy as np

from flexkv_sglang.cache.eviction.leaf_queue import LeafQueue
from flexkv_sglang.cache.eviction.reuse_model import (
    BUCKETS,
    CLASSES,
    ReuseTimes,
    bucket_of,
    buckets_of,
)
from flexkv_sglang.types import F64, I64, PageKey

_GHOSTS_PER_SLOT = 4
_WHEN_BITS = (
    18  # of a ghost: when the page was last used, in units of slot_count / 1024 ticks or so
)
_WHEN_MASK = (1 << _WHEN_BITS) - 1
_CENSUS = 8  # one overwritten ghost in so many is counted, as so many
_CHAIN_PAGES = 32  # victims: values change with the half-octaves of age, far more slowly than this
_SAMPLE = 1 << 11  # slots, and as many ghosts: enough for a histogram, and little memory
_ANY_PRICE = float("inf")

_place_and_tag = Struct("<IH").unpack_from  # of a key


class KeyOf(Protocol):
    """Key of the page in a slot."""

    def __getitem__(self, slot: int, /) -> PageKey | None: ...


class EvictionPolicy(Protocol):
    """What ``TierIndex`` asks. A slot is known from its first ``used`` to ``forget``."""

    last_use: array[int]  # per slot: tick of the last use, 0 if unknown

    def used(self, slots: Sequence[int], key_of: KeyOf, children: Sequence[int]) -> None:
        """READY pages were written or read, in this order: one call per chain, not per page.

        A chain comes tail first. ``key_of``, ``children``: the index's columns, by slot. Who has no
        cached child may be a victim.
        """

    def renew(self, slot: int, child_count: int) -> None:
        """The page got a child: its old offer is stale. No use of its own, but as recent as one."""

    def offer(self, slot: int) -> None:
        """The last cached child of this page is gone: it may be a victim."""

    def forget(self, slot: int, key: PageKey) -> None:
        """The page has left its slot."""

    def bids(self, keys: Sequence[PageKey]) -> Sequence[float] | None:
        """What each page of a new chain is worth, to be given to ``victim``. None: more than any leaf."""

    def declined(self, keys: Sequence[PageKey]) -> None:
        """These pages of a chain, in its order, got no slot as no leaf was worth less than their bid."""

    def victim(self, may_go: Callable[[int], bool], bid: float = _ANY_PRICE) -> int | None:
        """The leaf to evict; None if there is none, or none that is worth less than ``bid``.

        Leaves that ``may_go`` refuses (pinned) are kept for later. One that was found is found again
        until its last use changes.
        """

    def retain(self, keep: Callable[[int], bool]) -> None:
        """Offer those that ``keep`` refuses no longer, until they are offered again."""

    def load(self, slots: I64, leaves: I64) -> None:
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
        self._victim = -1  # the leaf found last, if it is the oldest of all of its class
        self._after = 0  # the tick after its last use, from ``forget`` to the next ``offer``
        self._chain_left = 0  # pages that may go before the classes are compared again
        self._price = 0.0  # what the last victim was worth

    def used(
        self,
        slots: Sequence[int],
        key_of: KeyOf,  # noqa: ARG002
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

    def renew(self, slot: int, child_count: int) -> None:
        """See ``EvictionPolicy``."""
        if self.last_use[slot]:
            self._now += 1
            self.last_use[slot] = self._now
            if not child_count:
                self._queue_of(slot).append(slot, self._now)

    def offer(self, slot: int) -> None:
        """See ``EvictionPolicy``."""
        self._put_back()
        tick, after, self._after = self.last_use[slot], self._after, 0
        if tick == after:
            self._next, self._next_tick = slot, tick
        else:
            self._queue_of(slot).offer(slot)

    def _put_back(self) -> None:
        slot, self._next = self._next, -1
        if slot >= 0 and self.last_use[slot] == self._next_tick:
            self._queue_of(slot).offer(slot)

    def _queue_of(self, slot: int) -> LeafQueue:  # noqa: ARG002
        return self._queues[0]

    def forget(self, slot: int, key: PageKey) -> None:  # noqa: ARG002
        """See ``EvictionPolicy``."""
        self._leave(slot)

    def _leave(self, slot: int) -> None:
        self._after = self.last_use[slot] + 1 if slot == self._victim else 0
        self._victim = -1
        self.last_use[slot] = 0

    def bids(self, keys: Sequence[PageKey]) -> Sequence[float] | None:  # noqa: ARG002
        """See ``EvictionPolicy``."""
        return None

    def declined(self, keys: Sequence[PageKey]) -> None:
        """See ``EvictionPolicy``. Never comes, as there is no bid."""

    def victim(self, may_go: Callable[[int], bool], bid: float = _ANY_PRICE) -> int | None:
        """See ``EvictionPolicy``."""
        slot, tick = self._next, self._next_tick
        if (
            slot >= 0
            and self._chain_left
            and bid > self._price
            and self.last_use[slot] == tick
            and may_go(slot)
        ):
            self._chain_left -= 1
            self._victim = slot
            return slot
        self._put_back()
        self._victim, self._after = -1, 0
        found = self._choose(may_go, bid)
        if found is not None and not self._queue_of(found).passed_over:
            self._victim = found
        return found

    def _choose(self, may_go: Callable[[int], bool], bid: float) -> int | None:  # noqa: ARG002
        self._chain_left = _CHAIN_PAGES
        return self._queues[0].oldest(may_go)

    def retain(self, keep: Callable[[int], bool]) -> None:
        """See ``EvictionPolicy``."""
        self._put_back()
        for queue in self._queues:
            queue.retain(keep)

    def load(self, slots: I64, leaves: I64) -> None:
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

    _classes = CLASSES

    def __init__(self, slot_count: int) -> None:
        super().__init__(slot_count)
        self._class = bytearray(slot_count)
        self._ghosts = array("I", [0]) * (_GHOSTS_PER_SLOT * slot_count + 1)
        self._unit_bits = max(0, slot_count.bit_length() - 10)
        self._waits = ReuseTimes()
        self._period = max(slot_count // 2, 2000)
        self._due = max(slot_count, 1000)
        self._chosen = 0  # the class that gives the victims ...
        self._limit = 0.0  # ... up to this value: that of the next best class

    def used(self, slots: Sequence[int], key_of: KeyOf, children: Sequence[int]) -> None:
        """See ``EvictionPolicy``."""
        last_use, group_of, queues = self.last_use, self._class, self._queues
        ended, ghosts = self._waits.ended, self._ghosts
        now, age, bucket, ghost_count = self._now, -1, 0, len(ghosts)
        at_least = 0  # a page was used at least as often as those after it in the chain
        for slot in slots:
            last = last_use[slot]
            group = group_of[slot]
            if not last:
                place, tag = _place_and_tag(key_of[slot] or b"")
                place %= ghost_count
                ghost = ghosts[place]
                last = -1
                if ghost and ghost >> 20 == tag >> 4:
                    last, group = self._recall(ghost, now)
                    ghosts[place] = 0  # its wait is over
            if last < 0:
                group = 0
            else:
                if (
                    now - last != age
                ):  # else of one chain, and used one after the other last time too
                    age = now - last
                    bucket = bucket_of(age)
                ended[group << 6 | bucket] += 1
                group += group + 1 < CLASSES
            if group < at_least:
                group = at_least
            at_least = group
            now += 1
            last_use[slot] = now
            group_of[slot] = group
            if not children[slot]:
                queues[group].append(slot, now)
        self._now = now
        if now >= self._due:
            self._learn()

    def bids(self, keys: Sequence[PageKey]) -> Sequence[float] | None:
        """See ``EvictionPolicy``."""
        if not self._waits.learned:
            return None
        ghosts, ghost_count = self._ghosts, len(self._ghosts)
        # Nobody can use a page again before the pages that come with it.
        bucket = bucket_of(len(keys))
        values = [row[bucket] for row in self._waits.value]
        bids, at_least = [0.0] * len(keys), 0
        for position in range(len(keys) - 1, -1, -1):
            place, tag = _place_and_tag(keys[position])
            ghost = ghosts[place % ghost_count]
            if ghost and ghost >> 20 == tag >> 4:
                at_least = max(at_least, min((ghost >> _WHEN_BITS & 3) + 1, CLASSES - 1))
            bids[position] = values[at_least]
        return bids

    def declined(self, keys: Sequence[PageKey]) -> None:
        """See ``EvictionPolicy``. As if used and evicted at once."""
        ghosts, ghost_count, unit_bits = self._ghosts, len(self._ghosts), self._unit_bits
        waits, now, at_least = self._waits, self._now, 0
        for key in reversed(keys):
            place, tag = _place_and_tag(key)
            place %= ghost_count
            tag >>= 4
            ghost = ghosts[place]
            if ghost and ghost >> 20 == tag:
                last, group = self._recall(ghost, now)
                waits.ended[group << 6 | bucket_of(now - last)] += 1
                at_least = max(at_least, min(group + 1, CLASSES - 1))
            elif ghost and not place % _CENSUS:
                self._censor(ghost)
            now += 1
            ghosts[place] = tag << 20 | at_least << _WHEN_BITS | now >> unit_bits & _WHEN_MASK
        self._now = now
        if now >= self._due:
            self._learn()

    def offer(self, slot: int) -> None:
        """See ``EvictionPolicy``."""
        if self._class[slot] != self._chosen:
            self._chain_left = self._after = 0
        super().offer(slot)

    def _queue_of(self, slot: int) -> LeafQueue:
        return self._queues[self._class[slot]]

    def forget(self, slot: int, key: PageKey) -> None:
        """See ``EvictionPolicy``."""
        place, tag = _place_and_tag(key)
        ghosts = self._ghosts
        place %= len(ghosts)
        if not place % _CENSUS and ghosts[place]:
            self._censor(ghosts[place])
        ghosts[place] = (
            tag >> 4 << 20
            | self._class[slot] << _WHEN_BITS
            | self.last_use[slot] >> self._unit_bits & _WHEN_MASK
        )
        self._leave(slot)

    def _censor(self, ghost: int) -> None:
        """The ghost is overwritten: how long its page waits in all, nobody will see."""
        last, group = self._recall(ghost, self._now)
        self._waits.censored[group << 6 | bucket_of(self._now - last)] += _CENSUS

    def _recall(self, ghost: int, now: int) -> tuple[int, int]:
        """(last use, class) of an evicted page."""
        units = (now >> self._unit_bits) - ghost & _WHEN_MASK
        last = now - (units << self._unit_bits)
        return max(0, last), ghost >> _WHEN_BITS & 3

    def _choose(self, may_go: Callable[[int], bool], bid: float) -> int | None:
        if self._chain_left:
            self._chain_left -= 1
            found = self._queues[self._chosen].oldest(may_go)
            if found is not None and (worth := self._worth(found)) <= self._limit and worth < bid:
                self._price = worth
                return found
        heads = [
            (self._worth(slot), slot)
            for queue in self._queues
            if (slot := queue.oldest(may_go)) is not None
        ]
        heads.sort()
        if not heads or 0.0 < heads[0][0] >= bid:  # worth nothing: it goes in any case
            return None
        self._price = heads[0][0]
        self._chosen = self._class[heads[0][1]]
        self._limit = heads[1][0] if len(heads) > 1 else _ANY_PRICE
        self._chain_left = _CHAIN_PAGES
        return heads[0][1]

    def _worth(self, slot: int) -> float:
        return self._waits.value[self._class[slot]][bucket_of(self._now - self.last_use[slot])]

    def _learn(self) -> None:
        self._waits.learn(self._waiting())
        for queue in self._queues:  # a class that gets no pages any more would keep stale entries
            queue.tidy()
        self._due = self._now + self._period
        self._chain_left = 0

    def _waiting(self) -> F64:
        """Pages that wait now, here or as ghosts, by class and age; estimated from a sample."""
        counts = np.zeros(CLASSES * BUCKETS)
        step = -(-len(self.last_use) // _SAMPLE)
        ticks = np.frombuffer(self.last_use, np.uint64)[::step].astype(np.int64)
        groups = np.frombuffer(self._class, np.uint8)[::step][ticks > 0].astype(np.int64)
        places = groups << 6 | buckets_of(self._now - ticks[ticks > 0])
        counts += step * np.bincount(places, minlength=len(counts))
        step = -(-len(self._ghosts) // _SAMPLE)
        ghosts = np.frombuffer(self._ghosts, np.uint32)[::step].astype(np.int64)
        ghosts = ghosts[ghosts > 0]
        ages = ((self._now >> self._unit_bits) - ghosts & _WHEN_MASK) << self._unit_bits
        places = (ghosts >> _WHEN_BITS & 3) << 6 | buckets_of(ages)
        counts += step * np.bincount(places, minlength=len(counts))
        return counts.reshape(CLASSES, BUCKETS)
