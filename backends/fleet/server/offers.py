"""The page server's side of OFFER: pages stay in the slabs under a *lease* for the reader's RDMA transport.

A lease ends with DONE, or when its time is over; its memory is not reused before. A reader that fetches later gets
other bytes, but it has given up by then (its deadline is half a lease, counted from before it asked), and their
checksum would be wrong.

Threads: the server's loop.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.server.queue import Reader, Request, Send
from flexkv_sglang.backends.fleet.slabs import StagingSlab
from flexkv_sglang.backends.fleet.transport import RdmaTransport
from flexkv_sglang.backends.fleet.vocabulary import PageStatus, ServedPage
from flexkv_sglang.backends.fleet.wire import answers

LEASE_MS = 5000


@dataclass(frozen=True, slots=True)
class Lease:
    """``offsets``: of the request's pages in the slabs. ``until``: ``time.monotonic()`` seconds."""

    request: Request
    offsets: list[int]
    until: float


class Offers:
    """Leases pages of ``slabs`` to readers of ``transport``. ``release``: frees the page of a request at an offset.

    Raises ``RdmaError`` if the transport does not take the slabs.
    """

    def __init__(
        self,
        transport: RdmaTransport,
        slabs: StagingSlab,
        send: Send,
        release: Callable[[Request, int], None],
        counts: Counter[str],
    ) -> None:
        transport.register(slabs.address, slabs.byte_count)
        self._blob = transport.blob()
        self._slabs, self._send, self._release, self._counts = slabs, send, release, counts
        self._lease_ms = LEASE_MS
        self._ids = itertools.count(1)
        self._leases: OrderedDict[int, Lease] = OrderedDict()  # the oldest first, which ends first

    def send(self, request: Request) -> None:
        """Lease the pages of a finished OFFER, and tell the reader where they are."""
        offered = request.offered or []
        offsets = take_offsets(request)
        lease = 0
        if offsets:
            lease = next(self._ids)
            until = time.monotonic() + self._lease_ms / 1000
            self._leases[lease] = Lease(request, offsets, until)
        pages = tuple(self._page(request, page, offset) for page, offset in offered)
        request_id = request.read.request_id
        message = answers.Offered(request_id, lease, self._lease_ms, pages, self._blob)
        if self._send(request.reader, answers.pack_offered(message)):
            self._counts["pages_offered"] += len(offsets)
            self._counts["bytes_offered"] += len(offsets) * request.page_bytes
        else:
            self.done(request.reader, lease)

    def _page(self, request: Request, page: ServedPage, offset: int) -> answers.OfferedPage:
        if page.status is not PageStatus.OK:
            return answers.OfferedPage(page.status, ChecksumKind.NONE, 0, 0, 0)
        address = self._slabs.address + offset
        return answers.OfferedPage(
            page.status, page.kind, request.page_bytes, page.checksum, address
        )

    def done(self, reader: Reader, number: int) -> None:
        """End a lease of this reader. Unknown numbers, and other readers' leases, are ignored."""
        lease = self._leases.get(number)
        if lease is not None and lease.request.reader is reader:
            self._end(number)

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for number in [number for number, lease in self._leases.items() if lease.until <= now]:
            self._counts["holds_expired"] += 1
            self._end(number)

    def _end(self, number: int) -> None:
        lease = self._leases.pop(number)
        for offset in lease.offsets:
            self._release(lease.request, offset)


def take_offsets(request: Request) -> list[int]:
    """Remove the pages of an OFFER from its request; the slab offsets of those that are OK."""
    offered, request.offered = request.offered or [], None
    return [offset for page, offset in offered if page.status is PageStatus.OK]
