"""Staging memory of the page server and of RDMA reads: one preallocated piece, allocated in runs.

First fit; adjacent free runs are joined. The caller frees a run when nothing reads it any more. Threads: one.
"""

from __future__ import annotations

from bisect import bisect_left

from flexkv_sglang.backends.memory import AlignedMemory
from flexkv_sglang.types import SECTOR


class StagingSlab:
    """``byte_count`` bytes at ``address`` (4096-aligned). ``free_bytes`` may lie in several runs."""

    def __init__(self, byte_count: int) -> None:
        self._memory = AlignedMemory(byte_count)
        self.byte_count, self.address = self._memory.byte_count, self._memory.address
        self.memory = self._memory.view
        self._free: list[tuple[int, int]] = [(0, self.byte_count)]  # (offset, length), ascending
        self.free_bytes = self.byte_count

    def take(self, byte_count: int) -> int | None:
        """Offset of a run of ``byte_count`` bytes (a multiple of 4096); None: no free run is long enough."""
        assert byte_count % SECTOR == 0, byte_count
        for place, (offset, length) in enumerate(self._free):
            if length >= byte_count:
                rest = (offset + byte_count, length - byte_count)
                self._free[place : place + 1] = [rest] if rest[1] else []
                self.free_bytes -= byte_count
                return offset
        return None

    def give(self, offset: int, byte_count: int) -> None:
        """Free a run."""
        place = bisect_left(self._free, (offset, 0))
        start, end = offset, offset + byte_count
        if place < len(self._free):
            assert end <= self._free[place][0], "freed twice"
            if end == self._free[place][0]:
                end += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == start:
            place -= 1
            start = self._free.pop(place)[0]
        self._free.insert(place, (start, end - start))
        self.free_bytes += byte_count
