"""TierIndex: the slot of each page, and the next victim. Pure: no I/O, no lock, no clock.

States of a slot::

    free --reserve--> WRITING --commit--> READY --(victim of reserve | discard | clear)--> free
                         |
                         +---- abort ---> free
                         +---- clear ---> DOOMED  (still written to, cannot be found)
    READY and pinned --(discard | clear)--> DOOMED
    DOOMED --abort, or the last unpin--> free
    READY --suspend--> SUSPENDED --resume--> READY   (its directory does not answer: cannot be found)
    free or READY --retire--> RETIRED                (given back to the disk for good)

The one invariant: **a key found here names a slot with complete bytes, or a WRITING one that only ``reserve``
sees**. Victims are leaves only: READY, unpinned, and with no cached child,
because a page whose parent is gone can never be hit again (page keys chain over the whole prefix).

Not thread-safe: ``LocalPages.lock`` is held around every call. Columns are arrays and a slot's number is
its row; no page has a Python object of its own (``key_table`` says what those cost).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np
import numpy.typing as npt

from flexkv_sglang.cache.eviction.policy import EvictionPolicy
from flexkv_sglang.cache.index.chains import ChainLinks
from flexkv_sglang.cache.index.free_slots import FreeSlots
from flexkv_sglang.cache.index.key_table import KeyTable
from flexkv_sglang.types import (
    DOOMED,
    FREE,
    I64,
    NO_SLOT,
    READY,
    RETIRED,
    SUSPENDED,
    U32,
    U64,
    WRITING,
    BoolArray,
    KeyArray,
    PageKey,
    Reserved,
    SlotId,
)

_MAX_SLOTS = (1 << 32) - 1

_KEYED = (WRITING, READY, SUSPENDED)  # states of slots whose key is in the map


@dataclass(frozen=True, slots=True)
class IndexSnapshot:
    """Columns of an index at one moment, by slot. Copied under ``LocalPages.lock``, sorted outside of it.

    The keys of slots that are neither READY nor SUSPENDED are void.
    """

    keys: KeyArray
    state: npt.NDArray[np.uint8]
    tick: U64
    parent: I64
    parent_generation: U32
    generation: U32

    def by_age(self, *, suspended: bool = False) -> tuple[KeyArray, I64, I64]:
        """(keys, slots, parent slots or -1) of the READY and, if asked for, SUSPENDED pages, the oldest use first."""
        ready = np.flatnonzero(self.held() if suspended else self.state == READY)
        slots = ready[np.argsort(self.tick[ready], kind="stable")]
        parents = self.parent[slots]
        alive = (parents != NO_SLOT) & (self.parent_generation[slots] == self.generation[parents])
        return self.keys[slots], slots, np.where(alive, parents, NO_SLOT)

    def held(self) -> BoolArray:
        """Per slot: is it READY or SUSPENDED?"""
        flags: BoolArray = (self.state == READY) | (self.state == SUSPENDED)
        return flags


class TierIndex:
    """Index over ``slot_count`` slots. ``policy``, made for the same number, picks a victim among the leaves.

    ``regions``: number of slots in each slot file, in order (default: all in one).
    """

    def __init__(
        self,
        slot_count: int,
        policy: EvictionPolicy,
        regions: Sequence[int] | None = None,
    ) -> None:
        assert 0 <= slot_count <= _MAX_SLOTS, slot_count
        self.slot_count = slot_count
        self._keys = KeyTable(slot_count)
        self._state = bytearray(slot_count)
        self._states = np.frombuffer(self._state, np.uint8)  # the same memory, for array work
        self._pins = array("I", [0]) * slot_count
        self._links = ChainLinks(slot_count)
        self._policy = policy
        self._free_slots = FreeSlots(regions if regions is not None else [slot_count])
        self._ready_count = 0

    def __len__(self) -> int:
        """READY pages."""
        return self._ready_count

    def find(self, key: PageKey) -> SlotId | None:
        """Slot of a READY page, or None. Does not touch recency."""
        slot = self._keys.get(key)
        return SlotId(slot) if slot != NO_SLOT and self._state[slot] == READY else None

    def holds(self, key: PageKey) -> bool:
        """True if the page is READY or being written: writing it again would be waste."""
        return key in self._keys

    def found(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: is it READY?"""
        flags: list[bool] = self._in_state(self._keys.get_all(keys), READY).tolist()
        return flags

    def run(self, keys: Sequence[PageKey]) -> list[SlotId]:
        """Slots of the leading run of READY keys. Does not touch recency: asking is not using."""
        first = self._keys.get(keys[0]) if keys else NO_SLOT
        if first == NO_SLOT or self._state[first] != READY:  # the most frequent answer, at once
            return []
        slots = self._keys.get_all(keys)
        ready = self._in_state(slots, READY)
        run: list[SlotId] = (slots if ready.all() else slots[: ready.argmin()]).tolist()
        return run

    def prefix(self, keys: Sequence[PageKey]) -> int:
        """Length of ``run``."""
        return len(self.run(keys))

    def pin(self, slots: Iterable[SlotId]) -> None:
        """Pin slots, which is no use of them. ``unpin`` each exactly once."""
        for slot in slots:
            self._pins[slot] += 1

    def pin_run(self, keys: Sequence[PageKey]) -> list[SlotId]:
        """Pin and touch the leading run of READY pages, and refresh their links. ``unpin`` each slot exactly once."""
        slots = self.run(keys)
        self.pin(slots)
        for before, slot in pairwise(slots):
            self._links.link(slot, before)
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
        """Forget a READY page with corrupt bytes. False if ``key`` is no longer in ``slot``.

        Its children stay as roots. A pinned slot is reused only after its last unpin.
        """
        if self._keys.get(key) != slot or self._state[slot] != READY:
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

        ``parent``: the page before ``keys[0]``, if known. ``skip``: positions not wanted (a neighbour has them).
        Present keys are touched and never victims of this call. Never waits, never raises. A leading part is granted;
        the rest is refused if no leaf can be evicted, and declined if no leaf of a lower value can.
        """
        chain = keys if parent is None else [parent, *keys]
        at = self._keys.get_all(chain)
        if self._replace_suspended(at[len(chain) - len(keys) :]):
            at = self._keys.get_all(chain)
        found = at.tolist()
        slot_of = dict(zip(chain, found, strict=True))
        present = [SlotId(slot) for slot in found if slot != NO_SLOT]
        before = found[0] if parent is not None else NO_SLOT
        self.pin(present)  # a batch never evicts its own pages
        absent = {
            key: position
            for position, key in reversed(list(enumerate(keys)))
            if slot_of[key] == NO_SLOT and position not in skip
        }
        wanted = sorted(absent.values())
        slots, victims, declined = self._take([keys[position] for position in wanted])
        granted = list(zip(wanted, slots, strict=False))
        for position, slot in granted:
            self._begin_write(keys[position], slot)
            slot_of[keys[position]] = slot
        previous = before
        unplaced: list[int] = []
        for position, key in enumerate(keys):
            current = slot_of[key]
            if current == NO_SLOT and position not in skip:
                unplaced.append(position)
            elif current != NO_SLOT and previous != NO_SLOT:
                self._links.link(current, previous)
            previous = current
        self.unpin(present)
        self._touch_chain(present if before == NO_SLOT else present[1:])
        if before != NO_SLOT and self._state[before] == READY:
            # It gained a child, so its place in the queue is stale; this is not a use.
            self._policy.renew(before, self._links.children[before])
        if declined:
            self._policy.declined([keys[position] for position in unplaced])
        return Reserved(
            granted, victims, [] if declined else unplaced, unplaced if declined else []
        )

    def still_writing(self, slots: Iterable[SlotId]) -> list[bool]:
        """Per slot: False if ``clear`` or ``suspend`` hit it since ``reserve``. It must be aborted then."""
        is_open = self._free_slots.is_open
        return [self._state[slot] == WRITING and is_open(slot) for slot in slots]

    def commit(self, slots: Iterable[SlotId]) -> None:
        """WRITING -> READY. The commit records of these slots are on the journal already."""
        ready = list(slots)
        for slot in ready:
            assert self._state[slot] == WRITING, f"slot {slot} is in state {self._state[slot]}"
            self._state[slot] = READY
            self._ready_count += 1
        self._policy.used(ready, self._keys, self._links.children)

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
        for slot in self._keys.slots().tolist():
            self._links.reset(slot)
            if self._state[slot] == WRITING or self._pins[slot]:
                self._state[slot] = DOOMED
            else:
                self._free(slot)
        self._keys.clear()
        self._policy.clear()
        self._ready_count = 0

    def suspend(self, region: int, *, readable: bool = False) -> int:
        """The directory of a region fails: its slots are not used and its pages not found.

        Returns the number of its pages. One that is put again goes elsewhere and is forgotten here.
        ``readable``: only writes fail; its pages stay or are found again, and none is evicted.
        """
        low, high = self._free_slots.span(region)
        self._free_slots.close(region)
        self._policy.retain(lambda slot: not low <= slot < high)
        if readable:
            self._find_again(region)
            return 0
        state = self._states[low:high]
        ready = state == READY
        state[ready] = SUSPENDED
        count = int(ready.sum())
        self._ready_count -= count
        return count

    def resume(self, region: int) -> int:
        """Undo ``suspend``. Returns the number of pages that are back."""
        low, high = self._free_slots.span(region)
        self._free_slots.reopen(region)
        count = self._find_again(region)
        for slot in (np.flatnonzero(self._states[low:high] == READY) + low).tolist():
            if self._links.children[slot] == 0:
                self._policy.offer(slot)
        return count

    def _find_again(self, region: int) -> int:
        low, high = self._free_slots.span(region)
        state = self._states[low:high]
        back = state == SUSPENDED
        state[back] = READY
        count = int(back.sum())
        self._ready_count += count
        return count

    def give_up(self, slots: Iterable[int]) -> bool:
        """Forget the pages in some slots of a suspended region. False, and nothing is done: one of them is in use."""
        given = list(slots)
        if any(self._pins[slot] or self._state[slot] in (WRITING, DOOMED) for slot in given):
            return False
        for slot in given:
            if self._state[slot] in (READY, SUSPENDED):
                self._forget(slot)
                self._free(slot)
        return True

    def retire(self, region: int, count: int) -> tuple[list[tuple[PageKey, SlotId]], int]:
        """Take slots at the end of a region out of use for good, at most ``count``.

        Stops at the first one that is pinned or being written. Returns the (key, slot) pairs of the pages that
        are gone, and the number of slots that the region still has.
        """
        low, high = self._free_slots.span(region)
        gone: list[tuple[PageKey, SlotId]] = []
        slot = high
        while slot > low and self._state[slot - 1] == RETIRED:
            slot -= 1
        for _ in range(min(count, slot - low)):
            if self._state[slot - 1] == FREE:
                self._free_slots.remove(slot - 1)
            elif self._state[slot - 1] == READY and not self._pins[slot - 1]:
                gone.append((self._forget(slot - 1), SlotId(slot - 1)))
            else:
                break
            slot -= 1
            self._state[slot] = RETIRED
        return gone, slot - low

    def load(self, keys: KeyArray, slots: I64, parents: I64) -> list[int]:
        """Fill an empty index from a recovered journal, oldest first. ``parents``: slots, or -1.

        Returns the positions that were dropped because an earlier one has the same key.
        """
        dropped = self._keys.load(keys, slots)
        if dropped:
            slots, parents = np.delete(slots, dropped), np.delete(parents, dropped)
        self._states[slots] = READY
        assert np.count_nonzero(self._states) == len(slots), "two pages in one slot"
        self._links.load(slots, parents, self._states)
        self._ready_count = len(slots)
        self._free_slots.load(self._states == FREE)
        children = np.frombuffer(self._links.children, np.uint32)
        self._policy.load(slots, slots[children[slots] == 0])
        return dropped

    def snapshot(self) -> IndexSnapshot:
        """The columns that a journal's snapshot needs. Copies only: a million pages are not sorted under a lock."""
        return IndexSnapshot(
            self._keys.column(),
            self._states.copy(),
            np.array(self._policy.last_use, np.uint64),
            *self._links.copy(),
        )

    def gone_since(self, before: IndexSnapshot, region: int) -> list[tuple[PageKey, SlotId]]:
        """Pages of ``before`` that have left their slots in a region."""
        low, high = self._free_slots.span(region)
        _, _, generation = self._links.copy()
        left = before.held()[low:high] & (generation[low:high] != before.generation[low:high])
        slots = (np.flatnonzero(left) + low).tolist()
        keys = before.keys[slots].tolist()
        return [(PageKey(key), SlotId(slot)) for key, slot in zip(keys, slots, strict=True)]

    def check(self) -> None:
        """Assert every invariant. O(slots). For tests, the crash campaign and the soak."""
        children = [0] * self.slot_count
        for slot in self._keys.slots().tolist():
            assert self._keys.get(self._keys[slot]) == slot, f"slot {slot} and its key disagree"
            assert self._state[slot] in _KEYED, f"key in slot {slot}, state {self._state[slot]}"
            parent = self.parent_slot(slot)
            if parent != NO_SLOT:
                assert self._state[parent] in _KEYED, f"slot {slot} has a dead parent {parent}"
                children[parent] += 1
        named = sum(state in _KEYED for state in self._state)
        assert named == len(self._keys), f"{named} slots have a key, {len(self._keys)} are found"
        assert self._ready_count == sum(state == READY for state in self._state)
        offers = self._policy.offers()
        for slot in range(self.slot_count):
            counted = self._links.children[slot]
            assert children[slot] == counted, f"slot {slot} counts {counted} children"
            free = self._free_slots.is_free(slot)
            assert free == (self._state[slot] == FREE), f"slot {slot} leaks or is free in use"
            if self._state[slot] == FREE:
                assert self._pins[slot] == 0, f"slot {slot} is free but pinned"
            leaf = self._state[slot] == READY and children[slot] == 0
            if leaf and self._free_slots.is_open(slot):
                assert slot in offers, f"leaf {slot} cannot be found for eviction"

    @property
    def parents(self) -> Sequence[int]:
        """Parent slots as they were linked; some may hold other pages now. Read only."""
        return self._links.parent

    def parent_slot(self, slot: int) -> int:
        """Slot of the cached parent page, or -1."""
        return self._links.parent_of(slot)

    def _touch_chain(self, slots: Sequence[int]) -> None:
        """Touch from tail to head, so that within one request the tail is older and goes first."""
        ready = [slot for slot in reversed(slots) if self._state[slot] == READY]
        self._policy.used(ready, self._keys, self._links.children)

    def _take(
        self, keys: Sequence[PageKey]
    ) -> tuple[list[SlotId], list[tuple[PageKey, SlotId]], bool]:
        """Slots for ``keys``, free ones first, then by eviction.

        Returns (slots ascending, evicted (key, slot) pairs, stopped because every leaf has a higher value).
        """
        slots = [SlotId(slot) for slot in self._free_slots.take(len(keys))]
        victims: list[tuple[PageKey, SlotId]] = []
        declined = False
        values = self._policy.admission_values(keys) if len(slots) < len(keys) else None
        while len(slots) < len(keys):
            value = values[len(slots)] if values is not None else inf
            victim = self._policy.victim(self._may_go, value)
            if victim is None:
                declined = values is not None and self._policy.victim(self._may_go) is not None
                break
            victims.append((self._forget(victim), SlotId(victim)))
            self._state[victim] = FREE
            slots.append(SlotId(victim))
        # Pages of a chain were evicted tail first; in order again, they lie side by side.
        return sorted(slots), victims, declined

    def _may_go(self, slot: int) -> bool:
        return self._pins[slot] == 0 and self._free_slots.is_open(slot)

    def _replace_suspended(self, slots: I64) -> bool:
        """Forget suspended pages, so that they can be written elsewhere. True if there were any."""
        suspended = set(slots[self._in_state(slots, SUSPENDED)].tolist())
        unpinned = [slot for slot in suspended if not self._pins[slot]]
        for slot in unpinned:
            self._forget(slot)
            self._free(slot)
        return bool(unpinned)

    def _begin_write(self, key: PageKey, slot: SlotId) -> None:
        self._keys.put(key, slot)
        self._state[slot] = WRITING

    def _forget(self, slot: int) -> PageKey:
        """Take a page out of the map and out of the tree; its slot is not free yet. Returns its key."""
        key = self._keys.remove(slot)
        if self._state[slot] in (READY, SUSPENDED):
            self._ready_count -= self._state[slot] == READY
            self._policy.forget(slot, key)
        parent = self._links.cut(slot)
        if parent != NO_SLOT and self._state[parent] == READY:
            self._policy.offer(parent)
        return key

    def _in_state(self, slots: I64, state: int) -> BoolArray:
        """Per slot, or -1: is it in ``state``?"""
        if not self.slot_count:
            return np.zeros(len(slots), np.bool_)
        flags: BoolArray = (slots >= 0) & (self._states.take(slots, mode="clip") == state)
        return flags

    def _free(self, slot: int) -> None:
        self._state[slot] = FREE
        self._free_slots.give(slot)
