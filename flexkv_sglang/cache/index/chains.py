"""ChainLinks: the slot of the page before each page. Pure: no I/O, no lock, no clock.

A page key stands for its whole prefix, so a page has one parent for ever. Links only order eviction (leaves first);
no lookup depends on them. A link names the parent's slot and its generation, so it is void when that slot gets
another page.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from flexkv_sglang.types import I64, NO_SLOT, READY, U32


class ChainLinks:
    """Parent, number of children and generation per slot."""

    def __init__(self, slot_count: int) -> None:
        self.parent = array("q", [NO_SLOT]) * slot_count
        self._parent_generation = array("I", [0]) * slot_count
        self._generation = array("I", [0]) * slot_count
        self.children = array("I", [0]) * slot_count

    def parent_of(self, slot: int) -> int:
        """Slot of the cached parent page, or -1."""
        parent = self.parent[slot]
        if parent == NO_SLOT or self._generation[parent] != self._parent_generation[slot]:
            return NO_SLOT
        return parent

    def link(self, slot: int, parent: int) -> None:
        """``parent`` holds the page before the one in ``slot``. Keeps a link that is there already."""
        if self.parent_of(slot) != NO_SLOT or parent == slot:
            # A key's parent cannot change. Two claims mean the caller's chain is not one (opaque v0
            # keys): keep the first, links are only an order.
            return
        self.parent[slot] = parent
        self._parent_generation[slot] = self._generation[parent]
        self.children[parent] += 1

    def cut(self, slot: int) -> int:
        """The page leaves its slot. Returns the parent's slot if this was its last child, else -1.

        Children that are left become roots: their link names an old generation.
        """
        parent = self.parent_of(slot)
        self.reset(slot)
        if parent == NO_SLOT:
            return NO_SLOT
        self.children[parent] -= 1
        return parent if self.children[parent] == 0 else NO_SLOT

    def reset(self, slot: int) -> None:
        """Cut a page from its parent when the parent is forgotten in the same call."""
        self.parent[slot] = NO_SLOT
        self._generation[slot] = (self._generation[slot] + 1) & 0xFFFFFFFF
        self.children[slot] = 0

    def load(self, slots: I64, parents: I64, state: npt.NDArray[np.uint8]) -> None:
        """Links of recovered pages: ``parents`` are slots or -1; ``state`` per slot says which are READY."""
        linked = (parents >= 0) & (parents < len(state)) & (parents != slots)
        linked[linked] = state[parents[linked]] == READY
        np.frombuffer(self.parent, np.int64)[slots[linked]] = parents[linked]
        counts = np.bincount(parents[linked], minlength=len(state))
        np.frombuffer(self.children, np.uint32)[:] = counts[: len(state)]

    def copy(self) -> tuple[I64, U32, U32]:
        """(parent, the parent's generation as linked, generation) per slot."""
        return (
            np.array(self.parent, np.int64),
            np.array(self._parent_generation, np.uint32),
            np.array(self._generation, np.uint32),
        )
