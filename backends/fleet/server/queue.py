"""Who is served next, and who is told BUSY: the page server's requests, without sockets or threads.

A page of an accepted request is *held* from its acceptance until ZeroMQ has let go of its bytes. What would
go beyond the limits on held bytes (per reader, and in total: the slabs), or a reader's queue, is not accepted: BUSY
at once, nothing waits without a bound. Readers take turns, a few pages at a time.

Threads: one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from flexkv_sglang.backends.fleet.vocabulary import PageSource, ServedPage
from flexkv_sglang.backends.fleet.wire import protocol, requests

QUEUE_MAX = 32
"""Requests of one reader that are not answered yet."""

TURN_BYTES, TURN_PAGES = 2 << 20, 32
"""Of one request, then it is another reader's turn."""


@dataclass(eq=False, slots=True)
class Reader:
    """One connection. ``welcomed``: it has shown who it is. ``held``: bytes."""

    routing: bytes
    hello: requests.Hello | None = None
    challenge: bytes | None = None
    welcomed: bool = False
    gone: bool = False
    held: int = 0
    requests: deque[Request] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class Request:
    """One READ. Pages ``[0, accepted)`` are held until given back; ``issued`` of them went to the disk so far.

    ``sent``: answers so far. ``over``: nothing more is answered. ``offered``: of an OFFER, its pages that were
    read so far and the offsets of those that are OK; None for a READ.
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
        """Bytes of a page."""
        return self.source.payload_bytes if self.source else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes that a page takes in the slabs."""
        return protocol.stride_of(self.page_bytes)

    @property
    def stops_at_first(self) -> bool:
        """Is the first page that is not OK the last one answered?"""
        return bool(self.read.flags & requests.STOP_AT_FIRST)


@dataclass(frozen=True, slots=True)
class Turn:
    """Pages ``[first, first + count)`` of a request, to be read next."""

    request: Request
    first: int
    count: int


class ServeQueue:
    """Limits in bytes. ``held``: of all readers."""

    def __init__(self, limit: int, limit_per_reader: int) -> None:
        self._limit, self._limit_per_reader = limit, limit_per_reader
        self._turns: deque[Reader] = deque()  # readers with pages that are not issued, each once
        self.held = 0

    def accept(self, request: Request) -> None:
        """Take as many of its first pages as the limits allow."""
        reader, wanted = request.reader, len(request.read.keys)
        if len(reader.requests) >= QUEUE_MAX:
            return
        slot_bytes = request.slot_bytes
        free = self._limit - self.held
        pages = min(self._limit_per_reader - reader.held, free) // slot_bytes
        if pages <= 0 and not reader.held and slot_bytes <= free:
            pages = 1  # a page larger than a reader's share
        request.accepted = max(0, min(wanted, pages))
        if request.accepted:
            reader.held += request.accepted * slot_bytes
            self.held += request.accepted * slot_bytes
            reader.requests.append(request)
            if reader not in self._turns:
                self._turns.append(reader)

    def give_back(self, request: Request, pages: int) -> None:
        """``pages`` of its pages are held no more."""
        request.reader.held -= pages * request.slot_bytes
        self.held -= pages * request.slot_bytes
        assert request.reader.held >= 0 <= self.held, (request.reader.held, self.held)

    def peek(self) -> Turn | None:
        """Whose turn it is, and which pages; None: nothing is waiting."""
        while self._turns:
            for request in self._turns[0].requests:
                left = request.accepted - request.issued
                if left and not request.over:
                    most = max(1, min(TURN_PAGES, TURN_BYTES // request.slot_bytes))
                    return Turn(request, request.issued, min(left, most))
            self._turns.popleft()
        return None

    def issue(self, turn: Turn) -> None:
        """These pages are being read; the next reader's turn."""
        turn.request.issued += turn.count
        self._turns.rotate(-1)

    def finish(self, request: Request) -> None:
        """Nothing more is answered; pages that were never issued are held no more."""
        if not request.over:
            request.over = True
            self.give_back(request, request.accepted - request.issued)
            if request in request.reader.requests:
                request.reader.requests.remove(request)

    def expired(self, now: float) -> list[Request]:
        """Waiting requests whose budget is over."""
        return [
            request
            for reader in self._turns
            for request in reader.requests
            if request.deadline <= now and request.issued < request.accepted
        ]
