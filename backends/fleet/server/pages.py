"""The page server's side of READ: pages from a source into slabs, from slabs to the reader, in the request's order.

The pages of one turn lie side by side and leave in a few messages, from the slab and without a copy. A slab is reused
only when ZeroMQ has released its frame: earlier, a reader would get other pages' bytes under these checksums.
The pages of an OFFER stay in the slabs under a lease (offers.py).

Threads: the server's loop, but ``PageSource.read`` is called by the disk's thread.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import zmq

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.server.offers import Offers, take_offsets
from flexkv_sglang.backends.fleet.server.queue import Reader, Request, Send, ServeQueue, Turn
from flexkv_sglang.backends.fleet.slabs import StagingSlab
from flexkv_sglang.backends.fleet.transport import RdmaTransport
from flexkv_sglang.backends.fleet.vocabulary import (
    MISSING,
    PageStatus,
    ServedNode,
    ServedPage,
    namespace_name,
)
from flexkv_sglang.backends.fleet.wire import answers, protocol, requests
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.threads import JobPool


class ServePages:
    """Serves the pages of ``node``. Counts into ``counts``.

    ``transport``: may read the slabs. Raises ``RdmaError`` if it does not take them.
    """

    def __init__(
        self,
        share: ShareConfig,
        node: ServedNode,
        disk: JobPool,
        send: Send,
        counts: Counter[str],
        transport: RdmaTransport | None = None,
    ) -> None:
        self._node, self._disk, self._send, self.counts = node, disk, send, counts
        self._slabs = StagingSlab(share.serve_inflight)
        self._queue = ServeQueue(share.serve_inflight, share.serve_inflight_peer)
        self._offers = None
        if transport is not None:
            self._offers = Offers(transport, self._slabs, send, self._release, counts)
        self._leaving: dict[Reader, deque[tuple[zmq.MessageTracker, Request, int, int]]] = {}

    @property
    def reserved_bytes(self) -> int:
        """Slab bytes of accepted pages that have not left yet."""
        return self._queue.reserved

    @property
    def is_sending(self) -> bool:
        """True while ZeroMQ reads from slabs."""
        return bool(self._leaving)

    @property
    def waits_for_memory(self) -> bool:
        """True while pages to be read find no free slab."""
        return bool(self._leaving) and self._queue.peek() is not None

    def reap(self) -> None:
        """Free the slabs whose bytes have left, or whose lease is over. The frames of a connection leave in order."""
        if self._offers is not None:
            self._offers.expire(time.monotonic())
        for reader in list(self._leaving):
            frames = self._leaving[reader]
            while frames and frames[0][0].done:
                _, request, offset, count = frames.popleft()
                self._release(request, offset, count)
            if not frames:
                del self._leaving[reader]

    def _release(self, request: Request, offset: int, count: int = 1) -> None:
        self._slabs.give(offset, count * request.slot_bytes)
        self._queue.give_back(request, count)

    def done(self, reader: Reader, lease: int) -> None:
        """The reader's transport has fetched the pages of this lease."""
        if self._offers is not None:
            self._offers.done(reader, lease)

    def cancel(self, reader: Reader, request_id: int) -> None:
        """The reader does not want this request any more."""
        for request in [r for r in reader.requests if r.read.request_id == request_id]:
            self._drop(request)

    def forget(self, reader: Reader) -> None:
        """The reader is gone. Its leases stay until their time is over: its transport may still read."""
        for request in list(reader.requests):
            self._drop(request)

    def _drop(self, request: Request) -> None:
        self._queue.finish(request)
        for offset in take_offsets(request):
            self._release(request, offset)

    def read(self, reader: Reader, ask: requests.Read, *, is_offer: bool = False) -> None:
        """Answer a READ or an OFFER, as far as limits allow. Raises ``WireError`` without a transport to offer."""
        if is_offer and self._offers is None:
            raise protocol.WireError("no RDMA transport here")
        deadline = time.monotonic() + ask.budget_ms / 1000
        source = self._node.pages_of(namespace_name(ask.namespace))
        request = Request(reader, ask, source, deadline, offered=[] if is_offer else None)
        if source is None:
            self._answer_rest(request, PageStatus.UNKNOWN_NAMESPACE)
            return
        self._queue.accept(request)
        if not request.accepted:
            self._answer_rest(request, PageStatus.BUSY)

    def issue(self) -> None:
        """Give turns to the disk's thread while there is memory for them."""
        now = time.monotonic()
        for request in self._queue.expired(now):
            self._answer_rest(request, PageStatus.LATE)
        while self._disk.has_room and (turn := self._queue.peek()) is not None:
            taken = self._take_slabs(turn)
            if taken is None:
                return
            offset, count = taken
            turn = Turn(turn.request, turn.first, count)
            self._queue.issue(turn)
            self._start_reading(turn, offset)

    def _take_slabs(self, turn: Turn) -> tuple[int, int] | None:
        """(offset, page count) of memory for the first pages of the turn, side by side; None: no slab is free."""
        count = turn.count
        while count:
            offset = self._slabs.take(count * turn.request.slot_bytes)
            if offset is not None:
                return offset, count
            count //= 2
        return None

    def _start_reading(self, turn: Turn, offset: int) -> None:
        request, source = turn.request, turn.request.source
        assert source is not None
        keys = request.read.keys[turn.first : turn.first + turn.count]
        first = self._slabs.address + offset
        addresses = [first + place * request.slot_bytes for place in range(turn.count)]

        def read() -> Callable[[], None]:
            pages = source.read(keys, addresses, request.deadline)
            # the slab of a page without an answer would never be freed
            assert len(pages) == len(keys), (len(pages), len(keys))
            return lambda: self._answer_turn(turn, offset, pages)

        def failed() -> None:
            self._answer_turn(turn, offset, [MISSING] * turn.count)

        self._disk.put(read, failed)

    def _answer_turn(self, turn: Turn, offset: int, pages: Sequence[ServedPage]) -> None:
        """Send the pages that were read, in order."""
        request = turn.request
        late = time.monotonic() > request.deadline
        index = turn.first
        most = max(1, answers.PAGES_BYTES_MAX // request.slot_bytes)
        for status, alike in _runs(pages, most, first_alone=not turn.first):
            if status is PageStatus.OK and not request.over and not late:
                self._send_pages(request, index, alike, offset)
            else:
                self._release(request, offset, len(alike))
                if not request.over and late:
                    self._answer_rest(request, PageStatus.LATE)
                for place in range(len(alike)):
                    if not request.over:
                        self._answer(request, index + place, status)
            index += len(alike)
            offset += len(alike) * request.slot_bytes
        if request.sent == request.accepted and not request.over:
            self._answer_rest(request, PageStatus.BUSY)

    def _send_pages(
        self, request: Request, index: int, pages: Sequence[ServedPage], offset: int
    ) -> None:
        """Send OK pages of one kind of checksum that lie side by side from ``offset`` on."""
        count, length, stride = len(pages), request.page_bytes, request.slot_bytes
        request.sent += count
        if request.offered is not None:
            request.offered += [(page, offset + i * stride) for i, page in enumerate(pages)]
            return
        memory = self._slabs.memory
        if length < stride:  # the gap must not show another page's bytes
            for start in range(offset, offset + count * stride, stride):
                memory[start + length : start + stride] = bytes(stride - length)
        head = answers.PagesHeader(
            request.read.request_id, index, PageStatus.OK, pages[0].kind, length,
            tuple(page.checksum for page in pages),
        )  # fmt: skip
        end = offset + (count - 1) * stride + length
        data = zmq.Frame(memory[offset:end], track=True, copy=False)
        leaving = self._leaving.setdefault(request.reader, deque())
        leaving.append((data.tracker, request, offset, count))
        if self._send(request.reader, [answers.pack_pages(head), data]):
            self.counts["pages_sent"] += count
            self.counts["bytes_sent"] += count * length

    def _answer(self, request: Request, index: int, status: PageStatus) -> None:
        """Answer one page without bytes. It is the last one if the reader wants only a leading run."""
        self._send_status(request, index, status)
        if request.stops_at_first:
            self._end(request)

    def _answer_rest(self, request: Request, status: PageStatus) -> None:
        """Answer all remaining pages with the same status, and end the request."""
        while request.sent < len(request.read.keys) and not request.over:
            self._answer(request, request.sent, status)
        if not request.over:
            self._end(request)

    def _send_status(self, request: Request, index: int, status: PageStatus) -> None:
        head = answers.PagesHeader(
            request.read.request_id, index, status, ChecksumKind.NONE, 0, (0,)
        )
        request.sent += 1
        self.counts[f"pages_{status.name.lower()}"] += 1
        if request.offered is not None:
            request.offered.append((ServedPage(status), 0))
            return
        self._send(request.reader, [answers.pack_pages(head)])

    def _end(self, request: Request) -> None:
        self._queue.finish(request)
        if request.offered is not None:
            assert self._offers is not None
            self._offers.send(request)
        else:
            self._send(request.reader, answers.pack_end(request.read.request_id, request.sent))


def _runs(
    pages: Sequence[ServedPage], most: int, *, first_alone: bool
) -> Iterator[tuple[PageStatus, Sequence[ServedPage]]]:
    """Yield runs of at most ``most`` adjacent pages with one status and kind of checksum.

    ``first_alone``: the first page is a run of its own, because the reader measures the rate from there on.
    """
    if first_alone:
        yield pages[0].status, pages[:1]
    for (status, _), group in groupby(pages[first_alone:], key=lambda p: (p.status, p.kind)):
        alike = list(group)
        for start in range(0, len(alike), most):
            yield status, alike[start : start + most]
