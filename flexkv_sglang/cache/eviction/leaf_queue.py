"""LeafQueue: leaves of one class, least recently used first. Pure, not thread-safe.

A use appends an entry. A page that is used again, forgotten or gains a child leaves a stale entry behind: the slot has
another last use then. Parents that become leaves late are older than the end of the queue and wait in a heap.
Entries are u64: tick << 32 | slot, the tick modulo 2^32.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable

import numpy as np

from flexkv_sglang.types import I64, U64

_BITS = 32
_MASK = (1 << _BITS) - 1
_SLACK = 1024  # so few stale entries are not worth a clean-up


class LeafQueue:
    """``last_use``: the policy's column, ticks by slot.

    8 B per entry. Stale ones are removed when they may be a third of all.
    """

    def __init__(self, last_use: array[int]) -> None:
        self._last_use = last_use
        self._line = array("Q")
        self._first = 0  # of ``_line``: entries before it are taken
        self._late: list[int] = []
        self._room = _SLACK
        self.passed_over = False  # the leaf that ``oldest`` found last is not the oldest of all

    def append(self, slot: int, tick: int) -> None:
        """The leaf in ``slot`` was used at ``tick``, after everything else in here."""
        self._line.append((tick & _MASK) << _BITS | slot)
        if len(self._line) >= self._room:
            self.tidy()

    def offer(self, slot: int) -> None:
        """``slot`` has become a leaf; its last use may be long ago."""
        heapq.heappush(self._late, (self._last_use[slot] & _MASK) << _BITS | slot)
        if len(self._late) >= self._room:
            self.tidy()

    def oldest(self, may_go: Callable[[int], bool]) -> int | None:
        """The least recently used leaf that may go, or None. Its entry stays until its last use changes."""
        refused: list[int] = []
        found = None
        while (entry := self._head()) is not None:
            slot = entry & _MASK
            if may_go(slot):
                found = slot
                break
            refused.append(entry)
            if self._late and self._late[0] == entry:
                heapq.heappop(self._late)
            else:
                self._first += 1
        for entry in refused:
            heapq.heappush(self._late, entry)
        self.passed_over = bool(refused)
        return found

    def _head(self) -> int | None:
        """The oldest entry that is not stale."""
        line, late, last_use, first = self._line, self._late, self._last_use, self._first
        head = None
        while first < len(line):
            entry = line[first]
            if last_use[entry & _MASK] & _MASK == entry >> _BITS:
                head = entry
                break
            first += 1
        self._first = first
        while late:
            entry = late[0]
            if last_use[entry & _MASK] & _MASK == entry >> _BITS:
                return entry if head is None or entry < head else head
            heapq.heappop(late)
        return head

    def load(self, leaves: I64) -> None:
        """Start with these leaves, in any order."""
        ticks = np.frombuffer(self._last_use, np.uint64)[leaves] & np.uint64(_MASK)
        self._start(np.sort(ticks << np.uint64(_BITS) | leaves.astype(np.uint64)))

    def retain(self, keep: Callable[[int], bool]) -> None:
        """Remove the slots that ``keep`` refuses."""
        entries = [entry for entry in self._alive().tolist() if keep(entry & _MASK)]
        self._start(np.sort(np.array(entries, np.uint64)))

    def clear(self) -> None:
        """Remove all leaves."""
        self._start(np.empty(0, np.uint64))

    def slots(self) -> set[int]:
        """Slots that can be found."""
        return {int(entry) & _MASK for entry in self._alive()}

    def __len__(self) -> int:
        """Entries, the stale ones included."""
        return len(self._line) + len(self._late)

    def _alive(self) -> U64:
        entries = np.concatenate(
            [np.array(self._line[self._first :], np.uint64), np.array(self._late, np.uint64)]
        )
        slots = (entries & np.uint64(_MASK)).astype(np.int64)
        ticks = np.frombuffer(self._last_use, np.uint64)[slots] & np.uint64(_MASK)
        alive: U64 = entries[ticks == entries >> np.uint64(_BITS)]
        return alive

    def tidy(self) -> None:
        """Remove the stale entries."""
        self._start(np.sort(self._alive()))

    def _start(self, entries: U64) -> None:
        self._line = array("Q", entries.tobytes())
        self._first = 0
        self._late = []
        self._room = len(entries) * 3 // 2 + _SLACK
