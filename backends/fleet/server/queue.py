"""The page server's queue of requests: limits, and turns between readers. No sockets, no threads.

Memory for a page is *reserved* from the acceptance of its request until ZeroMQ has released its bytes. Pages beyond the
limits on reserved bytes (per reader, and in total: the slabs), or beyond a reader's queue, are answered BUSY at once:
nothing waits without a bound. Readers take turns, a few pages at a time.

Threads: one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from flexkv_sglang.backends.fleet.vocabulary import PageSource, ServedPage
from flexkv_sglang.backends.fleet.wire import protocol, requests

QUEUE_MAX = 32
"""Unanswered requests of one reader, at most."""

TURN_BYTES, TURN_PAGES = 2 << 20, 32
"""Read of one request before another reader's turn."""


@dataclass(eq=False, slots=True)
class Reader:
    """One connection. ``welcomed``: it has authenticated itself. ``reserved``: bytes."""

    routing: bytes
    hello: requests.Hello | None = None
    challenge: bytes | None = None
    welcomed: bool = False
    gone: bool = False
    reserved: int = 0
    requests: deque[Request] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class Request:
    """One READ or OFFER. Memory is reserved for pages ``[0, accepted)``; ``issued`` of them went to the disk so far.

    ``sent``: answers so far. ``over``: it gets no more answers. ``offered``: (page, slab offset) of the pages of an
    OFFER that were read so far; None for a READ.
    """

    reader: Reader
    read: requests.Read
    source: PageSource | None
    deadline: float
    accepted: int = 0
    issued: int = 0
    sent: int = 0
    over: bool = False
    offered: list[tuple[ServedPage, int]] | None = None

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.source.payload_bytes if self.source else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes that a page takes in the slabs."""
        return protocol.stride_of(self.page_bytes)

    @property
    def stops_at_first(self) -> bool:
        """True if the first page that is not OK is the last one answered."""
        return bool(self.read.flags & requests.STOP_AT_FIRST)


Send = Callable[[Reader, Sequence[bytes | zmq.Frame]], bool]
"""Sends frames. False: the reader is gone, and its requests are over."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Pages ``[first, first + count)`` of a request, to be read next."""

    request: Request
    first: int
    count: int


class ServeQueue:
    """Limits in bytes. ``reserved``: bytes, of all readers."""

    def __init__(self, limit: int, limit_per_reader: int) -> None:
        self._limit, self._limit_per_reader = limit, limit_per_reader
        self._turns: deque[Reader] = deque()  # readers with pages that are not issued, each once
        self.reserved = 0

    def accept(self, request: Request) -> None:
        """Accept as many of its first pages as the limits allow."""
        reader, wanted = request.reader, len(request.read.keys)
        if len(reader.requests) >= QUEUE_MAX:
            return
        slot_bytes = request.slot_bytes
        free = self._limit - self.reserved
        pages = min(self._limit_per_reader - reader.reserved, free) // slot_bytes
        if pages <= 0 and not reader.reserved and slot_bytes <= free:
            pages = 1  # one page that is larger than a reader's share
        request.accepted = max(0, min(wanted, pages))
        if request.accepted:
            reader.reserved += request.accepted * slot_bytes
            self.reserved += request.accepted * slot_bytes
            reader.requests.append(request)
            if reader not in self._turns:
                self._turns.append(reader)

    def give_back(self, request: Request, pages: int) -> None:
        """Free the reservation of ``pages`` of its pages."""
        request.reader.reserved -= pages * request.slot_bytes
        self.reserved -= pages * request.slot_bytes
        assert request.reader.reserved >= 0 <= self.reserved, (
            request.reader.reserved,
            self.reserved,
        )

    def peek(self) -> Turn | None:
        """The pages to read next; None: no request waits."""
        while self._turns:
            for request in self._turns[0].requests:
                left = request.accepted - request.issued
                if left and not request.over:
                    most = max(1, min(TURN_PAGES, TURN_BYTES // request.slot_bytes))
                    return Turn(request, request.issued, min(left, most))
            self._turns.popleft()
        return None

    def issue(self, turn: Turn) -> None:
        """Note that these pages are being read. The turn goes to the next reader."""
        turn.request.issued += turn.count
        self._turns.rotate(-1)

    def finish(self, request: Request) -> None:
        """End the request. The reservation of pages that were never issued is freed."""
        if not request.over:
            request.over = True
            self.give_back(request, request.accepted - request.issued)
            if request in request.reader.requests:
                request.reader.requests.remove(request)

    def expired(self, now: float) -> list[Request]:
        """Requests that still wait after their deadline."""
        return [
            request
            for reader in self._turns
            for request in reader.requests
            if request.deadline <= now and request.issued < request.accepted
        ]
