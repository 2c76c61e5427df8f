"""Followers: which other nodes there are, and the followers that keep each one's set of pages up to date.

The feeds report members and changes here, and ask here for what to follow: nodes of the same share group in
namespaces present on this node, never the node itself. Reports may be late, lost or wrong; at worst the ranks
see a page that the peer answers with MISS.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from flexkv_sglang.backends.fleet.members.follower import (
    Apply,
    Feed,
    Follower,
    Forget,
    Reset,
    SnapshotQueue,
    Step,
)
from flexkv_sglang.backends.fleet.members.members import Member, Members
from flexkv_sglang.backends.fleet.partner import PartnerState
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import Change, NodeId, NodeInfo, Snapshot
from flexkv_sglang.errors import FlexKVError

logger = logging.getLogger(__name__)

TICK_S = 1.0
_NAME_HEARTBEATS = 3
_OWN_EPOCHS = 16


class Followers:
    """One lock guards everything, ``sets`` too. Any thread may call any method. Nothing is raised.

    ``info``: this node's own entry; cheap, asked often. If another agent has the same name, ``node_id`` is the new
    one. ``metrics``: ``(name, amount)``. ``wake_feeds`` is called when the followed nodes or the own name have
    changed, ``wake_fetchers`` when a snapshot is wanted; neither may block.
    """

    def __init__(
        self,
        info: Callable[[], NodeInfo],
        sets: PeerSetsWriter,
        metrics: Callable[[str, int], None],
        wake_feeds: Callable[[], None],
        wake_fetchers: Callable[[], None],
    ) -> None:
        self._info, self._sets, self._metrics = info, sets, metrics
        self._wake_feeds, self._wake_fetchers = wake_feeds, wake_fetchers
        own = info()
        self._share_group = own.share_group
        self._lock = threading.Lock()
        self._node_id = own.node_id  # guarded by _lock, as are all below
        self._own_epochs: deque[int] = deque([own.epoch], _OWN_EPOCHS)
        self._name_heartbeats: dict[str, int] = {}
        self._members = Members()
        self._written: dict[NodeId, tuple[int, str, bool]] = {}
        self._followers: dict[Feed, Follower] = {}
        self._snapshot_at: dict[Feed, float] = {}
        self._wanted: frozenset[str] = frozenset()
        self._queue = SnapshotQueue()
        self._outage = PartnerState("replica of other nodes' pages")
        self._closed = False
        self._ticked_at = 0.0

    def close(self) -> None:
        """Write no set any more. Idempotent."""
        with self._lock:
            self._closed = True

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a metric."""
        self._metrics(name, amount)

    def thread_failed(self) -> None:
        """Count a step of a thread that raised."""
        self.count("share_thread_errors")

    def own_info(self) -> NodeInfo:
        """This node's entry, with the name it has now."""
        info = self._info()
        with self._lock:
            if info.epoch not in self._own_epochs:
                self._own_epochs.append(info.epoch)
            return replace(info, node_id=self._node_id)

    def wanted_namespaces(self, namespaces: Iterable[str]) -> None:
        """Follow other nodes in these namespaces: those present on this node. May change at any time."""
        wanted = frozenset(namespaces)
        with self._lock:
            if wanted == self._wanted:
                return
            self._wanted = wanted
            self._reconcile()
        self._wake_feeds()

    def set_suspect(self, namespace: str, node_id: NodeId) -> None:
        """Forget a set and fetch it again: reads at this peer miss pages that the set contains."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            if follower is None or not follower.has_set:
                return
            self.count("share_distrusted")
            self._do((namespace, node_id), follower.invalidate())

    def reveal(self, now_at_the_latest: bool) -> None:
        """Let the rank processes see the sets of this agent: once all are here, or now."""
        with self._lock:
            sets = [follower.has_set for follower in self._followers.values()]
            if self._sets.hidden and ((sets and all(sets)) or now_at_the_latest):
                self._write(self._sets.reveal)

    def status(self) -> dict[str, object]:
        """State for ``flexkv nodes``: JSON-able, without secrets. Times in seconds ago."""
        with self._lock:
            peers = [self._describe(*item) for item in sorted(self._members.known.items())]
            return {
                "nid": self._node_id,
                "namespaces": sorted(self._wanted),
                "refused": self._members.refused,
                "peers": peers,
            }

    # --- called by the feeds ---

    def update_members(self, source: str, infos: list[NodeInfo], grace_s: float = 0.0) -> None:
        """Take the whole list of a source's members. ``grace_s``: missing members are kept for that long."""
        now = time.monotonic()
        with self._lock:
            others = [
                info
                for info in infos
                if info.node_id != self._node_id
                and info.epoch not in self._own_epochs
                and info.share_group == self._share_group
            ]
            self._members.update_members(source, others, now, grace_s)
            changed = self._reconcile()
        if changed:
            self._wake_feeds()

    def own_name_seen(self, source: str, info: NodeInfo | None) -> None:
        """Take note, once per heartbeat, of another agent with this node's name (None: there is none).

        After several heartbeats in a row it is a cloned machine: one of the two is renamed.
        """
        with self._lock:
            own = self._own_epochs[-1]
            if info is None or info.epoch in self._own_epochs:
                self._name_heartbeats.pop(source, None)
                return
            heartbeats = self._name_heartbeats[source] = self._name_heartbeats.get(source, 0) + 1
            if heartbeats < (_NAME_HEARTBEATS if own > info.epoch else 2 * _NAME_HEARTBEATS):
                if heartbeats == _NAME_HEARTBEATS:
                    logger.error(
                        "flexkv: node %s: the agent at %s has the same nid and should take another one",
                        self._node_id,
                        info.address,
                    )
                return
            self._name_heartbeats.clear()
            former = self._node_id
            self._node_id = NodeId(f"{former[:91]}-{own & 0xFFFF:04x}")
            self.count("share_renamed")
            logger.error(
                "flexkv: node %s: the agent at %s has the same nid; this one is %s from now on",
                former,
                info.address,
                self._node_id,
            )
        self._wake_feeds()

    def followed(self) -> list[Feed]:
        """(namespace, node) of every follower."""
        with self._lock:
            return list(self._followers)

    def position(self, namespace: str, node_id: NodeId) -> tuple[int, int] | None:
        """(epoch, last number) for POLL; None while a snapshot is under way."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            if follower is None or follower.wants_snapshot or follower.epoch is None:
                return None
            return follower.epoch, follower.last

    def changed(self, namespace: str, node_id: NodeId, changes: list[Change]) -> None:
        """Take entries of a node's change feed."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            for change in changes if follower else ():
                assert follower is not None
                self._do((namespace, node_id), follower.changed(change))

    def gap(self, namespace: str, node_id: NodeId) -> None:
        """Fetch a snapshot: the peer no longer keeps the changes after ours."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            if follower is not None:
                self._do((namespace, node_id), follower.gap())

    # --- called by the threads of Membership ---

    def upkeep(self) -> None:
        """Show that the agent lives; drop members that are down for long, and sets that are outdated."""
        now = time.monotonic()
        with self._lock:
            self._write(self._sets.heartbeat)
            if now - self._ticked_at >= TICK_S:
                self._ticked_at = now
                self._write(self._sets.tick)
                for node_id in self._members.tick(now):
                    self._written.pop(node_id, None)
                    self._write(self._sets.remove_peer, node_id)
                self._reconcile()
            for feed, follower in self._followers.items():
                self._do(feed, follower.tick(now))

    def snapshot_due(self) -> tuple[Feed, str] | float:
        """(feed, address) of a snapshot to fetch now; else the seconds until one may be due."""
        now = time.monotonic()
        with self._lock:
            feed = self._queue.take(now)
            if feed is None:
                return self._queue.due_in(now)
            member = self._members.known.get(feed[1])
            if feed not in self._followers or member is None or not member.up:
                self._queue.done(feed, failed=False)
                self._queue.forget(feed)
                return 0.0
            return feed, member.info.address

    def snapshot_fetched(self, feed: Feed, snapshot: Snapshot | None) -> None:
        """End what ``snapshot_due`` began. None: the peer did not answer."""
        failed = snapshot is None
        self.count("share_snapshots_failed" if failed else "share_snapshots")
        with self._lock:
            follower = self._followers.get(feed)
            steps = follower.answered(snapshot) if follower and snapshot else []
            self._queue.done(feed, failed=failed, useless=not failed and not steps)
            if follower is None or self._closed:
                self._queue.forget(feed)
                return
            if steps:
                self._snapshot_at[feed] = time.monotonic()
            self._do(feed, steps)

    # --- under the lock ---

    def _reconcile(self) -> bool:
        """Bring followers and sets in line with members and wanted namespaces. True: other nodes are followed now."""
        now = time.monotonic()
        before = set(self._followers)
        self._queue.nodes = len(self._members.known) + 1
        feeds: dict[Feed, Member] = {}
        for node_id, member in self._members.known.items():
            state = (member.info.epoch, member.info.address, member.up)
            if self._written.get(node_id) != state and self._write(
                self._sets.set_peer, node_id, *state
            ):
                self._written[node_id] = state
            for namespace in self._wanted.intersection(member.info.namespaces):
                feeds[namespace, node_id] = member
        for feed in before - feeds.keys():
            del self._followers[feed]
            self._snapshot_at.pop(feed, None)
            self._queue.forget(feed)
            self._write(self._sets.drop, *feed)
        for feed, member in feeds.items():
            follower = self._followers.setdefault(feed, Follower())
            if follower.epoch != member.info.epoch:
                follower.announced(member.info.epoch, now)
                self._queue.want(feed, now, new_epoch=True)
                self._do(feed, [])
        self._wake_fetchers()
        return self._followers.keys() != before

    def _do(self, feed: Feed, steps: list[Step]) -> None:
        """Carry out the steps of a follower, and ask for a snapshot if it wants one."""
        follower = self._followers[feed]
        for step in steps:
            if isinstance(step, Reset):
                done = self._write(self._sets.reset, *feed, step.snapshot)
            elif isinstance(step, Apply):
                done = self._write(self._sets.apply, *feed, step.op, step.fingerprints)
            else:
                assert isinstance(step, Forget)
                done = self._write(self._sets.drop, *feed)
            if not done:
                follower.gap()
                break
        member = self._members.known.get(feed[1])
        if follower.wants_snapshot and member is not None and member.up:
            self._queue.want(feed, time.monotonic())
            self._wake_fetchers()

    def _write(self, call: Callable[..., None], *args: object) -> bool:
        """Call the writer of sets. False: it failed (a full disk), or we are closed."""
        if self._closed:
            return False
        try:
            call(*args)
        except (OSError, FlexKVError) as error:
            self.count("share_replica_errors")
            self._outage.failed(error)
            return False
        self._outage.worked()
        return True

    def _describe(self, node_id: NodeId, member: Member) -> dict[str, object]:
        now = time.monotonic()
        sets: dict[str, dict[str, Any]] = {}
        for feed, follower in self._followers.items():
            if feed[1] != node_id:
                continue
            at = self._snapshot_at.get(feed)
            sets[feed[0]] = {
                "state": "waiting" if follower.wants_snapshot else "following",
                "pages": follower.pages,
                "number": follower.last,
                "behind": follower.behind,
                "snapshot_s": None if at is None else round(now - at, 1),
            }
        down = member.down_since
        return {
            "nid": node_id,
            "address": member.info.address,
            "epoch": f"{member.info.epoch:016x}",
            "version": member.info.version,
            "serves": sorted(member.info.namespaces),
            "state": "up" if down is None else "down",
            "down_s": None if down is None else round(now - down, 1),
            "pages": sum(each["pages"] for each in sets.values()),
            "behind": sum(each["behind"] for each in sets.values()),
            "namespaces": sets,
        }
