"""One process's traffic with one peer: links, waiting reads, outstanding requests.

A read is cut into requests of 8 MiB (at least a page), two of which are outstanding at a time. That keeps the link full
and bounds the bytes on their way to a reader: 16 MiB, or two pages. Reads take turns.

Threads: the client's.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexkv_sglang.backends.fleet.reader.health import REFUSED_S, PeerHealth
from flexkv_sglang.backends.fleet.reader.read import OUTCOME_OF, PageOutcome, Pending
from flexkv_sglang.backends.fleet.vocabulary import BATCH_PAGES, PageStatus
from flexkv_sglang.backends.fleet.wire import answers, requests
from flexkv_sglang.backends.fleet.wire.link import Link, LinkState
from flexkv_sglang.backends.fleet.wire.protocol import Bytes
from flexkv_sglang.errors import PeerError

if TYPE_CHECKING:
    import zmq

REQUEST_BYTES = 8 << 20
OUTSTANDING = 2
LINKS = 1
"""Connections to a peer. With two cores a second one is slower; on a link of 25 Gbit/s it is untested."""

GREETING_S = 1.0
RECEIVE_MAX = 4
"""Messages of one link before another link's turn."""

Count = Callable[[str, int], None]


@dataclass(eq=False, slots=True)
class Out:
    """An outstanding request: pages ``[first, first + count)`` of ``pending``, ``got`` of them answered."""

    pending: Pending
    link: Link
    first: int
    count: int
    got: int = 0


