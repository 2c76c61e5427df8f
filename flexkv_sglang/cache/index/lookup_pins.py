"""LookupPins: pages that an exists-check has announced stay until they are read, for a short time. Pure.

SGLang asks ``batch_exists`` and fetches the pages a moment later; evicted in between, the prefetch is
wasted. What keeps this from becoming a way to own the cache: a promise ends after ``PROMISE_S`` whatever
happens, a page gets no second one before it was read, their number is bounded, and eviction that finds
nothing else to evict breaks them all. Only chain tails need one: their ancestors are no leaves.

Not thread-safe: used under the engine's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from flexkv_sglang.types import SlotId

PROMISE_S = 5.0
"""How long a promise holds, in seconds."""

_SLOTS_PER_PROMISE = 8  # at most one slot of so many is promised


class LookupPins:
    """Which slots are promised. Whoever adds or removes one pins or unpins the slot."""

    def __init__(self, slot_count: int) -> None:
        self._limit = max(1, slot_count // _SLOTS_PER_PROMISE)
        self._until: dict[SlotId, float] = {}  # in the order they end
        self._spent = bytearray(slot_count)  # promised since the page was last read

    def __len__(self) -> int:
        return len(self._until)

    def make(self, run: Sequence[SlotId], parents: Sequence[int], now: float) -> list[SlotId]:
        """Promise a leading run. Returns the slots that are promised now and were not: pin them.

        ``parents``: per slot of the tier, the slot of the page before it, or -1.
        """
        if not run:
            return []
        tails = [slot for slot, after in pairwise(run) if parents[after] != slot]
        made: list[SlotId] = []
        for slot in (*tails, run[-1]):
            if len(self._until) >= self._limit:
                break
            if not self._spent[slot]:
                self._spent[slot] = 1
                self._until[slot] = now + PROMISE_S
                made.append(slot)
        return made

    def keep(self, slots: Iterable[SlotId]) -> list[SlotId]:
        """These pages were read or written: they may be promised again. Returns what to unpin."""
        kept = []
        for slot in slots:
            self._spent[slot] = 0
            if self._until.pop(slot, None) is not None:
                kept.append(slot)
        return kept

    def expire(self, now: float) -> list[SlotId]:
        """End what has lasted too long. Returns what to unpin."""
        over = []
        for slot, until in self._until.items():
            if until > now:
                break
            over.append(slot)
        for slot in over:
            del self._until[slot]
        return over

    def break_all(self) -> list[SlotId]:
        """End all of them. Returns what to unpin."""
        slots = list(self._until)
        self._until.clear()
        return slots
