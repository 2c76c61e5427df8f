"""FreeSlots: the free slots of each region. Pure: no I/O, no lock, no clock.

A *region* is the range of slots in one slot file. Slots are given as runs of consecutive numbers where possible, so
that few large operations move the pages of a call; its runs are spread over the regions, so that several disks work.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from flexkv_sglang.types import BoolArray


class FreeSlots:
    """Free slots of regions with ``counts`` slots each, numbered from 0 through all of them."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._bases = [0, *accumulate(counts)]
        self._free = bytearray(b"\1") * self._bases[-1]
        self._left = list(counts)
        self._cursor = self._bases[:-1]  # next fit: where the last run ended
        self._open = [True] * len(counts)
        self._turn = 0  # region that is asked first

    def span(self, region: int) -> tuple[int, int]:
        """First slot of a region, and the one after its last."""
        return self._bases[region], self._bases[region + 1]

    def region_of(self, slot: int) -> int:
        """Region of a slot."""
        return bisect_right(self._bases, slot) - 1

    def is_free(self, slot: int) -> bool:
        """Is the slot free?"""
        return bool(self._free[slot])

    def is_open(self, slot: int) -> bool:
        """False while the slot's region is closed."""
        return self._open[self.region_of(slot)]

    def give(self, slot: int) -> None:
        """Make a slot free."""
        assert not self._free[slot], f"slot {slot} is free twice"
        self._free[slot] = 1
        self._left[self.region_of(slot)] += 1

    def take(self, count: int) -> list[int]:
        """At most ``count`` slots of open regions; fewer if there are no more."""
        taken: list[int] = []
        regions = [r for r, left in enumerate(self._left) if left and self._open[r]]
        if len(regions) > 1:
            self._turn += 1
            turn = self._turn % len(regions)
            regions = regions[turn:] + regions[:turn]
        for asked, region in enumerate(regions):
            if len(taken) < count:
                share = -(-(count - len(taken)) // (len(regions) - asked))
                taken += self._take_from(region, min(share, self._left[region]))
        for region in regions:  # where one had too few, the others give more
            if len(taken) < count and self._left[region]:
                taken += self._take_from(region, min(count - len(taken), self._left[region]))
        return taken

    def remove(self, slot: int) -> None:
        """Take this free slot."""
        assert self._free[slot], f"slot {slot} is not free"
        self._free[slot] = 0
        self._left[self.region_of(slot)] -= 1

    def close(self, region: int) -> None:
        """Give no slot of this region until ``reopen``."""
        self._open[region] = False

    def reopen(self, region: int) -> None:
        """Undo ``close``."""
        self._open[region] = True

    def load(self, free: BoolArray) -> None:
        """Begin with the slots that are ``free``: bool ``[slots]``."""
        self._free[:] = free.astype(np.uint8).tobytes()
        for region in range(len(self._left)):
            low, high = self.span(region)
            self._left[region] = int(free[low:high].sum())

    def _take_from(self, region: int, count: int) -> list[int]:
        """Exactly ``count`` slots, which exist, in the longest runs that a few searches find."""
        taken: list[int] = []
        length = count
        while len(taken) < count:
            length = min(length, count - len(taken))
            at = self._find(region, length)
            if at < 0:
                length = max(1, length // 4)
                continue
            self._free[at : at + length] = bytes(length)
            self._cursor[region] = at + length
            taken += range(at, at + length)
        self._left[region] -= count
        return taken

    def _find(self, region: int, length: int) -> int:
        low, high = self.span(region)
        run = b"\1" * length
        at = self._free.find(run, self._cursor[region], high)
        return at if at >= 0 else self._free.find(run, low, high)
