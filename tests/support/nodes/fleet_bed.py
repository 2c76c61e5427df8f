"""Nodes of a fleet in one process: real change logs and memberships, sets in memory, direct calls between them."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace, TracebackType
from typing import Any, cast

import numpy as np
import redis

from flexkv_sglang.backends.fleet.members.change_log import ChangeLogs
from flexkv_sglang.backends.fleet.members.membership import Membership
from flexkv_sglang.backends.fleet.members.peer_control import PeerControl
from flexkv_sglang.backends.fleet.members.redis_entries import (
    encode_change,
    encode_info,
    member_keys,
    stream_key,
)
from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.backends.fleet.vocabulary import (
    Change,
    ChangeLog,
    NodeId,
    NodeInfo,
    Op,
    Snapshot,
    namespace_name,
)
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import PeerError
from flexkv_sglang.types import U64

NS = namespace_name(bytes(range(16)))
OTHER_NS = namespace_name(bytes(range(1, 17)))


def fingerprints(*numbers: int) -> U64:
    """Make fingerprints."""
    return np.array(numbers, np.uint64)


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Poll until it holds. False: it did not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@dataclass
class MemorySets:
    """Stands in for ``PeerSetsWriter``: sets are Python sets; fails on demand."""

    peers: dict[NodeId, tuple[int, str, bool]] = field(default_factory=dict)
    sets: dict[tuple[str, NodeId], set[int]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    was_down: set[NodeId] = field(default_factory=set)
    error: OSError | None = None
    _user: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def _used(self, name: str) -> Iterator[None]:
        assert self._user.acquire(blocking=False), "two threads in the sets"
        try:
            self.calls[name] += 1
            if self.error:
                raise self.error
            yield
        finally:
            self._user.release()

    def set_peer(self, node_id: NodeId, epoch: int, address: str, up: bool) -> None:
        with self._used("set_peer"):
            self.peers[node_id] = (epoch, address, up)
            if not up:
                self.was_down.add(node_id)

    def remove_peer(self, node_id: NodeId) -> None:
        with self._used("remove_peer"):
            self.peers.pop(node_id, None)

    def reset(self, namespace: str, node_id: NodeId, snapshot: Snapshot) -> None:
        with self._used("reset"):
            self.sets[namespace, node_id] = set(snapshot.fingerprints.tolist())

    def apply(self, namespace: str, node_id: NodeId, op: Op, keys: U64) -> None:
        with self._used("apply"):
            held = self.sets[namespace, node_id]
            self.sets[namespace, node_id] = {
                Op.ADD: held.union(keys.tolist()),
                Op.DROP: held.difference(keys.tolist()),
            }.get(op, set())

    def drop(self, namespace: str, node_id: NodeId) -> None:
        with self._used("drop"):
            self.sets.pop((namespace, node_id), None)

    def heartbeat(self) -> None:
        with self._used("heartbeat"):
            pass

    def tick(self) -> None:
        with self._used("tick"):
            pass


class Wires:
    """Nodes by address; stands in for every node's ``PeerControl``. ``cut``: addresses that do not answer."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.cut: set[str] = set()
        self.asked: Counter[str] = Counter()

    def _at(self, address: str, what: str) -> Node:
        self.asked[what] += 1
        if address in self.cut or address not in self.nodes:
            raise PeerError(f"{address} does not answer")
        return self.nodes[address]

    def hello(self, address: str, timeout_s: float) -> NodeInfo:
        return self._at(address, "hello").own_info()

    def poll(
        self, address: str, namespace: str, epoch: int, last: int, timeout_s: float
    ) -> list[Change] | None:
        log = self._at(address, "poll").logs.find(namespace)
        return None if log is None else log.since(epoch, last)

    def snapshot(self, address: str, namespace: str, timeout_s: float) -> Snapshot:
        log = self._at(address, "snapshot").logs.find(namespace)
        if log is None:
            raise PeerError("unknown namespace")
        return log.snapshot()


