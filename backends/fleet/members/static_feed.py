"""Members and changes without Redis: each configured peer is asked who it is, and what has changed.

One thread per peer, so that one that hangs holds up no other. A peer that has not answered for ``node_ttl_s`` is
down; it is asked on, and comes back by itself.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

from flexkv_sglang.backends.fleet.members.members import FeedHost
from flexkv_sglang.backends.fleet.members.partner import PartnerState
from flexkv_sglang.backends.fleet.members.redis_entries import is_sound
from flexkv_sglang.backends.fleet.vocabulary import NodeInfo, PeerControl, ShareConfig
from flexkv_sglang.errors import PeerError
from flexkv_sglang.threads import PeriodicThread

ASK_TIMEOUT_S = 1.0
POLL_S = 0.02
"""A peer's changes are asked for this often, or less often: ``_POLLS_PER_S`` per node in all."""

POLL_FAILED_S = 0.3
_POLLS_PER_S = 200


class StaticFeed:
    """One configured peer. Its ``address`` is what peers reach it at, whatever it says of itself."""

    def __init__(
        self, share: ShareConfig, address: str, host: FeedHost, control: PeerControl
    ) -> None:
        self._share = share
        self._address = address
        self._host = host
        self._control = control
        self._source = f"peer {address}"
        self._outage = PartnerState(self._source, min(5.0, share.heartbeat_s))
        self._info: NodeInfo | None = None
        self._next_hello = 0.0
        self._answered_at = time.monotonic()
        self._thread = PeriodicThread(
            f"flexkv-peer-{address}"[:40], self._step, lambda: host.count("share_thread_errors")
        )

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def wake(self) -> None:
        """What is followed has changed."""
        self._thread.event.set()

    def stop(self) -> None:
        """Ask the thread to end."""
        self._thread.stop()

    def join(self, deadline: float) -> bool:
        """Wait for its end."""
        return self._thread.join(deadline)

    def status(self) -> dict[str, object]:
        """For ``flexkv nodes``."""
        node_id = self._info.node_id if self._info else None
        return {"kind": "peer", "address": self._address, "nid": node_id, **self._outage.status()}

    def _step(self) -> float:
        try:
            if time.monotonic() >= self._next_hello:
                self._hello()
        except PeerError as error:
            self._host.count("share_peer_errors")
            self._thread.pause(self._outage.failed(error))
            if time.monotonic() - self._answered_at >= self._share.node_ttl_s:
                self._host.update_members(self._source, [])
            return 0.0
        try:
            asked = self._poll()
        except PeerError:  # gone, busy, or without that namespace now: the next greeting tells
            self._host.count("share_peer_errors")
            self._next_hello = 0.0
            self._thread.pause(POLL_FAILED_S)
            return 0.0
        if not asked:
            return max(0.0, self._next_hello - time.monotonic())
        self._thread.pause(max(POLL_S, len(self._host.followed()) / _POLLS_PER_S))
        return 0.0

    def _hello(self) -> None:
        info = self._control.hello(self._address, ASK_TIMEOUT_S)
        self._next_hello = time.monotonic() + self._share.heartbeat_s * random.uniform(0.9, 1.1)
        if not is_sound(info):
            raise PeerError(f"{self._address} says nothing sound of itself")
        self._info = info
        self._answered_at = time.monotonic()
        self._outage.worked()
        own = self._host.own_info()
        self._host.own_name_seen(self._source, info if info.node_id == own.node_id else None)
        self._host.update_members(self._source, [replace(info, address=self._address)])

    def _poll(self) -> int:
        """Ask for the changes of what is followed. How many namespaces were asked for."""
        asked = 0
        for namespace, node_id in self._host.followed():
            if self._thread.stopped or self._info is None or node_id != self._info.node_id:
                continue
            position = self._host.position(namespace, node_id)
            asked += 1
            if position is None:
                continue
            changes = self._control.poll(self._address, namespace, *position, ASK_TIMEOUT_S)
            if changes is None:
                self._host.gap(namespace, node_id)
                self._next_hello = 0.0  # perhaps it is a new epoch
            elif changes:
                self._host.count("share_changes_in", len(changes))
                self._host.changed(namespace, node_id, changes)
        return asked
