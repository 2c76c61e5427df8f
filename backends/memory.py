"""AlignedMemory: anonymous memory that disks and network cards move bytes to and from directly."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from flexkv_sglang.types import SECTOR, U64, round_up

HUGE_PAGE = 2 << 20


class AlignedMemory:
    """At least ``byte_count`` bytes at ``address``, a multiple of 4096; of 2 MiB with ``huge_pages``.

    A forked child does not get it: no copy-on-write while the kernel writes into it. Freed with the object.
    ``view``: the bytes. ``huge_pages``: asked for; the kernel may have none.
    """

    def __init__(self, byte_count: int, *, huge_pages: bool = False) -> None:
        align = HUGE_PAGE if huge_pages else SECTOR
        self.byte_count = round_up(byte_count, align)
        spare = align if huge_pages else 0  # the kernel aligns to 4096
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, self.byte_count + spare, flags=flags)
        self._map.madvise(mmap.MADV_DONTFORK)
        if huge_pages:
            with contextlib.suppress(OSError):  # EINVAL: a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        start = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        self.address = round_up(start, align)
        self.view = memoryview(self._map)[self.address - start :][: self.byte_count]

    def rows(self, row_bytes: int, count: int) -> U64:
        """Addresses of ``count`` rows, one after the other: uint64 ``[count]``."""
        assert row_bytes * count <= self.byte_count, (row_bytes, count)
        return np.uint64(self.address) + np.arange(count, dtype=np.uint64) * np.uint64(row_bytes)
