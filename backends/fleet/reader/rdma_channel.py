"""A channel that fetches pages with an RDMA transport if the peer has it too: OFFER, OFFERED, fetch, DONE.

After an error of the transport the same pages are read over ZeroMQ, and all others of that peer for a minute.
A fetch ends by half of the peer's lease, counted from before the peer was asked: so the peer does not reuse that memory
while the transport reads it, although the two clocks differ.

Threads: the client's.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from flexkv_sglang.backends.fleet.reader.channel import Count, Out, PeerChannel
from flexkv_sglang.backends.fleet.reader.health import PeerHealth
from flexkv_sglang.backends.fleet.reader.rdma_memory import FALLBACK_S, Fetch, RdmaMemory
from flexkv_sglang.backends.fleet.reader.read import OUTCOME_OF, PageOutcome, Pending
from flexkv_sglang.backends.fleet.transport import RdmaError, TransferState
from flexkv_sglang.backends.fleet.vocabulary import PageStatus
from flexkv_sglang.backends.fleet.wire import answers, requests
from flexkv_sglang.backends.fleet.wire.link import Link
from flexkv_sglang.backoff import Backoff

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)


class RdmaChannel(PeerChannel):
    """A ``PeerChannel`` over ``memory``. A request is an OFFER while it is in ``_fetches``."""

    def __init__(
        self,
        health: PeerHealth,
        open_link: Callable[[str, int], Link],
        count: Count,
        memory: RdmaMemory,
    ) -> None:
        super().__init__(health, open_link, count)
        self._memory = memory
        self._fallback = Backoff(FALLBACK_S, FALLBACK_S)  # while it is not due: over ZeroMQ
        self._fetches: dict[int, Fetch] = {}

    def _pack(self, read: requests.Read) -> list[bytes]:
        out = self._out[read.request_id]
        welcome = out.link.welcome
        if (
            welcome is None
            or self._memory.name not in welcome.info.engines
            or not self._fallback.due
        ):
            return super()._pack(read)
        fetch = self._memory.take(out.count, out.pending.page_bytes)
        if fetch is None:
            return super()._pack(read)
        self._fetches[read.request_id] = fetch
        return requests.pack_offer(read)

    def _take(self, link: Link, answer: answers.Answer, frame: zmq.Frame | None) -> None:
        if isinstance(answer, answers.Offered):
            self._offered(link, answer)
        elif (
            isinstance(answer, answers.PagesHeader | answers.End)
            and answer.request_id in self._fetches
        ):
            link.fail(f"wire: {type(answer).__name__} instead of an offer")
        else:
            super()._take(link, answer, frame)

    def _offered(self, link: Link, offered: answers.Offered) -> None:
        """The peer has leased pages to us."""
        request_id = offered.request_id
        out, fetch = self._out.get(request_id), self._fetches.get(request_id)
        if out is None:  # its read has been abandoned
            link.send(requests.pack_done(offered.lease))
            return
        if fetch is None or fetch.transfer is not None or out.link is not link:
            link.fail("wire: an offer out of place")
            return
        fetch.lease = offered.lease
        pages = list(itertools.takewhile(lambda page: page.status is PageStatus.OK, offered.pages))
        lengths = {page.length for page in pages}
        if len(offered.pages) > out.count or lengths - {out.pending.page_bytes}:
            out.pending.fail(out.first, PageOutcome.FAILED)
            link.fail("wire: an offer of other pages")
            return
        if len(pages) < out.count:
            self._fail_behind(out, offered, len(pages))
        wanted = pages[: max(0, out.pending.end - out.first)]
        if not wanted:
            if request_id in self._out:
                self._remove(request_id)
            self.pump()
            return
        try:
            self._memory.start(fetch, wanted, offered.lease_ms, offered.blob)
        except RdmaError as exc:
            self._fall_back(request_id, str(exc))

    def _fail_behind(self, out: Out, offered: answers.Offered, count: int) -> None:
        """The peer has the first ``count`` pages of an offer and lacks the next one."""
        outcome = PageOutcome.FAILED  # an offer that ends early
        if count < len(offered.pages):
            outcome = OUTCOME_OF[offered.pages[count].status]
        if outcome is PageOutcome.BUSY:
            self.health.busy()
        out.pending.fail(out.first + count, outcome)
        self._cancel_unwanted(out.pending)

    def _poll_fetches(self, now: float) -> None:
        for request_id, fetch in list(self._fetches.items()):
            if fetch.transfer is None or self._fetches.get(request_id) is not fetch:
                continue
            state = fetch.transfer.poll()
            if now >= fetch.deadline:  # DONE is too late too: the peer may have reused that memory
                self._fall_back(
                    request_id, "a transfer did not end within half of the peer's lease"
                )
            elif state is TransferState.DONE:
                self._fetched(request_id, fetch)
            elif state is TransferState.FAILED:
                self._fall_back(request_id, "a transfer failed")

    def _fetched(self, request_id: int, fetch: Fetch) -> None:
        """The bytes are in the slab: deliver them."""
        out = self._out[request_id]
        self.heard_at = time.monotonic()
        for index, page in enumerate(fetch.pages):
            head = answers.PagesHeader(
                request_id, index, page.status, page.kind, page.length, (page.checksum,)
            )
            self._deliver(out.link, head, out, self._memory.fetched(fetch, index))
        out.got = len(fetch.pages)
        out.pending.arrived(out.got * out.pending.page_bytes, self.heard_at)
        self._remove(request_id)
        self._cancel_unwanted(out.pending)
        self._served(out)

    def _cancel(self, request_id: int) -> None:
        fetch = self._fetches.get(request_id)
        if fetch is None or not fetch.lease:
            super()._cancel(request_id)
        else:
            self._remove(request_id)

    def _remove(self, request_id: int) -> Out:
        """Give the memory back, and end the peer's lease."""
        out, fetch = super()._remove(request_id), self._fetches.pop(request_id, None)
        if fetch is not None:
            self._memory.give_back(fetch)
            if fetch.lease and out.link.alive:
                out.link.send(requests.pack_done(fetch.lease))
        return out

    def _fall_back(self, request_id: int, reason: str) -> None:
        """Read this request's pages over ZeroMQ instead."""
        self._pause_rdma(reason)
        out = self._remove(request_id)
        count = min(out.count, out.pending.end - out.first)
        if not out.link.alive:
            # the peer is gone, and ``lost`` cannot fail this request, which was removed
            self._failed(out, PageOutcome.FAILED)
        elif count > 0 and not out.pending.done:
            self._ask(out.link, out.pending, out.first, count)
        else:
            self.pump()

    def _pause_rdma(self, reason: str) -> None:
        if self._fallback.due:
            node_id = self.health.node_id
            logger.warning("node %s is read over zmq for %g s: %s", node_id, FALLBACK_S, reason)
            self._count("remote_engine_failures", 1)
        self._fallback.failed(FALLBACK_S)

    def renew(self) -> None:
        """The peer restarted: its transport may be used again."""
        super().renew()
        self._fallback = Backoff(FALLBACK_S, FALLBACK_S)

    def abandon(self, pending: Pending) -> None:
        """A late transfer counts against the transport, not as silence of the peer."""
        late = [
            request_id
            for request_id in self._requests_of(pending)
            if (fetch := self._fetches.get(request_id)) is not None and fetch.transfer is not None
        ]
        for request_id in late:
            self._remove(request_id)
        if late:
            self._pause_rdma("a transfer did not end by the deadline of its read")
            self.heard_at = time.monotonic()
        super().abandon(pending)
        if late:
            self.pump()

    def tick(self, now: float) -> None:
        """As ``PeerChannel``; also polls the transfers."""
        self._poll_fetches(now)
        super().tick(now)

    def next_tick(self) -> float:
        """At once while a transfer runs: its end wakes no poll."""
        if any(fetch.transfer is not None for fetch in self._fetches.values()):
            return 0.0
        return super().next_tick()
