"""Which other nodes there are and what each holds: members and changes in, the replica of their sets out.

Follows nodes of the same share group in namespaces present on this node, never itself. Everything comes from
outside and may be late, lost or wrong; what reaches the ranks is at worst a page that the peer answers MISS to.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from flexkv_sglang.backends.fleet.members.change_log import OwnChanges
from flexkv_sglang.backends.fleet.members.follower import Apply, Follower, Forget, Reset, Step
from flexkv_sglang.backends.fleet.members.members import Member, Members
from flexkv_sglang.backends.fleet.members.partner import PartnerState
from flexkv_sglang.backends.fleet.members.redis_feed import RedisFeed
from flexkv_sglang.backends.fleet.members.replica_sink import ReplicaSink
from flexkv_sglang.backends.fleet.members.snapshot_queue import Feed, SnapshotQueue
from flexkv_sglang.backends.fleet.members.static_feed import StaticFeed
from flexkv_sglang.backends.fleet.vocabulary import (
    Change,
    NodeId,
    NodeInfo,
    PeerControl,
    ShareConfig,
    Snapshot,
)
from flexkv_sglang.errors import FlexKVError, PeerError
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

HEARTBEAT_S, TICK_S = 0.2, 1.0
SNAPSHOT_TIMEOUT_S = 10.0
SNAPSHOTS_AT_ONCE = 2
CLOSE_S = 1.7
_NAME_HEARTBEATS = 3
_OWN_EPOCHS = 16


class Membership:
    """The other nodes, and the threads that keep in touch with them. Any thread may call any method.

    ``info``: what this node tells of itself; cheap, asked often. If another agent has the same
    ``node_id``, ``Membership.node_id`` is the new name. ``logs``: a namespace's ``OwnChanges``, or None. ``sink``
    is only used under the membership's lock, its ``heartbeat`` and ``tick`` too (by the thread ``flexkv-membership``).
    ``metrics``: ``(name, amount)``, names ``share_...``. Raises ``ConfigError`` for wrong settings, later nothing.
    """

    def __init__(
        self,
        share: ShareConfig,
        info: Callable[[], NodeInfo],
        logs: Callable[[str], OwnChanges | None],
        control: PeerControl,
        sink: ReplicaSink,
        metrics: Callable[[str, int], None],
    ) -> None:
        self._share, self._info, self._control = share, info, control
        self._sink, self.count = sink, _adder(metrics)
        self._lock = threading.Lock()
        self._node_id = info().node_id  # guarded by _lock, as are all below
        self._own_epochs: deque[int] = deque([info().epoch], _OWN_EPOCHS)
        self._name_heartbeats: dict[str, int] = {}
        self._members = Members()
        self._told: dict[NodeId, tuple[int, str, bool]] = {}
        self._followers: dict[Feed, Follower] = {}
        self._snapshot_at: dict[Feed, float] = {}
        self._wanted: frozenset[str] = frozenset()
        self._queue = SnapshotQueue()
        self._sink_outage = PartnerState("replica of other nodes' pages")
        self._closed = False
        self._ticked_at = 0.0
        self._feeds: list[RedisFeed | StaticFeed] = [
            StaticFeed(share, address, self, control) for address in dict.fromkeys(share.peers)
        ]
        if share.redis_url:
            self._feeds.append(RedisFeed(share, self, logs))
        failed = lambda: self.count("share_thread_errors")  # noqa: E731
        self._askers = [
            PeriodicThread(f"flexkv-snapshot-{number}", self._ask, failed)
            for number in range(SNAPSHOTS_AT_ONCE)
        ]
        self._threads = [PeriodicThread("flexkv-membership", self._upkeep, failed), *self._askers]

    def start(self) -> None:
        """Begin to follow and, with Redis, to publish."""
        for part in (*self._threads, *self._feeds):
            part.start()

    def close(self) -> None:
        """End; at most 2 seconds, whatever hangs. Idempotent. What is left hanging is never heard of again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + CLOSE_S
        parts = (*self._feeds, *self._threads)
        for part in parts:
            part.stop()
        ended = [part.join(deadline) for part in parts]
        if not all(ended):
            logger.warning("flexkv: a thread of sharing has not ended in %.1f s", CLOSE_S)

    @property
    def node_id(self) -> NodeId:
        """This node's name now."""
        with self._lock:
            return self._node_id

    def wanted_namespaces(self, namespaces: Iterable[str]) -> None:
        """Namespaces that are present on this node: those of other nodes are followed. May change at any time."""
        wanted = frozenset(namespaces)
        with self._lock:
            if wanted == self._wanted:
                return
            self._wanted = wanted
            self._reconcile()
        self._wake()

    def set_suspect(self, namespace: str, node_id: NodeId) -> None:
        """Readers do not find at this peer what its set says: forget the set, and ask for it again."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            if follower is None or not follower.held:
                return
            self.count("share_distrusted")
            self._do((namespace, node_id), follower.invalidate())

    def status(self) -> dict[str, object]:
        """For ``flexkv nodes``: JSON-able, no secret in it. Times in seconds ago."""
        with self._lock:
            peers = [
                self._describe(node_id, member)
                for node_id, member in sorted(self._members.known.items())
            ]
            return {
                "nid": self._node_id,
                "namespaces": sorted(self._wanted),
                "refused": self._members.refused,
                "feeds": [feed.status() for feed in self._feeds],
                "peers": peers,
            }

    # --- what the feeds say and ask: members.FeedHost ---

    def own_info(self) -> NodeInfo:
        """What this node tells of itself, with the name it has now."""
        info = self._info()
        with self._lock:
            if info.epoch not in self._own_epochs:
                self._own_epochs.append(info.epoch)
            return replace(info, node_id=self._node_id)

    def update_members(self, source: str, infos: list[NodeInfo], grace_s: float = 0.0) -> None:
        """A source's members, all of them."""
        now = time.monotonic()
        with self._lock:
            others = [
                info
                for info in infos
                if info.node_id != self._node_id
                and info.epoch not in self._own_epochs
                and info.share_group == self._share.share_group
            ]
            self._members.update_members(source, others, now, grace_s)
            changed = self._reconcile()
        if changed:
            self._wake()

    def own_name_seen(self, source: str, info: NodeInfo | None) -> None:
        """Another agent with our name, several beats in a row: a cloned machine. One of the two is renamed."""
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
        self._wake()

    def followed(self) -> list[Feed]:
        """(namespace, node) of all that are followed."""
        with self._lock:
            return list(self._followers)

    def position(self, namespace: str, node_id: NodeId) -> tuple[int, int] | None:
        """(epoch, last number); None while a snapshot is under way."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            if follower is None or follower.wants_snapshot or follower.epoch is None:
                return None
            return follower.epoch, follower.last

    def changed(self, namespace: str, node_id: NodeId, changes: list[Change]) -> None:
        """Entries of a feed."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            for change in changes if follower else ():
                assert follower is not None
                self._do((namespace, node_id), follower.changed(change))

    def gap(self, namespace: str, node_id: NodeId) -> None:
        """A peer has not kept the changes after ours."""
        with self._lock:
            follower = self._followers.get((namespace, node_id))
            if follower is not None:
                self._do((namespace, node_id), follower.gap())

    # --- under the lock ---

    def _reconcile(self) -> bool:
        """Bring followers and sink in line with members and wanted namespaces. True: what is followed changed."""
        now = time.monotonic()
        before = self._followers.keys() | set()
        self._queue.nodes = len(self._members.known) + 1
        feeds: dict[Feed, Member] = {}
        for node_id, member in self._members.known.items():
            state = (member.info.epoch, member.info.address, member.up)
            if self._told.get(node_id) != state and self._write(
                self._sink.set_peer, node_id, *state
            ):
                self._told[node_id] = state
            for namespace in self._wanted.intersection(member.info.namespaces):
                feeds[namespace, node_id] = member
        for feed in before - feeds.keys():
            self._unfollow(feed)
        for feed, member in feeds.items():
            follower = self._followers.get(feed)
            if follower is None:
                follower = self._followers[feed] = Follower()
            if follower.epoch != member.info.epoch:
                steps = follower.announced(member.info.epoch, now)
                self._queue.want(feed, now, new_epoch=True)
                self._do(feed, steps)
        self._wake_askers()
        return self._followers.keys() != before

    def _unfollow(self, feed: Feed) -> None:
        del self._followers[feed]
        self._snapshot_at.pop(feed, None)
        self._queue.forget(feed)
        self._write(self._sink.drop, *feed)

    def _do(self, feed: Feed, steps: list[Step]) -> None:
        """Carry out what a follower decided; ask for a snapshot if it wants one."""
        follower = self._followers[feed]
        for step in steps:
            if isinstance(step, Reset):
                done = self._write(self._sink.reset, *feed, step.snapshot)
            elif isinstance(step, Apply):
                done = self._write(self._sink.apply, *feed, step.op, step.fingerprints)
            else:
                assert isinstance(step, Forget)
                done = self._write(self._sink.drop, *feed)
            if not done:
                follower.gap()
                break
        member = self._members.known.get(feed[1])
        if follower.wants_snapshot and member is not None and member.up:
            self._queue.want(feed, time.monotonic())
            self._wake_askers()

    def _write(self, call: Callable[..., None], *args: object) -> bool:
        """One call of the sink. False: it failed, which is said in the log once a minute."""
        if self._closed:
            return False
        try:
            call(*args)
        except (OSError, FlexKVError) as error:
            self.count("share_replica_errors")
            self._sink_outage.failed(error)
            return False
        self._sink_outage.worked()
        return True

    def _describe(self, node_id: NodeId, member: Member) -> dict[str, object]:
        now = time.monotonic()
        sets = {}
        for (namespace, other), follower in self._followers.items():
            if other != node_id:
                continue
            at = self._snapshot_at.get((namespace, node_id))
            sets[namespace] = {
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
            "pages": sum(
                follower.pages
                for (_ns, other), follower in self._followers.items()
                if other == node_id
            ),
            "behind": sum(
                follower.behind
                for (_ns, other), follower in self._followers.items()
                if other == node_id
            ),
            "namespaces": sets,
        }

    # --- threads ---

    def _wake(self) -> None:
        for feed in self._feeds:
            feed.wake()

    def _wake_askers(self) -> None:
        for asker in self._askers:
            asker.event.set()

    def _upkeep(self) -> float:
        now = time.monotonic()
        with self._lock:
            self._write(self._sink.heartbeat)
            if now - self._ticked_at >= TICK_S:
                self._ticked_at = now
                self._write(self._sink.tick)
                for node_id in self._members.tick(now):
                    self._told.pop(node_id, None)
                    self._write(self._sink.remove_peer, node_id)
                self._reconcile()
            for feed, follower in self._followers.items():
                self._do(feed, follower.tick(now))
        return HEARTBEAT_S

    def _ask(self) -> float:
        """Fetch one snapshot, if one is due."""
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
            address = member.info.address
        snapshot, failed = None, True
        try:
            snapshot = self._control.snapshot(address, feed[0], SNAPSHOT_TIMEOUT_S)
            failed = False
        except PeerError as error:
            logger.debug("no snapshot of %s from %s: %s", feed[0], address, error)
        finally:
            self._fetched(feed, snapshot, failed)
        return 0.0

    def _fetched(self, feed: Feed, snapshot: Snapshot | None, failed: bool) -> None:
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


def _adder(metrics: Callable[[str, int], None]) -> Callable[..., None]:
    def count(name: str, amount: int = 1) -> None:
        metrics(name, amount)

    return count
