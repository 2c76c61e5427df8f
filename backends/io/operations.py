"""Operations: the submission entries of one transfer, and from their completions the result of each page.

Adjacent pages become one operation. Large pinned pages become one operation per buffer, because the kernel's
operations on pinned memory take one buffer. A page that did not move whole in the company of others, or moved in
part, is tried once more alone: so every page has its own result, and a short transfer is one of the medium, not of
another page in the same operation. Array work only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io.pinned_memory import PLAIN
from flexkv_sglang.backends.io.transfer import PageTransfer, Positions
from flexkv_sglang.backends.io.uring import (
    IOVEC,
    OP_READ,
    OP_READ_FIXED,
    OP_READV,
    OP_WRITE,
    OP_WRITE_FIXED,
    OP_WRITEV,
    SQE,
)
from flexkv_sglang.types import I64

IOV_MAX = 1024

MERGE_BYTES = 1 << 20
"""Adjacent pages are joined up to this size. Larger operations are split by the block layer anyway."""

FIXED_BYTES_MIN = 128 << 10
"""Buffers from this size on are worth an operation of their own when they are pinned."""


def runs(transfer: PageTransfer) -> Positions:
    """Borders of the operations, ``[m + 1]``: operation ``k`` is pages ``[borders[k], borders[k + 1])``.

    Pages are joined while they are neighbours in the transfer and adjacent in one file, up to
    ``MERGE_BYTES`` and ``IOV_MAX`` buffers.
    """
    count, page_bytes = len(transfer), transfer.page_bytes
    limit = min(MERGE_BYTES // max(page_bytes, 1), IOV_MAX // len(transfer.buffers.lengths))
    if limit < 2:
        return np.arange(count + 1)
    follows = transfer.offsets[:-1] + np.uint64(page_bytes) == transfer.offsets[1:]
    joined = np.concatenate([[False], follows & (transfer.fds[:-1] == transfer.fds[1:])])
    places = np.arange(count)
    start = np.maximum.accumulate(np.where(joined, 0, places))  # first page of the adjacent stretch
    borders = np.flatnonzero((places - start) % limit == 0)
    return np.concatenate([borders, [count]])


def share(borders: Positions, ids: I64, moved: I64, page_bytes: int) -> tuple[Positions, I64]:
    """Pages of the operations ``ids``, and each page's part of ``moved`` (bytes or -errno)."""
    counts = borders[ids + 1] - borders[ids]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    got = np.repeat(moved, counts)
    got = np.where(got < 0, got, np.clip(got - within * page_bytes, 0, page_bytes))
    return np.repeat(borders[ids], counts) + within, got


