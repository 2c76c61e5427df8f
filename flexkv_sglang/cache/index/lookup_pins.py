"""LookupPins: pages that an exists-check has announced stay until they are read, for a short time. Pure.

SGLang asks ``batch_exists`` and fetches the pages a moment later; a page evicted in between wastes the prefetch.
Nobody can own the cache this way: a pin ends after ``LOOKUP_PIN_S``, a page gets no second one before it was read, the
number of pins is bounded, and eviction that finds no other victim releases them all. Only chain tails need one: their
ancestors are no leaves.

Not thread-safe: used under ``LocalPages.lock``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from flexkv_sglang.types import SlotId

LOOKUP_PIN_S = 5.0
"""Seconds until a pin ends."""

_SLOTS_PER_PIN = 8  # at most one slot of 8 has one


class LookupPins:
    """Slots with such a pin, and when it ends. The caller pins and unpins the slots in the index."""

    def __init__(self, slot_count: int) -> None:
        self._limit = max(1, slot_count // _SLOTS_PER_PIN)
        self._until: dict[SlotId, float] = {}  # in the order they end
        self._spent = bytearray(slot_count)  # pinned since the page was last read

    def __len__(self) -> int:
        return len(self._until)

    def add(self, run: Sequence[SlotId], parents: Sequence[int], now: float) -> list[SlotId]:
        """Pin a leading run. Returns the slots that have a new pin: pin them in the index.

        ``parents``: per slot of the tier, the slot of the page before it, or -1.
        """
        if not run:
            return []
        tails = [slot for slot, after in pairwise(run) if parents[after] != slot]
        added: list[SlotId] = []
        for slot in (*tails, run[-1]):
            if len(self._until) >= self._limit:
                break
            if not self._spent[slot]:
                self._spent[slot] = 1
                self._until[slot] = now + LOOKUP_PIN_S
                added.append(slot)
        return added

    def release(self, slots: Iterable[SlotId]) -> list[SlotId]:
        """These pages were read or written: they may get a pin again. Returns the slots to unpin."""
        released = []
        for slot in slots:
            self._spent[slot] = 0
            if self._until.pop(slot, None) is not None:
                released.append(slot)
        return released

    def expire(self, now: float) -> list[SlotId]:
        """End the pins that are over. Returns the slots to unpin."""
        over = []
        for slot, until in self._until.items():
            if until > now:
                break
            over.append(slot)
        for slot in over:
            del self._until[slot]
        return over

    def release_all(self) -> list[SlotId]:
        """End all pins. Returns the slots to unpin."""
        slots = list(self._until)
        self._until.clear()
        return slots