class PeerChannel:
    """``open_link``: opens a link to an address for pages of a size in bytes, or raises ``PeerError``.

    ``count``: for metrics.
    """

    def __init__(
        self, health: PeerHealth, open_link: Callable[[str, int], Link], count: Count
    ) -> None:
        self.health = health
        self._open_link, self._count = open_link, count
        self._request_ids = itertools.count(1)
        self._waiting: deque[Pending] = deque()  # reads with pages that are not requested yet
        self._out: dict[int, Out] = {}
        self._page_bytes = 0
        self._probe_until = 0.0
        self.links: list[Link] = []
        self.used_at = self.heard_at = time.monotonic()

    @property
    def idle(self) -> bool:
        """True without reads, requests and greeting."""
        return not self._waiting and not self._out and not self._probe_until

    def begin(self, pending: Pending) -> None:
        """Read these pages."""
        if not pending.done:
            self._waiting.append(pending)
            self.pump()

    def pump(self) -> None:
        """Send the requests that may be sent now; open missing links."""
        self.used_at = time.monotonic()
        self._waiting = deque(p for p in self._waiting if not p.done and p.asked < p.end)
        if not self._waiting:
            return
        self._page_bytes = max(self._page_bytes, *(p.page_bytes for p in self._waiting))
        self._open_links()
        while self._waiting and len(self._out) < OUTSTANDING:
            free = [link for link in self.links if link.state is LinkState.READY]
            if not free:
                return
            loads = [sum(out.link is link for out in self._out.values()) for link in free]
            least = loads.index(min(loads))
            if loads[least] >= -(-OUTSTANDING // LINKS) < len(self.links):
                return  # the other links are still opening
            self._request(free[least])

    def _open_links(self) -> None:
        fits = all(link.page_bytes >= self._page_bytes for link in self.links)
        if not fits and not self._out:
            self.close_links()
        while len(self.links) < LINKS and self._connect():
            continue

    def _connect(self) -> bool:
        """Open a link. False: this process cannot, out of descriptors perhaps, and the breaker is open."""
        try:
            self.links.append(self._open_link(self.health.address, self._page_bytes))
        except PeerError as exc:
            self._trip(str(exc))
            return False
        return True

    def _request(self, link: Link) -> None:
        pending = self._waiting.popleft()
        most = REQUEST_BYTES
        if link.welcome is not None:
            most = min(most, link.welcome.request_bytes // OUTSTANDING)
        most_pages = max(1, min(BATCH_PAGES, most // pending.page_bytes))
        first, count = pending.asked, min(most_pages, pending.end - pending.asked)
        pending.asked += count
        if pending.asked < pending.end:
            self._waiting.append(pending)
        self._ask(link, pending, first, count)

    def _ask(self, link: Link, pending: Pending, first: int, count: int) -> None:
        request_id = next(self._request_ids)
        budget_ms = max(1, int((pending.read.deadline - time.monotonic()) * 1000))
        keys = tuple(pending.read.keys[first : first + count])
        read = requests.Read(
            request_id, pending.read.namespace, budget_ms, requests.STOP_AT_FIRST, keys
        )
        self._out[request_id] = Out(pending, link, first, count)
        link.send(self._pack(read))

    def _pack(self, read: requests.Read) -> list[bytes]:
        """The request on the wire."""
        return requests.pack_read(read)

    def receive(self, link: Link) -> None:
        """Process the messages of a link, and check that it is alive."""
        before = link.state
        for _ in range(RECEIVE_MAX):
            answer = link.receive()
            if answer is None:
                link.watch()  # only after the last message: a peer may disconnect behind it
                break
            self.heard_at = time.monotonic()
            self._take(link, *answer)
        if link.state is LinkState.READY and before is LinkState.OPENING:
            self.heard_at = time.monotonic()
            if self._probe_until:
                self._probe_until = 0.0
                self.health.recovered()
        if not link.alive:
            self.lost(link)

    def _take(self, link: Link, answer: answers.Answer, frame: zmq.Frame | None) -> None:
        if not isinstance(answer, answers.PagesHeader | answers.End):
            link.fail(f"wire: {type(answer).__name__} was not asked for")
            return
        out = self._out.get(answer.request_id)
        if out is None:
            return  # its read has been abandoned
        if isinstance(answer, answers.End):
            self._take_end(link, answer, out)
        elif (
            answer.index != out.got
            or out.got + len(answer.checksums) > out.count
            or out.link is not link
        ):
            link.fail(f"wire: page {answer.index} out of order")
        else:
            out.got += len(answer.checksums)
            self._take_pages(link, answer, out, frame)

    def _take_pages(
        self, link: Link, pages: answers.PagesHeader, out: Out, frame: zmq.Frame | None
    ) -> None:
        place = out.first + pages.index
        if pages.status is not PageStatus.OK or frame is None:
            if pages.status is PageStatus.BUSY:
                self.health.busy()
            out.pending.fail(place, OUTCOME_OF[pages.status])
            self._cancel_unwanted(out.pending)
            return
        if pages.length != out.pending.page_bytes:
            out.pending.fail(place, PageOutcome.FAILED)
            link.fail(f"wire: pages of {pages.length} bytes, not {out.pending.page_bytes}")
            return
        self._deliver(link, pages, out, frame.buffer)
        out.pending.arrived(len(pages.checksums) * pages.length, self.heard_at)
        self._cancel_unwanted(out.pending)

    def _deliver(self, link: Link, pages: answers.PagesHeader, out: Out, data: Bytes) -> None:
        place = out.first + pages.index
        delivered, failure = out.pending.deliver(place, pages, data)
        if delivered:
            self._count("remote_read_bytes", delivered * pages.length)
        if failure is PageOutcome.CORRUPT:
            key = out.pending.read.keys[place + delivered]
            link.send(requests.pack_report_corrupt(out.pending.read.namespace, [key]))
            if self.health.corrupt():
                self._count("remote_breaker_trips", 1)

    def _cancel_unwanted(self, pending: Pending) -> None:
        """Cancel the requests for pages behind one that failed."""
        for request_id in self._requests_of(pending):
            if self._out[request_id].first >= pending.end:
                self._cancel(request_id)

    def _requests_of(self, pending: Pending) -> list[int]:
        return [request_id for request_id, out in self._out.items() if out.pending is pending]

    def _cancel(self, request_id: int) -> None:
        """Remove a request, and tell the peer."""
        self._remove(request_id).link.send(requests.pack_cancel(request_id))

    def _remove(self, request_id: int) -> Out:
        """End a request."""
        return self._out.pop(request_id)

    def _take_end(self, link: Link, end: answers.End, out: Out) -> None:
        del self._out[end.request_id]
        if end.sent != out.got:
            link.fail(f"wire: {out.got} pages came, {end.sent} were sent")
            self._failed(out, PageOutcome.FAILED)
            return
        if out.got < out.count:  # an earlier page failed, or the rest is not wanted
            out.pending.fail(out.first + out.got, PageOutcome.FAILED)
        self._served(out)

    def _served(self, out: Out) -> None:
        """A request was answered completely."""
        if out.got:
            self.health.delivered()
        if all(other.pending is not out.pending for other in self._out.values()):
            self._measure(out.pending)
        self.pump()

    def _measure(self, pending: Pending) -> None:
        if pending.byte_count > pending.first_bytes:
            self.health.measured(
                pending.byte_count - pending.first_bytes,
                self.heard_at - pending.first_at,
                pending.first_at - pending.begun,
            )

    def _failed(self, out: Out, outcome: PageOutcome) -> None:
        out.pending.fail(out.first + out.got, outcome)

    def lost(self, link: Link) -> None:
        """A link is dead: its requests fail, and the breaker opens if a read or greeting waited for it."""
        if link not in self.links:
            return
        self.links.remove(link)
        link.close()
        victims = [request_id for request_id, out in self._out.items() if out.link is link]
        wanted = bool(victims or self._waiting or self._probe_until)
        for request_id in victims:
            self._failed(self._remove(request_id), PageOutcome.FAILED)
        if wanted and not link.reason.endswith("NO_HELLO"):
            self._trip(link.reason, REFUSED_S if link.state is LinkState.REFUSED else None)

    def _trip(self, reason: str, pause_s: float | None = None) -> None:
        """Open the breaker: all reads of this peer fail."""
        self._probe_until = 0.0
        self.health.failed(reason, pause_s)
        self._count("remote_breaker_trips", 1)
        self.fail_all(PageOutcome.FAILED)
        self.close_links()

    def fail_all(self, outcome: PageOutcome) -> None:
        """Fail all reads."""
        for request_id in list(self._out):
            self._failed(self._remove(request_id), outcome)
        for pending in self._waiting:
            pending.fail(pending.asked, outcome)
        self._waiting.clear()

    def renew(self) -> None:
        """The peer has a new epoch or address."""
        self.fail_all(PageOutcome.FAILED)
        self.close_links()

    def abandon(self, pending: Pending) -> None:
        """Its deadline is over. Late answers must not delay later ones, nor a silent peer later reads."""
        request_ids = self._requests_of(pending)
        links = {self._out[request_id].link for request_id in request_ids}
        waited = bool(request_ids) or pending in self._waiting
        for request_id in request_ids:
            self._cancel(request_id)
        if pending in self._waiting:
            self._waiting.remove(pending)
        if not waited:
            return
        now = time.monotonic()
        if now - max(self.heard_at, pending.begun) >= (now - pending.begun) / 2:
            self._trip("silent until the deadline")
            return
        self._measure(pending)
        for link in links - {out.link for out in self._out.values()}:
            self.links.remove(link)
            link.close()
        self.pump()

    def tick(self, now: float) -> None:
        """Abandon late reads, and greet a peer whose breaker is open."""
        for link in [link for link in self.links if not link.alive]:
            self.lost(link)
        reads = {*self._waiting, *(out.pending for out in self._out.values())}
        for pending in [p for p in reads if p.read.deadline <= now]:
            self.abandon(pending)
        if self._probe_until and now >= self._probe_until:
            self._trip("no greeting")
        elif not self._probe_until and self.health.probe_due():
            self.close_links()
            self._probe_until = now + GREETING_S
            self._connect()

    def next_tick(self) -> float:
        """Time of the next ``tick`` (``time.monotonic()`` seconds)."""
        times = [out.pending.read.deadline for out in self._out.values()]
        times += [pending.read.deadline for pending in self._waiting]
        if self._probe_until:
            times.append(self._probe_until)
        return min(times, default=float("inf"))

    def close_links(self) -> None:
        """Close all connections."""
        for link in self.links:
            link.close()
        self.links.clear()
