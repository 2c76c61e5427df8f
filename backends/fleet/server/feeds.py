"""The page server's side of SNAPSHOT and POLL: a node sends its own changes to its followers.

Arrays are built in the worker's thread and kept for a second, since many followers ask at once after a restart. A
snapshot leaves in parts, two per follower in flight, so that it does not crowd out pages.

Threads: the server's loop; ``build`` functions run in the worker's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from flexkv_sglang.backends.fleet.server.queue import Reader
from flexkv_sglang.backends.fleet.vocabulary import ServedNode, Snapshot, namespace_name
from flexkv_sglang.backends.fleet.wire import answers, requests
from flexkv_sglang.backends.fleet.wire.answers import UnavailableReason
from flexkv_sglang.threads import JobPool, PoolJob

SNAPSHOT_KEPT_S = 1.0
SENDING_MAX = 64
PARTS_IN_FLIGHT = 2

SendTracked = Callable[[Reader, list[bytes]], zmq.MessageTracker | None]
"""Sends frames. None: the reader is gone."""


@dataclass(eq=False, slots=True)
class _Sending:
    reader: Reader
    request_id: int
    snapshot: Snapshot
    part: int = 0
    trackers: list[zmq.MessageTracker] = field(default_factory=list)


class ServeFeeds:
    """Sends the changes of ``node``."""

    def __init__(self, node: ServedNode, worker: JobPool, send: SendTracked) -> None:
        self._node, self._worker, self._send = node, worker, send
        self._kept: dict[bytes, tuple[float, Snapshot]] = {}  # used by the worker's thread only
        self._sending: deque[_Sending] = deque()

    def snapshot(self, reader: Reader, ask: requests.SnapshotRequest) -> None:
        """Answer with all parts, one after the other, or with UNAVAILABLE."""

        def build() -> Callable[[], None]:
            snapshot = self._snapshot(ask.namespace)
            return lambda: self._begin(reader, ask.request_id, snapshot)

        self._ask(reader, ask.request_id, build)

    def poll(self, reader: Reader, ask: requests.Poll) -> None:
        """Answer with CHANGES, or with UNAVAILABLE."""

        def build() -> Callable[[], None]:
            log = self._node.changes_of(namespace_name(ask.namespace))
            changes = log.since(ask.epoch, ask.last) if log is not None else None
            if changes is not None:
                frames = answers.pack_changes(ask.request_id, changes)
            else:
                reason = (
                    UnavailableReason.UNKNOWN_NAMESPACE if log is None else UnavailableReason.LOST
                )
                frames = answers.pack_unavailable(ask.request_id, reason)

            def send() -> None:
                self._send(reader, frames)

            return send

        self._ask(reader, ask.request_id, build)

    def _ask(self, reader: Reader, request_id: int, build: PoolJob) -> None:
        def busy() -> None:
            self._send(reader, answers.pack_unavailable(request_id, UnavailableReason.BUSY))

        if not self._worker.put(build, busy):
            busy()

    def advance(self) -> bool:
        """Send the parts that may go now; True while parts are left."""
        for _ in range(len(self._sending)):
            sending = self._sending.popleft()
            if not sending.reader.gone and self._advance(sending):
                self._sending.append(sending)
        return bool(self._sending)

    def _advance(self, sending: _Sending) -> bool:
        sending.trackers = [tracker for tracker in sending.trackers if not tracker.done]
        while len(sending.trackers) < PARTS_IN_FLIGHT:
            tracker = self._send(
                sending.reader,
                answers.pack_part(sending.request_id, sending.snapshot, sending.part),
            )
            if tracker is None:
                return False
            sending.trackers.append(tracker)
            sending.part += 1
            if sending.part == answers.parts_of(len(sending.snapshot.fingerprints)):
                return False
        return True

    def _snapshot(self, namespace: bytes) -> Snapshot | None:
        now = time.monotonic()
        self._kept = {ns: kept for ns, kept in self._kept.items() if now < kept[0]}
        if namespace not in self._kept:
            log = self._node.changes_of(namespace_name(namespace))
            if log is None:
                return None
            self._kept[namespace] = (now + SNAPSHOT_KEPT_S, log.snapshot())
        return self._kept[namespace][1]

    def _begin(self, reader: Reader, request_id: int, snapshot: Snapshot | None) -> None:
        if snapshot is None or len(self._sending) >= SENDING_MAX:
            reason = (
                UnavailableReason.UNKNOWN_NAMESPACE if snapshot is None else UnavailableReason.BUSY
            )
            self._send(reader, answers.pack_unavailable(request_id, reason))
        else:
            self._sending.append(_Sending(reader, request_id, snapshot))
