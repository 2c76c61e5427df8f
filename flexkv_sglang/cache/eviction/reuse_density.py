"""ReuseDensity: the policy of production. It learns how soon pages are used again. Pure.

Pages are queued by how often they were used (once, twice, three times, more). For each such class the policy
learns the intervals between uses, and values a page of age *a* by the best rate of hits per slot and tick that keeping
it longer can reach: the index of Gittins ("Bandit Processes and Dynamic Allocation Indices", 1979), as EVA and LHD
value lines by hit density (Beckmann and Sanchez, HPCA 2017; Beckmann et al., NSDI 2018). Intervals longer than a page's
stay are seen through a table of evicted keys ("ghosts", as in ARC), else only cached pages could look good.
A new page has a value too: if every leaf has a higher one, the page is declined and leaves its ghost.
Nothing is fitted to a trace; learned counts fade with a half-life of about 14 tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from struct import Struct

import numpy as np

from flexkv_sglang.cache.eviction.leaf_queue import LeafQueue
from flexkv_sglang.cache.eviction.lru import CHAIN_PAGES, Lru
from flexkv_sglang.cache.eviction.policy import ANY_VALUE, KeyOf
from flexkv_sglang.cache.eviction.reuse_model import (
    BUCKETS,
    CLASSES,
    ReuseTimes,
    bucket_of,
    buckets_of,
)
from flexkv_sglang.types import F64, PageKey

_GHOSTS_PER_SLOT = 4
_WHEN_BITS = (
    18  # of a ghost: when the page was last used, in units of about slot_count / 1024 ticks
)
_WHEN_MASK = (1 << _WHEN_BITS) - 1
_CENSUS = 8  # one of 8 overwritten ghosts is counted, as 8
_SAMPLE = 1 << 11  # slots, and as many ghosts: enough for a histogram, and little memory

_place_and_tag = Struct("<IH").unpack_from  # of a key


class ReuseDensity(Lru):
    """Evicts the leaf with the fewest hits to expect per slot and tick. See the module docstring.

    A ghost is one u32: 12 bits of the key, 2 of the class, 18 of the last use. 16 B per slot.
    """

    _classes = CLASSES

    def __init__(self, slot_count: int) -> None:
        super().__init__(slot_count)
        self._class = bytearray(slot_count)
        self._ghosts = array("I", [0]) * (_GHOSTS_PER_SLOT * slot_count + 1)
        self._unit_bits = max(0, slot_count.bit_length() - 10)
        self._reuse = ReuseTimes()
        self._period = max(slot_count // 2, 2000)
        self._due = max(slot_count, 1000)
        self._chosen = 0  # class of the current victims ...
        self._limit = 0.0  # ... and the value of the next best class, where it stops

    def used(self, slots: Sequence[int], key_of: KeyOf, children: Sequence[int]) -> None:
        """See ``EvictionPolicy``."""
        last_use, group_of, queues = self.last_use, self._class, self._queues
        observed, ghosts = self._reuse.observed, self._ghosts
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
                    ghosts[place] = 0  # the reuse was observed
            if last < 0:
                group = 0
            else:
                if now - last != age:  # else the last uses followed each other too
                    age = now - last
                    bucket = bucket_of(age)
                observed[group << 6 | bucket] += 1
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

    def admission_values(self, keys: Sequence[PageKey]) -> Sequence[float] | None:
        """See ``EvictionPolicy``."""
        if not self._reuse.learned:
            return None
        ghosts, ghost_count = self._ghosts, len(self._ghosts)
        # The chain's other pages are used in between, so a page's age starts at ``len(keys)``.
        bucket = bucket_of(len(keys))
        values = [row[bucket] for row in self._reuse.value]
        admission_values, at_least = [0.0] * len(keys), 0
        for position in range(len(keys) - 1, -1, -1):
            place, tag = _place_and_tag(keys[position])
            ghost = ghosts[place % ghost_count]
            if ghost and ghost >> 20 == tag >> 4:
                at_least = max(at_least, min((ghost >> _WHEN_BITS & 3) + 1, CLASSES - 1))
            admission_values[position] = values[at_least]
        return admission_values

    def declined(self, keys: Sequence[PageKey]) -> None:
        """See ``EvictionPolicy``. Counts as used and evicted at once."""
        ghosts, ghost_count, unit_bits = self._ghosts, len(self._ghosts), self._unit_bits
        reuse, now, at_least = self._reuse, self._now, 0
        for key in reversed(keys):
            place, tag = _place_and_tag(key)
            place %= ghost_count
            tag >>= 4
            ghost = ghosts[place]
            if ghost and ghost >> 20 == tag:
                last, group = self._recall(ghost, now)
                reuse.observed[group << 6 | bucket_of(now - last)] += 1
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
        self._remove(slot)

    def _censor(self, ghost: int) -> None:
        """The ghost is lost before its page came back: record a censored interval."""
        last, group = self._recall(ghost, self._now)
        self._reuse.censored[group << 6 | bucket_of(self._now - last)] += _CENSUS

    def _recall(self, ghost: int, now: int) -> tuple[int, int]:
        """(last use, class) of an evicted page."""
        units = (now >> self._unit_bits) - ghost & _WHEN_MASK
        last = now - (units << self._unit_bits)
        return max(0, last), ghost >> _WHEN_BITS & 3

    def _choose(self, may_go: Callable[[int], bool], admission_value: float) -> int | None:
        if self._chain_left:
            self._chain_left -= 1
            found = self._queues[self._chosen].oldest(may_go)
            if (
                found is not None
                and (value := self._value_of(found)) <= self._limit
                and value < admission_value
            ):
                self._victim_value = value
                return found
        heads = [
            (self._value_of(slot), slot)
            for queue in self._queues
            if (slot := queue.oldest(may_go)) is not None
        ]
        heads.sort()
        if not heads or 0.0 < heads[0][0] >= admission_value:  # a leaf of value 0 goes in any case
            return None
        self._victim_value = heads[0][0]
        self._chosen = self._class[heads[0][1]]
        self._limit = heads[1][0] if len(heads) > 1 else ANY_VALUE
        self._chain_left = CHAIN_PAGES
        return heads[0][1]

    def _value_of(self, slot: int) -> float:
        return self._reuse.value[self._class[slot]][bucket_of(self._now - self.last_use[slot])]

    def _learn(self) -> None:
        self._reuse.learn(self._waiting())
        for queue in self._queues:  # a class without new pages would keep stale entries
            queue.tidy()
        self._due = self._now + self._period
        self._chain_left = 0

    def _waiting(self) -> F64:
        """Pages not used again yet, cached or as ghosts, by class and age; estimated from a sample."""
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
