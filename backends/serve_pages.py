"""The page server's side of READ: pages from a source into slabs, from slabs to the reader.

A page's bytes are sent from the slab without a copy, and the slab is used again only when ZeroMQ has let go of it:
earlier, a reader would get another page's bytes under this page's checksum. Answers of a request go out in its order.

Threads: the server's loop, but for ``PageSource.read``, which the disk's thread calls.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flexkv_sglang.backends import wire
from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet import (
    MISSING,
    PageSource,
    PageStatus,
    ServedPage,
    ShareConfig,
    namespace_name,
)
from flexkv_sglang.backends.serve_queue import Reader, Request, ServeQueue, Turn
from flexkv_sglang.backends.serve_slabs import ServeSlabs
from flexkv_sglang.backends.serve_worker import ServeWorker

if TYPE_CHECKING:
    import zmq

Send = Callable[[Reader, "Sequence[bytes | zmq.Frame]"], bool]
"""Sends frames; False: the reader is gone, and its requests are over."""


class ServePages:
    """``sources``: namespace -> its pages here, or None. Counts into ``counts``."""

    def __init__(
        self,
        share: ShareConfig,
        sources: Callable[[str], PageSource | None],
        disk: ServeWorker,
        send: Send,
        counts: Counter[str],
    ) -> None:
        self._sources, self._disk, self._send, self.counts = sources, disk, send, counts
        self._slabs = ServeSlabs(share.serve_inflight)
        self._queue = ServeQueue(share.serve_inflight, share.serve_inflight_peer)
        self._leaving: dict[Reader, deque[tuple[zmq.MessageTracker, Request, int]]] = {}

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
        for reader in list(self._leaving):
            frames = self._leaving[reader]
            while frames and frames[0][0].done:
                _, request, offset = frames.popleft()
                self._release(request, offset)
            if not frames:
                del self._leaving[reader]

    def _release(self, request: Request, offset: int) -> None:
        self._slabs.give(offset, request.slot_bytes)
        self._queue.give_back(request, 1)

    def cancel(self, reader: Reader, rid: int) -> None:
        """The reader gave this request up."""
        for request in [r for r in reader.requests if r.read.rid == rid]:
            self._queue.finish(request)

    def forget(self, reader: Reader) -> None:
        """The reader is gone."""
        for request in list(reader.requests):
            self._queue.finish(request)

    def read(self, reader: Reader, ask: wire.Read) -> None:
        deadline = time.monotonic() + ask.budget_ms / 1000
        source = self._sources(namespace_name(ask.namespace))
        request = Request(reader, ask, source, deadline)
        if source is None:
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
            offsets = self._take_slabs(turn)
            if not offsets:
                return
            turn = Turn(turn.request, turn.first, len(offsets))
            self._queue.issue(turn)
            self._start_reading(turn, offsets)

    def _take_slabs(self, turn: Turn) -> list[int]:
        """Offsets of as many pages of the turn as there is memory for."""
        offsets: list[int] = []
        for _ in range(turn.count):
            offset = self._slabs.take(turn.request.slot_bytes)
            if offset is None:
                break
            offsets.append(offset)
        return offsets

    def _start_reading(self, turn: Turn, offsets: list[int]) -> None:
        request, source = turn.request, turn.request.source
        assert source is not None
        keys = request.read.keys[turn.first : turn.first + turn.count]
        addresses = [self._slabs.address + offset for offset in offsets]

        def read() -> Callable[[], None]:
            pages = source.read(keys, addresses, request.deadline)
            return lambda: self._landed(turn, offsets, pages)

        def failed() -> None:
            self._landed(turn, offsets, [MISSING] * turn.count)

        self._disk.put(read, failed)

    def _landed(self, turn: Turn, offsets: list[int], pages: Sequence[ServedPage]) -> None:
        """Send what was read, in order."""
        request = turn.request
        late = time.monotonic() > request.deadline
        for place, (offset, page) in enumerate(zip(offsets, pages, strict=True)):
            if request.over:
                self._release(request, offset)
            elif late:
                self._release(request, offset)
                self._answer_rest(request, PageStatus.LATE)
            elif page.status is PageStatus.OK:
                self._send_page(request, turn.first + place, page, offset)
            else:
                self._release(request, offset)
                self._answer(request, turn.first + place, page.status)
        if request.sent == request.accepted and not request.over:
            self._answer_rest(request, PageStatus.BUSY)

    def _send_page(self, request: Request, index: int, page: ServedPage, offset: int) -> None:
        import zmq

        length = request.page_bytes
        head = wire.Page(
            request.read.rid, index, PageStatus.OK, page.kind, length, page.checksum
        )  # fmt: skip
        data = zmq.Frame(self._slabs.memory[offset : offset + length], track=True, copy=False)
        request.sent += 1
        self._leaving.setdefault(request.reader, deque()).append((data.tracker, request, offset))
        if self._send(request.reader, [wire.pack_page(head), data]):
            self.counts["pages_sent"] += 1
            self.counts["bytes_sent"] += length

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
        head = wire.Page(request.read.rid, index, status, ChecksumKind.NONE, 0, 0)
        request.sent += 1
        self.counts[f"pages_{status.name.lower()}"] += 1
        self._send(request.reader, [wire.pack_page(head)])

    def _end(self, request: Request) -> None:
        self._queue.finish(request)
        self._send(request.reader, wire.pack_end(request.read.rid, request.sent))
