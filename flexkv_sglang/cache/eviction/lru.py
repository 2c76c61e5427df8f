"""Lru: the least recently used leaf goes first. The reference for other policies. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from flexkv_sglang.cache.eviction.leaf_queue import LeafQueue
from flexkv_sglang.cache.eviction.policy import ANY_VALUE, KeyOf
from flexkv_sglang.types import I64, PageKey

CHAIN_PAGES = 32  # victims: values change with the half-octaves of age, far more slowly than this


class Lru:
    """Least recently used leaf first."""

    _classes = 1

    def __init__(self, slot_count: int) -> None:
        self.last_use = array("Q", [0]) * slot_count
        self._now = 0
        self._queues = [LeafQueue(self.last_use) for _ in range(self._classes)]
        # Parent of the last victim, if it was used right after it: then it is the oldest leaf of their class,
        # and no queue is asked. Most victims are found so, as chains go from the tail.
        self._next = -1
        self._next_tick = 0  # its last use; if that has changed, the shortcut is stale
        self._victim = -1  # the leaf found last, if it is the oldest of its class
        self._after = 0  # the tick after its last use, from ``forget`` to the next ``offer``
        self._chain_left = 0  # pages that may go before the classes are compared again
        self._victim_value = 0.0  # of the last victim

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
        self._remove(slot)

    def _remove(self, slot: int) -> None:
        self._after = self.last_use[slot] + 1 if slot == self._victim else 0
        self._victim = -1
        self.last_use[slot] = 0

    def admission_values(self, keys: Sequence[PageKey]) -> Sequence[float] | None:  # noqa: ARG002
        """See ``EvictionPolicy``."""
        return None

    def declined(self, keys: Sequence[PageKey]) -> None:
        """See ``EvictionPolicy``. Never called: every page is admitted."""

    def victim(
        self, may_go: Callable[[int], bool], admission_value: float = ANY_VALUE
    ) -> int | None:
        """See ``EvictionPolicy``."""
        slot, tick = self._next, self._next_tick
        if (
            slot >= 0
            and self._chain_left
            and admission_value > self._victim_value
            and self.last_use[slot] == tick
            and may_go(slot)
        ):
            self._chain_left -= 1
            self._victim = slot
            return slot
        self._put_back()
        self._victim, self._after = -1, 0
        found = self._choose(may_go, admission_value)
        if found is not None and not self._queue_of(found).passed_over:
            self._victim = found
        return found

    def _choose(self, may_go: Callable[[int], bool], admission_value: float) -> int | None:  # noqa: ARG002
        self._chain_left = CHAIN_PAGES
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
