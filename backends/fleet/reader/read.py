"""One read of pages at another node, and the outcome of each. Nothing is written to the targets after ``wait``.

Every page is verified in ZeroMQ's memory, or in the RDMA slab: status, length, kind and checksum. Then it is copied
under the read's lock. ``wait`` takes that lock before it returns, and pages that come later find the read closed.
The first page that fails ends the read: SGLang uses the leading run.

Threads: one waits, one (the client's) delivers.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind, page_checksum
from flexkv_sglang.backends.fleet.vocabulary import NodeId, PageStatus
from flexkv_sglang.backends.fleet.wire.answers import PagesHeader
from flexkv_sglang.backends.fleet.wire.protocol import Bytes, stride_of
from flexkv_sglang.types import PageBuffers, PageKey

_SMALL = 64 << 10
_move_holding = ctypes.PyDLL(None).memmove
"""Keeps the GIL: to release it costs more than a small copy."""

_move_holding.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_holding.restype = None


class PageOutcome(IntEnum):
    """Outcome of one page. OK: verified, and in its target. SKIPPED: not wanted, because an earlier page failed.

    MISS: the peer does not have it, or only with a weaker checksum. BUSY: ask again in a moment. LATE: the
    deadline came first. CORRUPT: its checksum does not match. FAILED: the peer is gone, or its breaker is open.
    """

    OK = 0
    MISS = 1
    BUSY = 2
    LATE = 3
    CORRUPT = 4
    FAILED = 5
    SKIPPED = 6


OUTCOME_OF = {
    PageStatus.MISS: PageOutcome.MISS,
    PageStatus.BUSY: PageOutcome.BUSY,
    PageStatus.UNKNOWN_NAMESPACE: PageOutcome.MISS,
    PageStatus.LATE: PageOutcome.LATE,
}


@dataclass(frozen=True, slots=True)
class RemoteRead:
    """Reads ``keys[i]`` into ``targets`` row ``i``, from the node ``node_id`` at ``address`` ("host:port").

    ``namespace``: 16 bytes. ``accepted``: kinds of checksum. ``deadline``: ``time.monotonic()`` seconds.
    """

    node_id: NodeId
    epoch: int
    address: str
    namespace: bytes
    keys: Sequence[PageKey]
    targets: PageBuffers
    accepted: frozenset[ChecksumKind]
    deadline: float

    def __post_init__(self) -> None:
        assert len(self.keys) == len(self.targets), (len(self.keys), len(self.targets))


class Pending:
    """A read under way. The memory of its targets must stay until ``wait`` has returned."""

    def __init__(self, read: RemoteRead, abandon: Callable[[Pending], None]) -> None:
        self.read = read
        self.page_bytes = read.targets.payload_bytes
        self.begun = time.monotonic()
        self.asked = 0  # pages requested; the client's thread only, like the next line
        self.first_at, self.first_bytes, self.byte_count = 0.0, 0, 0
        self._abandon = abandon
        self._lock = threading.Lock()
        self._outcomes: list[PageOutcome | None] = [None] * len(read.keys)  # guarded by _lock
        self._left = self._end = len(read.keys)  # guarded by _lock: undecided pages below _end
        self._closed = False  # guarded by _lock
        self._done = threading.Event()

    @property
    def end(self) -> int:
        """Pages from this index on are not wanted."""
        return self._end

    @property
    def done(self) -> bool:
        """True when every wanted page has its outcome."""
        return self._done.is_set()

    def wait(self) -> list[PageOutcome]:
        """Wait until the deadline; the outcome of each page. Nothing is written to the targets afterwards."""
        self._done.wait(max(0.0, self.read.deadline - time.monotonic()))
        with self._lock:  # waits for the end of a copy
            self._closed = True
            undone = self._left > 0
            outcomes = [
                outcome
                if outcome is not None
                else (PageOutcome.LATE if place < self._end else PageOutcome.SKIPPED)
                for place, outcome in enumerate(self._outcomes)
            ]
        if undone:
            self._abandon(self)
        return outcomes

    def deliver(
        self, first: int, pages: PagesHeader, source: Bytes
    ) -> tuple[int, PageOutcome | None]:
        """Verify and copy the pages from ``first`` on. ``source``: laid out as ``PagesHeader`` says.

        Returns the number of OK pages, and the outcome of the next one; None: there is none, or it is not wanted.
        """
        address = int(np.frombuffer(source, np.uint8).ctypes.data)
        stride = stride_of(self.page_bytes)
        targets = self.read.targets.addresses[first : first + len(pages.checksums)].tolist()
        lengths = self.read.targets.lengths.tolist()
        for place, checksum in enumerate(pages.checksums):
            index, start = first + place, address + place * stride
            with self._lock:
                if self._closed or index >= self._end or self._outcomes[index] is not None:
                    return place, None
                if pages.kind not in self.read.accepted:
                    return place, self._decide(index, PageOutcome.MISS)
                if self._checksum(pages.kind, index, start, lengths) != checksum:
                    return place, self._decide(index, PageOutcome.CORRUPT)
                _copy(start, targets[place], lengths)
                self._decide(index, PageOutcome.OK)
        return len(pages.checksums), None

    def _checksum(self, kind: ChecksumKind, index: int, source: int, lengths: list[int]) -> int:
        parts = [(source, self.page_bytes)]
        if kind is ChecksumKind.XXH3_64_SAMPLED:  # samples are taken per buffer
            starts = np.cumsum([source, *lengths[:-1]]).tolist()
            parts = list(zip(starts, lengths, strict=True))
        return page_checksum(kind, self.read.keys[index], parts)

    def arrived(self, byte_count: int, now: float) -> None:
        """Count bytes for the measured rates. The client's thread only."""
        self.byte_count += byte_count
        if not self.first_at:
            self.first_at, self.first_bytes = now, byte_count

    def fail(self, index: int, outcome: PageOutcome) -> None:
        """Set the outcome of a page. Those behind it are not wanted any more."""
        with self._lock:
            if index < self._end and self._outcomes[index] is None:
                self._decide(index, outcome)

    def cut(self, count: int) -> None:
        """Want only the first ``count`` pages."""
        with self._lock:
            self._cut(count)

    def _decide(self, index: int, outcome: PageOutcome) -> PageOutcome:
        self._outcomes[index] = outcome
        self._left -= 1
        if outcome is not PageOutcome.OK:
            self._cut(index + 1)
        elif not self._left:
            self._done.set()
        return outcome

    def _cut(self, end: int) -> None:
        self._end = min(self._end, end)
        self._left = sum(1 for known in self._outcomes[: self._end] if known is None)
        if not self._left:
            self._done.set()


def _copy(source: int, targets: Sequence[int], lengths: Sequence[int]) -> None:
    """Scatter one page to several buffers."""
    for target, length in zip(targets, lengths, strict=True):
        move = _move_holding if length <= _SMALL else ctypes.memmove
        move(target, source, length)
        source += length
