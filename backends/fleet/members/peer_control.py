"""PeerControl: requests of an agent to other agents for their entry (HELLO), changes (POLL) and snapshots.

Each call takes an idle link of its own, or opens one, and puts it back after the answer. A call that fails closes its
link, so a late answer never meets a later request.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from flexkv_sglang.backends.fleet.vocabulary import Change, NodeInfo, Snapshot, namespace_bytes
from flexkv_sglang.backends.fleet.wire import curve
from flexkv_sglang.backends.fleet.wire.answers import (
    Answer,
    Changes,
    SnapshotPart,
    Unavailable,
    UnavailableReason,
)
from flexkv_sglang.backends.fleet.wire.link import Link
from flexkv_sglang.backends.fleet.wire.requests import Poll, pack_poll, pack_snapshot_request
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import PeerError

if TYPE_CHECKING:
    import zmq

LINKS_MAX = 64
IDLE_S = 60.0


class PeerControl:
    """Requests to other agents. Any thread; each call blocks for ``timeout_s`` at most.

    Calls raise ``PeerError`` when there is no valid answer in time.
    """

    def __init__(self, share: ShareConfig, secret: curve.Secret | None) -> None:
        self._share, self._secret = share, secret
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None  # guarded by _lock
        # guarded by _lock, as is _closed: idle links and since when
        self._links: OrderedDict[str, tuple[float, Link]] = OrderedDict()
        self._closed = False
        self._request_ids = itertools.count(1)

    def hello(self, address: str, timeout_s: float) -> NodeInfo:
        """Return the entry of the node at ``address``, over a new connection so that it is of now."""
        deadline = time.monotonic() + timeout_s
        link = self._open(address)
        try:
            self._until_ready(link, address, deadline)
            assert link.welcome is not None
            info = link.welcome.info
        except PeerError:
            link.close()
            raise
        self._put_back(address, link)
        return info

    def poll(
        self, address: str, namespace: str, epoch: int, last: int, timeout_s: float
    ) -> list[Change] | None:
        """Return changes after ``last`` of ``epoch``, the first ones if there are many; None: take a snapshot."""
        request_id = next(self._request_ids)
        ask = pack_poll(Poll(request_id, namespace_bytes(namespace), epoch, last))
        answer = self._ask(address, request_id, ask, timeout_s)[0]
        if isinstance(answer, Unavailable) and answer.reason is UnavailableReason.LOST:
            return None
        if not isinstance(answer, Changes):
            raise _unexpected(address, answer)
        return answer.changes

    def snapshot(self, address: str, namespace: str, timeout_s: float) -> Snapshot:
        """Return all pages of that node in a namespace."""
        request_id = next(self._request_ids)
        answers = self._ask(
            address,
            request_id,
            pack_snapshot_request(request_id, namespace_bytes(namespace)),
            timeout_s,
        )
        parts = [answer for answer in answers if isinstance(answer, SnapshotPart)]
        if not parts or len(parts) != len(answers):
            raise _unexpected(address, answers[0])
        first = parts[0]
        for number, part in enumerate(parts):
            same = (part.epoch, part.last, part.count) == (first.epoch, first.last, first.count)
            if part.part != number or not same:
                raise PeerError(f"{address}: parts of different snapshots")
        fingerprints = np.concatenate([part.fingerprints for part in parts]).astype(
            np.uint64, copy=False
        )
        if len(fingerprints) > 1 and not bool(np.all(fingerprints[:-1] < fingerprints[1:])):
            raise PeerError(f"{address}: a snapshot out of order")
        return Snapshot(first.epoch, first.last, fingerprints)

    def close(self) -> None:
        """Close idle links; calls under way fail. Idempotent."""
        with self._lock:
            self._closed = True
            links, context = list(self._links.values()), self._context
            self._links.clear()
            self._context = None
        for _, link in links:
            link.close()
        if context is not None:
            context.term()  # waits for calls under way to close their links: their time-outs bound it

    def _ask(
        self, address: str, request_id: int, ask: list[bytes], timeout_s: float
    ) -> list[Answer]:
        deadline = time.monotonic() + timeout_s
        link = self._take(address) or self._open(address)
        try:
            self._until_ready(link, address, deadline)
            link.send(ask)
            answers = self._answers(link, address, request_id, deadline)
        except PeerError:
            link.close()
            raise
        self._put_back(address, link)
        return answers

    def _answers(self, link: Link, address: str, request_id: int, deadline: float) -> list[Answer]:
        """Return the answer, or all parts of a snapshot."""
        answers: list[Answer] = []
        while True:
            self._wait(link, address, deadline)
            while (received := link.receive()) is not None:
                answer = received[0]
                if (
                    not isinstance(answer, SnapshotPart | Changes | Unavailable)
                    or answer.request_id != request_id
                ):
                    raise _unexpected(address, answer)
                answers.append(answer)
                if not isinstance(answer, SnapshotPart) or len(answers) == answer.parts:
                    return answers
            link.watch()

    def _until_ready(self, link: Link, address: str, deadline: float) -> None:
        while link.welcome is None:
            self._wait(link, address, deadline)
            if link.receive() is not None:
                raise PeerError(f"{address}: an answer before it was asked")
            if link.welcome is None:
                link.watch()

    def _wait(self, link: Link, address: str, deadline: float) -> None:
        """Wait for a message. Raises at the deadline, and for a dead link."""
        import zmq

        if not link.alive:
            raise PeerError(f"{address}: {link.reason}")
        poller = zmq.Poller()
        poller.register(link.sock, zmq.POLLIN)
        poller.register(link.monitor, zmq.POLLIN)
        left_ms = int((deadline - time.monotonic()) * 1000)
        if left_ms <= 0 or not poller.poll(left_ms):
            raise PeerError(f"{address}: no answer in time")

    def _open(self, address: str) -> Link:
        import zmq

        with self._lock:
            if self._closed:
                raise PeerError("closed")
            if self._context is None:
                self._context = zmq.Context(io_threads=1)
            return Link(self._context, address, self._share, self._secret)

    def _take(self, address: str) -> Link | None:
        """Return an idle link that is still alive."""
        with self._lock:
            _, link = self._links.pop(address, (0.0, None))
        if link is not None:
            if link.receive() is None and link.alive:
                link.watch()
                if link.alive:
                    return link
            link.close()
        return None

    def _put_back(self, address: str, link: Link) -> None:
        now = time.monotonic()
        with self._lock:
            old = [self._links.pop(address)] if address in self._links else []
            while self._links and (
                len(self._links) >= LINKS_MAX or next(iter(self._links.values()))[0] < now - IDLE_S
            ):
                old.append(self._links.popitem(last=False)[1])
            if self._closed:
                old.append((now, link))
            else:
                self._links[address] = (now, link)
        for _, unused in old:
            unused.close()


def _unexpected(address: str, answer: Answer) -> PeerError:
    reason = answer.reason.name if isinstance(answer, Unavailable) else type(answer).__name__
    return PeerError(f"{address}: an unexpected answer: {reason}")
