"""Memory that may be pinned for a ring, piece by piece as it is first used.

Pinning costs 37 ms per GiB of 4 KiB pages, so nothing is pinned when a pool is announced, and no call waits for it: a
call uses plain operations for the pieces that it is the first to touch, and the ring's own thread pins them
afterwards, one at a time. After a refusal by the kernel (memlock limit, old kernel) nothing more is pinned.

Danger: a pinned piece stays the *old* memory if its address is mapped again. So announced memory must stay
mapped until the ring is closed.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io.uring import drop_buffer_table, make_buffer_table, pin_buffer
from flexkv_sglang.types import U64

PIECE_BYTES = 64 << 20
"""About 2.5 ms of pinning, for which a call may have to wait; the kernel takes at most 1 GiB."""

_MAPS = Path(
    "/proc/self/maps"
)  # not smaps: that would walk the page tables of a pool of hundreds of GB
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+\s*(.*)")

_PIECES_MAX = 1 << 14  # the kernel's table
PLAIN = -1
"""In place of a table entry: not pinned."""


class PinnedMemory:
    """Which addresses are pinned for the ring ``fd``. Not thread-safe: guarded by the ring's lock."""

    def __init__(self) -> None:
        self._starts: U64 = np.zeros(0, np.uint64)
        self._ends: U64 = np.zeros(0, np.uint64)
        self._pinned = np.zeros(0, np.bool_)
        self._asked = np.zeros(0, np.bool_)  # to be pinned, or pinned
        self._table_made = False
        self._given_up = False

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned now."""
        return int((self._ends - self._starts)[self._pinned].sum())

    def announce(self, fd: int, address: int, byte_count: int) -> None:
        """Allow this memory to be pinned. Everything is unpinned, and pinned again when used."""
        if self._table_made:
            drop_buffer_table(fd)
            self._table_made = False
        starts = np.arange(address, address + byte_count, PIECE_BYTES, dtype=np.uint64)
        ends = np.minimum(starts + np.uint64(PIECE_BYTES), np.uint64(address + byte_count))
        starts, ends = np.concatenate([self._starts, starts]), np.concatenate([self._ends, ends])
        order = np.argsort(starts)
        self._starts, self._ends = starts[order], ends[order]
        self._pinned, self._asked = np.zeros(len(starts), np.bool_), np.zeros(len(starts), np.bool_)
        overlap = bool((self._starts[1:] < self._ends[:-1]).any())
        self._given_up = overlap or len(starts) > _PIECES_MAX

    def ask(self, addresses: U64, lengths: U64) -> list[int]:
        """Announced pieces that hold some of these buffers and were not asked for yet: ``pin`` each, once."""
        if self._given_up or not len(self._starts):
            return []
        pieces = np.unique(self._pieces(addresses, lengths))
        new = pieces[(pieces != PLAIN) & ~self._asked[pieces]]
        self._asked[new] = True
        return [int(piece) for piece in new]

    def pin(self, fd: int, piece: int) -> None:
        """Pin one piece. After a refusal nothing more is pinned."""
        if self._given_up or piece >= len(self._starts) or self._pinned[piece]:
            return
        start = int(self._starts[piece])
        try:
            if not self._table_made:
                make_buffer_table(fd, len(self._starts))
                self._table_made = True
            pin_buffer(fd, piece, start, int(self._ends[piece]) - start)
        except InterruptedError:
            self._asked[piece] = False  # the next call asks again
            return
        except OSError:
            self._given_up = True  # pieces that are pinned already stay in use
            return
        self._pinned[piece] = True

    def entries(self, addresses: U64, lengths: U64) -> npt.NDArray[np.intp]:
        """Table entry that holds each buffer whole (both uint64 ``[n]``), or ``PLAIN``."""
        if not self._pinned.any():
            return np.full(len(addresses), PLAIN, np.intp)
        pieces = self._pieces(addresses, lengths)
        return np.where((pieces != PLAIN) & self._pinned[pieces], pieces, PLAIN)

    def _pieces(self, addresses: U64, lengths: U64) -> npt.NDArray[np.intp]:
        found = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = (found >= 0) & (addresses + lengths <= self._ends[found])
        return np.where(inside, found, PLAIN)


def huge_pages(address: int) -> str:
    """Kind of memory pages behind an address; large ones make transfers cheaper. Linux only, reads proc(5).

    "reserved" (hugetlbfs), "transparent" (where the machine has some: SGLang asks for them), "none", "unknown".
    """
    try:
        lines = _MAPS.read_text().splitlines()
        transparent = _TRANSPARENT.exists() and "[never]" not in _TRANSPARENT.read_text()
    except OSError:
        return "unknown"
    for line in lines:
        match = _LINE.match(line)
        if match and int(match[1], 16) <= address < int(match[2], 16):
            if "hugepage" in match[4]:
                return "reserved"
            private = match[3].endswith("p") and not match[4]
            return "transparent" if private and transparent else "none"
    return "unknown"