class Operations:
    """Submission entries of one transfer, and the accounting of their completions. One thread.

    The memory of the iovecs lives as long as this object: keep it until every completion is in.
    """

    def __init__(self, transfer: PageTransfer, pinned: Positions) -> None:
        """``pinned``: per buffer (row-major ``[n * b]``) its place in the ring's table, or ``PLAIN``."""
        self._transfer = transfer
        buffers = transfer.buffers
        self._parts = len(buffers.lengths)
        self._vectors = np.empty(buffers.addresses.shape, IOVEC)
        self._vectors["base"], self._vectors["len"] = buffers.addresses, buffers.lengths
        self._split = int(buffers.lengths.min()) >= FIXED_BYTES_MIN and bool(
            (pinned != PLAIN).any()
        )
        if self._split:
            self._entries = self._entry_per_buffer(pinned)
            self._left = np.full(len(transfer), self._parts)
            self._sums = np.zeros(len(transfer), np.int64)
        else:
            self._borders = runs(transfer)
            self._entries = self._vectored(self._borders[:-1], np.diff(self._borders))
        self._entries["user_data"] = np.arange(len(self._entries), dtype=np.uint64)
        self._taken = 0
        self._again: list[int] = []  # pages to be tried once more, alone

    @property
    def waiting(self) -> int:
        """Operations not taken yet."""
        return len(self._entries) - self._taken + len(self._again)

    @property
    def mean_bytes(self) -> int:
        """Bytes of an average operation."""
        return max(1, self._transfer.page_bytes * len(self._transfer) // len(self._entries))

    @property
    def fixed(self) -> int:
        """Operations on pinned memory."""
        return int(np.isin(self._entries["opcode"], (OP_READ_FIXED, OP_WRITE_FIXED)).sum())

    def take(self, room: int) -> npt.NDArray[Any]:
        """At most ``room`` submission entries that were not taken yet; first tries first."""
        taken = self._entries[self._taken : self._taken + room]
        self._taken += len(taken)
        if len(taken) or not self._again:
            return taken
        pages = np.array(self._again[:room], np.intp)
        del self._again[:room]
        second = self._vectored(pages, np.ones(len(pages), np.intp))
        second["user_data"] = pages + len(self._entries)
        return second

    def pages(self, entries: npt.NDArray[Any]) -> Positions | slice:
        """Pages of entries that ``take`` has just given."""
        ids = entries["user_data"].astype(np.int64)
        if not len(ids) or ids[0] >= len(self._entries):
            return ids - len(self._entries)
        first, last = int(ids[0]), int(ids[-1])
        if self._split:
            return slice(first // self._parts, last // self._parts + 1)
        return slice(int(self._borders[first]), int(self._borders[last + 1]))

    def results(self, ids: I64, moved: I64) -> tuple[Positions, I64]:
        """Completions (``user_data``, ``res``) -> pages whose result is final, and their results."""
        second = ids >= len(self._entries)
        if not second.any():
            return self._first(ids, moved)
        pages, got = self._first(ids[~second], moved[~second])
        pages = np.concatenate([ids[second] - len(self._entries), pages])
        return pages, np.concatenate([moved[second], got])

    def _first(self, ids: I64, moved: I64) -> tuple[Positions, I64]:
        """(pages, results) of first tries that are final; the others are noted for their second."""
        page_bytes = self._transfer.page_bytes
        if self._split:
            pages, got = self._gathered(ids // self._parts, moved)
            exact = got < 0
        elif len(self._entries) == len(self._transfer):  # one page per operation
            pages, got = ids, moved
            exact = got < 0
        else:
            pages, got = share(self._borders, ids, moved, page_bytes)
            counts = self._borders[ids + 1] - self._borders[ids]
            exact = (got < 0) & np.repeat(counts == 1, counts)
        final = (got == page_bytes) | exact
        if final.all():
            return pages, got
        self._again += pages[~final].tolist()
        return pages[final], got[final]

    def _gathered(self, pages: I64, moved: I64) -> tuple[Positions, I64]:
        """Add up the buffers of pages; those that are complete with their sum, or their last error."""
        np.subtract.at(self._left, pages, 1)
        bad = moved < 0
        good = ~bad & (self._sums[pages] >= 0)
        np.add.at(self._sums, pages[good], moved[good])
        self._sums[pages[bad]] = moved[bad]
        done = np.unique(pages[self._left[pages] == 0])
        return done, self._sums[done]

    def _entry_per_buffer(self, places: Positions) -> npt.NDArray[Any]:
        transfer, lengths = self._transfer, self._transfer.buffers.lengths
        writing = transfer.writing
        todo = np.zeros(len(places), SQE)
        pinned = places != PLAIN
        fixed, plain = (OP_WRITE_FIXED, OP_WRITE) if writing else (OP_READ_FIXED, OP_READ)
        todo["opcode"] = np.where(pinned, fixed, plain)
        todo["buf_index"] = np.where(pinned, places, 0)
        todo["fd"] = np.repeat(transfer.fds, self._parts)
        steps = np.cumsum(lengths) - lengths
        todo["off"] = (transfer.offsets[:, None] + steps[None, :]).reshape(-1)
        todo["addr"] = transfer.buffers.addresses.reshape(-1)
        todo["len"] = np.tile(lengths, len(transfer))
        return todo

    def _vectored(self, pages: Positions, counts: Positions) -> npt.NDArray[Any]:
        """Entries that move ``counts[k]`` pages from ``pages[k]`` on with one list of buffers."""
        todo = np.zeros(len(pages), SQE)
        todo["opcode"] = OP_WRITEV if self._transfer.writing else OP_READV
        todo["fd"], todo["off"] = self._transfer.fds[pages], self._transfer.offsets[pages]
        step = self._parts * IOVEC.itemsize
        todo["addr"] = self._vectors.ctypes.data + pages * step
        todo["len"] = counts * self._parts
        return todo
