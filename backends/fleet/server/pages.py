"""The page server's side of READ and OFFER: pages from a source into slabs, from slabs to the reader.

What is read in one turn lies side by side and goes out in a few messages, from the slab and without a copy. The slab
is used again only when ZeroMQ has let go of it: earlier, a reader would get other pages' bytes under these checksums.
Answers of a request go out in its order.
An OFFER's pages stay in the slabs, where the reader's engine fetches them, until DONE or the end of their hold.

Threads: the server's loop, but for ``PageSource.read``, which the disk's thread calls.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.rdma.base import OneSidedEngine
from flexkv_sglang.backends.fleet.server.holds import Hold, ServeHolds
from flexkv_sglang.backends.fleet.server.queue import Reader, Request, ServeQueue, Turn
from flexkv_sglang.backends.fleet.slabs import ServeSlabs
from flexkv_sglang.backends.fleet.vocabulary import (
    MISSING,
    PageSource,
    PageStatus,
    ServedPage,
    ShareConfig,
    namespace_name,
)
from flexkv_sglang.backends.fleet.wire import answers, protocol, requests
from flexkv_sglang.threads import JobPool

if TYPE_CHECKING:
    import zmq

Send = Callable[[Reader, "Sequence[bytes | zmq.Frame]"], bool]
"""Sends frames; False: the reader is gone, and its requests are over."""


class ServePages:
    """``sources``: namespace -> its pages here, or None. Counts into ``counts``. ``engine``: may read the slabs.

    Raises ``EngineError`` if it does not take them.
    """

    def __init__(
        self,
        share: ShareConfig,
        sources: Callable[[str], PageSource | None],
        disk: JobPool,
        send: Send,
        counts: Counter[str],
        engine: OneSidedEngine | None = None,
    ) -> None:
        self._sources, self._disk, self._send, self.counts = sources, disk, send, counts
        self._slabs = ServeSlabs(share.serve_inflight)
        self._queue = ServeQueue(share.serve_inflight, share.serve_inflight_peer)
        self._holds = ServeHolds()
        self._blob = b""
        if engine is not None:
            engine.register(self._slabs.address, self._slabs.byte_count)
            self._blob = engine.blob()
        self._leaving: dict[Reader, deque[tuple[zmq.MessageTracker, Request, int, int]]] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of accepted pages that have not left yet."""
        return self._queue.held

    @property
    def are_leaving(self) -> bool:
        """Are there slabs that ZeroMQ still reads?"""
        return bool(self._leaving)

    @property
    def wait_for_memory(self) -> bool:
        """Are there pages to be read that have no slab yet?"""
        return bool(self._leaving) and self._queue.peek() is not None

    def reap(self) -> None:
        """Slabs whose bytes have left are free again. The frames of a connection leave in order."""
        for hold in self._holds.ended(time.monotonic()):
            self.counts["holds_expired"] += 1
            self._end_hold(hold)
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

    def _end_hold(self, hold: Hold) -> None:
        for offset in hold.offsets:
            self._release(hold.request, offset)

    def done(self, reader: Reader, number: int) -> None:
        """The reader's engine has fetched what this hold is of."""
        hold = self._holds.done(reader, number)
        if hold is not None:
            self._end_hold(hold)

    def cancel(self, reader: Reader, request_id: int) -> None:
        """The reader gave this request up."""
        for request in [r for r in reader.requests if r.read.request_id == request_id]:
            self._drop(request)

    def forget(self, reader: Reader) -> None:
        """The reader is gone. What is held for it stays until its time is over: its engine may be at it."""
        for request in list(reader.requests):
            self._drop(request)

    def _drop(self, request: Request) -> None:
        self._queue.finish(request)
        for _, offset in self._landed_pages(request):
            self._release(request, offset)

    def _landed_pages(self, request: Request) -> list[tuple[ServedPage, int]]:
        """Take the pages of an OFFER that lie in slabs and that nobody was told of."""
        landed, request.offered = request.offered or [], None
        return [(page, offset) for page, offset in landed if page.status is PageStatus.OK]

    def read(self, reader: Reader, ask: requests.Read) -> None:
        self._take(Request(reader, ask, *self._terms(ask)))

    def offer(self, reader: Reader, ask: requests.Read) -> None:
        if not self._blob:
            raise protocol.WireError("no engine here")
        self._take(Request(reader, ask, *self._terms(ask), offered=[]))

    def _terms(self, ask: requests.Read) -> tuple[PageSource | None, float]:
        deadline = time.monotonic() + ask.budget_ms / 1000
        return self._sources(namespace_name(ask.namespace)), deadline

    def _take(self, request: Request) -> None:
        if request.source is None:
            self._answer_rest(request, PageStatus.UNKNOWN_NAMESPACE)
            return
        self._queue.accept(request)
        if not request.accepted:
            self._answer_rest(request, PageStatus.BUSY)

    def issue(self) -> None:
        """Hand turns to the disk's thread while there is memory for them."""
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
        """Memory for the first pages of the turn, side by side: its offset, and for how many."""
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
            # what is not answered for would never be given back
            assert len(pages) == len(keys), (len(pages), len(keys))
            return lambda: self._landed(turn, offset, pages)

        def failed() -> None:
            self._landed(turn, offset, [MISSING] * turn.count)

        self._disk.put(read, failed)

    def _landed(self, turn: Turn, offset: int, pages: Sequence[ServedPage]) -> None:
        """Send what was read, in order."""
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
        """OK pages of one kind of checksum that lie side by side from ``offset`` on."""
        import zmq

        count, length, stride = len(pages), request.page_bytes, request.slot_bytes
        request.sent += count
        if request.offered is not None:
            request.offered += [(page, offset + i * stride) for i, page in enumerate(pages)]
            return
        memory = self._slabs.memory
        if length < stride:  # not what another page has left there
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
        """A page without bytes; the last one if the reader wants only a leading run."""
        self._send_status(request, index, status)
        if request.stops_at_first:
            self._end(request)

    def _answer_rest(self, request: Request, status: PageStatus) -> None:
        """The same status for all pages not answered yet, and the end."""
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
            self._send_offered(request, request.offered)
            return
        self._send(request.reader, answers.pack_end(request.read.request_id, request.sent))

    def _send_offered(self, request: Request, offered: list[tuple[ServedPage, int]]) -> None:
        """Tell the reader where its pages lie, and keep them there."""
        offsets = [offset for _, offset in self._landed_pages(request)]
        hold = self._holds.hold(request, offsets, time.monotonic()) if offsets else 0
        pages = tuple(self._told(request, page, offset) for page, offset in offered)
        told = answers.Offered(
            request.read.request_id, hold, self._holds.hold_ms, pages, self._blob
        )
        if self._send(request.reader, answers.pack_offered(told)):
            self.counts["pages_offered"] += len(offsets)
            self.counts["bytes_offered"] += len(offsets) * request.page_bytes
        else:
            self.done(request.reader, hold)

    def _told(self, request: Request, page: ServedPage, offset: int) -> answers.OfferedPage:
        if page.status is not PageStatus.OK:
            return answers.OfferedPage(page.status, ChecksumKind.NONE, 0, 0, 0)
        address = self._slabs.address + offset
        return answers.OfferedPage(
            page.status, page.kind, request.page_bytes, page.checksum, address
        )


def _runs(
    pages: Sequence[ServedPage], most: int, *, first_alone: bool
) -> Iterator[tuple[PageStatus, Sequence[ServedPage]]]:
    """Pages side by side with the same status and kind of checksum, at most so many.

    ``first_alone``: the first page by itself, as the reader measures the rate from there on.
    """
    if first_alone:
        yield pages[0].status, pages[:1]
    for (status, _), group in groupby(pages[first_alone:], key=lambda p: (p.status, p.kind)):
        alike = list(group)
        for start in range(0, len(alike), most):
            yield status, alike[start : start + most]
