"""StaticFeed: members and changes without Redis. It asks a configured peer for its entry and its changes.

Each peer has a thread, so one that hangs delays no other. A peer that has not answered for ``node_ttl_s`` is down;
the thread goes on asking until it answers again.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

from flexkv_sglang.backends.fleet.members.followers import Followers
from flexkv_sglang.backends.fleet.members.peer_control import PeerControl
from flexkv_sglang.backends.fleet.members.redis_entries import is_sound
from flexkv_sglang.backends.fleet.partner import PartnerState
from flexkv_sglang.backends.fleet.vocabulary import NodeInfo
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import PeerError
from flexkv_sglang.threads import PeriodicThread

ASK_TIMEOUT_S = 1.0
POLL_S = 0.02
"""Shortest pause between two POLLs; longer with many sets, for at most ``_POLLS_PER_S`` in all."""

POLL_FAILED_S = 0.3
_POLLS_PER_S = 200


class StaticFeed:
    """Asks one configured peer. ``address`` counts, not the one in the peer's own entry."""

    def __init__(
        self, share: ShareConfig, address: str, followers: Followers, control: PeerControl
    ) -> None:
        self._share = share
        self._address = address
        self._followers = followers
        self._control = control
        self._source = f"peer {address}"
        self._outage = PartnerState(self._source, min(5.0, share.heartbeat_s))
        self._info: NodeInfo | None = None
        self._next_hello = 0.0
        self._answered_at = time.monotonic()
        self._thread = PeriodicThread(
            f"flexkv-peer-{address}"[:40], self._step, followers.thread_failed
        )
        self.threads = [self._thread]

    def wake(self) -> None:
        """Ask soon: the followed nodes have changed."""
        self._thread.event.set()

    def close(self, deadline: float) -> None:
        """Nothing to release."""

    def status(self) -> dict[str, object]:
        """State for ``flexkv nodes``."""
        node_id = self._info.node_id if self._info else None
        return {"kind": "peer", "address": self._address, "nid": node_id, **self._outage.status()}

    def _step(self) -> float:
        try:
            if time.monotonic() >= self._next_hello:
                self._hello()
        except PeerError as error:
            self._followers.count("share_peer_errors")
            self._thread.pause(self._outage.failed(error))
            if time.monotonic() - self._answered_at >= self._share.node_ttl_s:
                self._followers.update_members(self._source, [])
            return 0.0
        try:
            asked = self._poll()
        except PeerError:  # gone, busy, or without that namespace now: the next HELLO shows which
            self._followers.count("share_peer_errors")
            self._next_hello = 0.0
            self._thread.pause(POLL_FAILED_S)
            return 0.0
        if not asked:
            return max(0.0, self._next_hello - time.monotonic())
        self._thread.pause(max(POLL_S, len(self._followers.followed()) / _POLLS_PER_S))
        return 0.0

    def _hello(self) -> None:
        info = self._control.hello(self._address, ASK_TIMEOUT_S)
        self._next_hello = time.monotonic() + self._share.heartbeat_s * random.uniform(0.9, 1.1)
        if not is_sound(info):
            raise PeerError(f"{self._address} sends an entry that is not valid")
        self._info = info
        self._answered_at = time.monotonic()
        self._outage.worked()
        own = self._followers.own_info()
        self._followers.own_name_seen(self._source, info if info.node_id == own.node_id else None)
        self._followers.update_members(self._source, [replace(info, address=self._address)])

    def _poll(self) -> int:
        """Ask for the changes of this peer's followed sets. Returns their number."""
        asked = 0
        for namespace, node_id in self._followers.followed():
            if self._thread.stopped or self._info is None or node_id != self._info.node_id:
                continue
            position = self._followers.position(namespace, node_id)
            asked += 1
            if position is None:
                continue
            changes = self._control.poll(self._address, namespace, *position, ASK_TIMEOUT_S)
            if changes is None:
                self._followers.gap(namespace, node_id)
                self._next_hello = 0.0  # a new epoch, perhaps
            elif changes:
                self._followers.count("share_changes_in", len(changes))
                self._followers.changed(namespace, node_id, changes)
        return asked