class Node:
    """One node: its own changes, its membership, its copies of others' sets."""

    def __init__(
        self, share: ShareConfig, wires: Wires, node_id: str, logs: ChangeLogs | None = None
    ) -> None:
        self.logs = logs or ChangeLogs(outbox=bool(share.redis_url))
        self.logs.log(NS)
        self.first_nid = NodeId(node_id)
        self.address = f"{node_id}:1"
        self.share = share
        self.peer_sets = MemorySets()
        self.counts: Counter[str] = Counter()
        self.wires = wires
        self.membership = Membership(
            share, self.info, self.logs.find, wires, self.peer_sets, self._count
        )
        wires.nodes[self.address] = self
        self.membership.followers.wanted_namespaces({NS})

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] += amount

    def info(self) -> NodeInfo:
        return NodeInfo(
            self.first_nid,
            self.logs.epoch,
            self.address,
            self.share.share_group,
            self.logs.namespaces(),
        )

    def own_info(self) -> NodeInfo:
        return self.membership.followers.own_info()

    def start(self) -> Node:
        self.membership.start()
        return self

    def knows(self, other: Node, namespace: str = NS) -> bool:
        """Is the copy of ``other``'s set right?"""
        log = other.logs.find(namespace)
        assert log is not None
        mine = self.peer_sets.sets.get((namespace, other.membership.followers._node_id))
        return mine == set(log.snapshot().fingerprints.tolist()) and self.sees(other)

    def sees(self, other: Node) -> bool:
        """Is ``other`` up here?"""
        return self.peer_sets.peers.get(other.membership.followers._node_id, (0, "", False))[2]

    def __enter__(self) -> Node:
        return self.start()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.membership.close()
        self.wires.nodes.pop(self.address, None)


class WireNode:
    """A node that others reach over the real wire, on loopback."""

    def __init__(self, share: ShareConfig, node_id: str) -> None:
        self.logs = ChangeLogs()
        self.logs.log(NS)
        self.node_id = NodeId(node_id)
        self.peer_sets = MemorySets()
        self.counts: Counter[str] = Counter()
        self.membership: Membership | None = None
        self.control = PeerControl(share, None)
        self.address = ""  # asked for before ``start`` returns
        listen = "127.0.0.1:0" if share.listen == "auto" else share.listen
        served = replace(share, listen=listen)
        self._server = PageServer(served, None, self)
        self.address = self._server.start()

    def info(self) -> NodeInfo:
        """As ``ServedNode``, like the next two."""
        return self.own_info()

    def pages_of(self, namespace: str) -> None:
        return None

    def changes_of(self, namespace: str) -> ChangeLog | None:
        return self.logs.find(namespace)

    def own_info(self) -> NodeInfo:
        node_id = self.membership.followers._node_id if self.membership else self.node_id
        return NodeInfo(node_id, self.logs.epoch, self.address, "", self.logs.namespaces())

    def meet(self, share: ShareConfig) -> None:
        """Begin to follow."""
        self.membership = Membership(
            share, self.own_info, self.logs.find, self.control, self.peer_sets, self._count
        )
        self.membership.followers.wanted_namespaces({NS})
        self.membership.start()

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] += amount

    def holds(self, node_id: str) -> set[int] | None:
        """Return the copy of the set of a node that is up."""
        up = self.peer_sets.peers.get(NodeId(node_id), (0, "", False))[2]
        return self.peer_sets.sets.get((NS, NodeId(node_id))) if up else None

    def close(self) -> None:
        if self.membership:
            self.membership.close()
        self.control.close()
        self._server.close()


class HandNode:
    """A node that a test plays by hand: the test writes its entry and its stream in Redis."""

    def __init__(
        self, client: redis.Redis, wires: Wires, node_id: str, cluster_id: str = "default"
    ) -> None:
        self.client = client
        self.node_id = NodeId(node_id)
        self.logs = ChangeLogs()
        self.log = self.logs.log(NS)
        self.membership = SimpleNamespace(followers=SimpleNamespace(_node_id=self.node_id))
        self._cluster_id = cluster_id
        wires.nodes[f"{node_id}:1"] = cast(Node, self)

    def own_info(self) -> NodeInfo:
        return NodeInfo(self.node_id, self.logs.epoch, f"{self.node_id}:1", "", (NS,))

    def heartbeat(self, entry: bytes | None = None, ahead_s: float = 0.0) -> None:
        """Join the list until the expiry, as if it were ``ahead_s`` seconds later."""
        live, nodes, version = member_keys(self._cluster_id)
        self.client.zadd(live, {self.node_id: (time.time() + ahead_s) * 1000})
        self.client.hset(nodes, self.node_id, entry or encode_info(self.own_info()))
        self.client.set(version, os.urandom(8))

    def write(self, *changes: Change, entry_id: str = "*") -> None:
        """Append to the stream."""
        key = stream_key(self._cluster_id, NS, self.node_id)
        for change in changes:
            self.client.xadd(key, cast(Any, encode_change(change)), id=entry_id)

    def take(self) -> list[Change]:
        """Return the changes to write; the test may write them or not."""
        found = self.log.pending(1000)
        if found:
            self.log.published(found[-1].epoch, found[-1].first + found[-1].numbers - 1)
        return found

    def added(self, *numbers: int) -> Change:
        """Add pages; return the change."""
        self.log.add(fingerprints(*numbers))
        (change,) = self.take()
        return change
