"""TierIndex: which page is in which slot, and which one goes next. Pure: no I/O, no lock, no clock.

States of a slot::

    free --reserve--> WRITING --commit--> READY --(victim of reserve | discard | clear)--> free
                         |                  |
                         +---- abort ---> free
                         +---- clear ---> DOOMED  (still written to, found by nobody)
                                            READY and pinned --discard/clear--> DOOMED
    DOOMED --abort, or the last unpin--> free

The one invariant: **a key found here names a slot whose bytes are complete, or is WRITING and then
found by nobody but ``reserve``**. Victims are leaves only: READY, unpinned, and with no cached child,
because a page whose parent is gone can never be hit again (page keys chain over the whole prefix).

Not thread-safe: ``CacheEngine`` holds its lock around every call. Columns are arrays and a slot's number
is its row: one million Python objects made a full garbage collection pause 0.3 s.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flexkv_sglang.eviction import EvictionPolicy, Recency
from flexkv_sglang.frozen import FrozenPages
from flexkv_sglang.types import DOOMED, FREE, I64, NO_SLOT, READY, WRITING, PageKey, SlotId

_MAX_SLOTS = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Reserved:
    """Answer of ``reserve``. ``granted``: (position in the batch, slot). ``victims``: (key, slot) to tombstone.

    ``refused``: positions for which no slot could be freed. Other positions were present already.
    """

    granted: list[tuple[int, SlotId]]
    victims: list[tuple[PageKey, SlotId]]
    refused: list[int]


class TierIndex:
    """Index over ``slot_count`` slots; ``policy`` (made for as many, default LRU) picks among the leaves."""

    def __init__(self, slot_count: int, policy: EvictionPolicy | None = None) -> None:
        assert 0 <= slot_count <= _MAX_SLOTS, slot_count
        self.slot_count = slot_count
        self._slot_of: dict[PageKey, int] = {}
        self._key_of: list[PageKey | None] = [None] * slot_count
        self._state = bytearray(slot_count)
        self._pins = array("I", bytes(4 * slot_count))
        self._parent = array("q", b"\xff" * (8 * slot_count))
        self._parent_generation = array("I", bytes(4 * slot_count))
        self._generation = array("I", bytes(4 * slot_count))
        self._children = array("I", bytes(4 * slot_count))
        self._policy = policy if policy is not None else Recency(slot_count)
        self._returned: list[int] = []  # freed slots, taken before never-used ones
        self._unused = (
            0  # slots from here on were never used; taken in order, so runs are contiguous
        )
        self._ready_count = 0

    def __len__(self) -> int:
        """READY pages."""
        return self._ready_count

    def find(self, key: PageKey) -> SlotId | None:
        """Slot of a READY page, or None. Does not touch recency."""
        slot = self._slot_of.get(key)
        return SlotId(slot) if slot is not None and self._state[slot] == READY else None

    def holds(self, key: PageKey) -> bool:
        """True if the page is READY or being written: writing it again would be waste."""
        return key in self._slot_of

    def prefix(self, keys: Sequence[PageKey]) -> int:
        """Length of the leading run of READY keys. Does not touch recency: asking is not using."""
        slot_of, state = self._slot_of, self._state
        for count, key in enumerate(keys):
            slot = slot_of.get(key)
            if slot is None or state[slot] != READY:
                return count
        return len(keys)

    def pin(self, keys: Sequence[PageKey]) -> list[SlotId]:
        """Pin the READY pages among ``keys`` up to the first absent one; touch them, refresh links.

        Returns the slots of that leading run. Each must be given to ``unpin`` exactly once.
        """
        slots = [SlotId(self._slot_of[key]) for key in keys[: self.prefix(keys)]]
        for slot in slots:
            self._pins[slot] += 1
        self._link_run(slots)
        self._touch_chain(slots)
        return slots

    def unpin(self, slots: Iterable[SlotId]) -> None:
        """Release pins. A doomed slot becomes free with its last pin."""
        for slot in slots:
            assert self._pins[slot] > 0, f"slot {slot} is not pinned"
            self._pins[slot] -= 1
            if self._pins[slot] == 0 and self._state[slot] == DOOMED:
                self._free(slot)

    def discard(self, key: PageKey, slot: SlotId) -> bool:
        """Forget a READY page whose bytes turned out wrong. False if ``key`` is no longer in ``slot``.

        Its children stay as roots. A pinned slot is reused only after its last unpin.
        """
        if self._slot_of.get(key) != slot or self._state[slot] != READY:
            return False
        self._forget(slot)
        if self._pins[slot]:
            self._state[slot] = DOOMED
        else:
            self._free(slot)
        return True

    def reserve(
        self, keys: Sequence[PageKey], parent: PageKey | None, skip: frozenset[int] = frozenset()
    ) -> Reserved:
        """Slots for the absent ones of a chain; they become WRITING.

        ``parent``: the page before ``keys[0]``, if known. ``skip``: positions not wanted (a neighbour
        has them). Present keys are touched and never victims of this call. Never waits, never raises:
        when nothing can be evicted the rest of the batch is refused, a leading part is granted.
        """
        held = [
            SlotId(slot)
            for key in (keys if parent is None else (parent, *keys))
            if (slot := self._slot_of.get(key)) is not None
        ]
        for slot in held:  # a batch never evicts its own pages
            self._pins[slot] += 1
        granted: list[tuple[int, SlotId]] = []
        victims: list[tuple[PageKey, SlotId]] = []
        refused: list[int] = []
        previous = self._slot_of.get(parent, NO_SLOT) if parent is not None else NO_SLOT
        for position, key in enumerate(keys):
            current = self._slot_of.get(key, NO_SLOT)
            if current == NO_SLOT and position not in skip:
                taken = None if refused else self._take(victims)
                if taken is None:
                    refused.append(position)
                else:
                    current = self._begin_write(key, taken)
                    granted.append((position, taken))
            if current != NO_SLOT and previous != NO_SLOT:
                self._link(current, previous)
            previous = current
        for slot in held:
            self._pins[slot] -= 1
        self._touch_chain(held)
        return Reserved(granted, victims, refused)

    def still_writing(self, slots: Iterable[SlotId]) -> list[bool]:
        """Per slot: False if ``clear`` doomed it since ``reserve``. Such a slot must be aborted."""
        return [self._state[slot] == WRITING for slot in slots]

    def commit(self, slots: Iterable[SlotId]) -> None:
        """WRITING -> READY. The commit records of these slots are on the journal already."""
        ready = list(slots)
        for slot in ready:
            assert self._state[slot] == WRITING, f"slot {slot} is in state {self._state[slot]}"
            self._state[slot] = READY
            self._ready_count += 1
        self._policy.used(ready, self._key_of, self._children)

    def abort(self, slots: Iterable[SlotId]) -> None:
        """WRITING -> free: nothing was published for these slots."""
        for slot in slots:
            assert self._state[slot] in (WRITING, DOOMED), (
                f"slot {slot} is in state {self._state[slot]}"
            )
            if self._state[slot] == WRITING:
                self._forget(slot)
            self._free(slot)

    def clear(self) -> None:
        """Forget every page. The journal says so already.

        Pinned slots and slots being written are doomed: they come back by ``unpin`` / ``abort``.
        """
        for slot in self._slot_of.values():
            self._key_of[slot] = None
            self._parent[slot] = NO_SLOT
            self._children[slot] = 0
            self._generation[slot] = (self._generation[slot] + 1) & 0xFFFFFFFF
            if self._state[slot] == WRITING or self._pins[slot]:
                self._state[slot] = DOOMED
            else:
                self._free(slot)
        self._slot_of.clear()
        self._policy.clear()
        self._ready_count = 0

    def load(
        self, keys: Sequence[PageKey], slots: Sequence[int], parents: Sequence[int]
    ) -> list[int]:
        """Fill an empty index from a recovered journal, oldest first. ``parents``: slots, or -1.

        Returns the positions that were dropped because an earlier one has the same key.
        """
        assert not self._slot_of, "load() is for an empty index"
        dropped = [
            position
            for position, (key, slot) in enumerate(zip(keys, slots, strict=True))
            if self._slot_of.setdefault(key, slot) != slot
        ]
        for key, slot in self._slot_of.items():
            self._key_of[slot] = key
        kept = np.delete(np.asarray(slots, np.int64), dropped)
        assert len(np.unique(kept)) == len(kept), "two pages in one slot"
        np.frombuffer(self._state, np.uint8)[kept] = READY
        self._load_links(kept, np.delete(np.asarray(parents, np.int64), dropped))
        self._ready_count = len(kept)
        free = np.flatnonzero(np.frombuffer(self._state, np.uint8) == FREE)
        self._returned = free[::-1].tolist()
        self._unused = self.slot_count
        self._policy.load(kept, kept[np.frombuffer(self._children, np.uint32)[kept] == 0].tolist())
        return dropped

    def _load_links(self, slots: I64, parents: I64) -> None:
        state = np.frombuffer(self._state, np.uint8)
        linked = (parents >= 0) & (parents < self.slot_count) & (parents != slots)
        linked[linked] = state[parents[linked]] == READY
        np.frombuffer(self._parent, np.int64)[slots[linked]] = parents[linked]
        counts = np.bincount(parents[linked], minlength=self.slot_count)
        np.frombuffer(self._children, np.uint32)[:] = counts[: self.slot_count]

    def freeze(self) -> FrozenPages:
        """A copy of what a snapshot needs. Copies only: a million pages are not sorted under a lock."""
        return FrozenPages(
            list(self._slot_of),
            np.fromiter(self._slot_of.values(), np.int64, len(self._slot_of)),
            np.array(self._state, np.uint8),
            np.array(self._policy.last_use, np.uint64),
            np.array(self._parent, np.int64),
            np.array(self._parent_generation, np.uint32),
            np.array(self._generation, np.uint32),
        )

    def check(self) -> None:
        """Assert every invariant. O(slots): for tests and ``flexkv check``."""
        children = [0] * self.slot_count
        for key, slot in self._slot_of.items():
            assert self._key_of[slot] == key, f"slot {slot} and its key disagree"
            assert self._state[slot] in (WRITING, READY), (
                f"found key in slot {slot}, state {self._state[slot]}"
            )
            parent = self.parent_slot(slot)
            if parent != NO_SLOT:
                assert self._state[parent] in (WRITING, READY), (
                    f"slot {slot} has a dead parent {parent}"
                )
                children[parent] += 1
        assert self._ready_count == sum(state == READY for state in self._state)
        free = [*self._returned, *range(self._unused, self.slot_count)]
        assert len(free) == len(set(free)), "a slot is free twice"
        assert set(free) == {s for s in range(self.slot_count) if self._state[s] == FREE}, (
            "free slots leak"
        )
        offers = self._policy.offers()
        for slot in range(self.slot_count):
            assert children[slot] == self._children[slot], (
                f"slot {slot} counts {self._children[slot]} children"
            )
            if self._state[slot] == FREE:
                assert self._pins[slot] == 0, f"slot {slot} is free but pinned"
                assert self._key_of[slot] is None, f"slot {slot} is free but has a key"
            if self._state[slot] == READY and self._children[slot] == 0:
                assert slot in offers, f"leaf {slot} cannot be found for eviction"

    def parent_slot(self, slot: int) -> int:
        """Slot of the cached parent page, or -1."""
        parent = self._parent[slot]
        if parent == NO_SLOT or self._generation[parent] != self._parent_generation[slot]:
            return NO_SLOT
        return parent

    def _link(self, slot: int, parent: int) -> None:
        current = self.parent_slot(slot)
        if current != NO_SLOT or parent == slot:
            # A key chains over its whole prefix, so its parent cannot change. Two claims mean the
            # caller's chain is not one (opaque v0 keys): keep the first, links are only an order.
            return
        self._parent[slot] = parent
        self._parent_generation[slot] = self._generation[parent]
        self._children[parent] += 1

    def _link_run(self, slots: Sequence[int]) -> None:
        for position in range(1, len(slots)):
            self._link(slots[position], slots[position - 1])

    def _touch_chain(self, slots: Sequence[int]) -> None:
        """Touch from tail to head, so that within one request the tail is older and goes first."""
        ready = [slot for slot in reversed(slots) if self._state[slot] == READY]
        self._policy.used(ready, self._key_of, self._children)

    def _take(self, victims: list[tuple[PageKey, SlotId]]) -> SlotId | None:
        if self._returned:
            return SlotId(self._returned.pop())
        if self._unused < self.slot_count:
            self._unused += 1
            return SlotId(self._unused - 1)
        victim = self._policy.victim(lambda slot: self._pins[slot] == 0)
        if victim is None:
            return None
        key = self._key_of[victim]
        assert key is not None
        self._forget(victim)
        self._state[victim] = FREE
        victims.append((key, SlotId(victim)))
        return SlotId(victim)

    def _begin_write(self, key: PageKey, slot: SlotId) -> SlotId:
        self._slot_of[key] = slot
        self._key_of[slot] = key
        self._state[slot] = WRITING
        return slot

    def _forget(self, slot: int) -> None:
        """Take a page out of the map and out of the tree; its slot is not free yet."""
        key = self._key_of[slot]
        assert key is not None
        del self._slot_of[key]
        self._key_of[slot] = None
        if self._state[slot] == READY:
            self._ready_count -= 1
            self._policy.forget(slot, key)
        parent = self.parent_slot(slot)
        self._parent[slot] = NO_SLOT
        if parent != NO_SLOT:
            self._children[parent] -= 1
            if self._children[parent] == 0 and self._state[parent] == READY:
                self._policy.offer(parent)
        # Children that are left (after a discard) become roots: their link names an old generation.
        self._generation[slot] = (self._generation[slot] + 1) & 0xFFFFFFFF
        self._children[slot] = 0

    def _free(self, slot: int) -> None:
        self._state[slot] = FREE
        self._returned.append(slot)
