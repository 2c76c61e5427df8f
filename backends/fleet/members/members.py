"""Which other nodes there are, from all that say so: Redis and static peers. Pure.

A node is *up* while any source lists it, *down* when none does any more, and gone a minute later. A source that
says nothing changes nothing: silence of Redis is no news of its members.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from flexkv_sglang.backends.fleet.vocabulary import Change, NodeId, NodeInfo

REMOVE_AFTER_S = 60.0
"""A node that is down this long is forgotten."""

MEMBERS_MAX = 1000
"""Nodes known at most; the replica's table has 1024 places."""


class FeedHost(Protocol):
    """What a feed tells the roster, and asks it. Any thread."""

    def own_info(self) -> NodeInfo:
        """What this node tells of itself, with the name it has now."""
        ...

    def update_members(self, source: str, infos: list[NodeInfo], grace_s: float = 0.0) -> None:
        """These nodes are there, and no others. ``hold_s``: who is missing stays for that long."""
        ...

    def own_name_seen(self, source: str, info: NodeInfo | None) -> None:
        """Once per beat: who else uses this node's name (None: nobody)."""
        ...

    def followed(self) -> list[tuple[str, NodeId]]:
        """(namespace, node) of every feed that is wanted."""
        ...

    def position(self, namespace: str, node_id: NodeId) -> tuple[int, int] | None:
        """(epoch, last number) for POLL; None: nothing to ask now."""
        ...

    def changed(self, namespace: str, node_id: NodeId, changes: list[Change]) -> None:
        """Entries of a feed."""
        ...

    def gap(self, namespace: str, node_id: NodeId) -> None:
        """Changes of a feed are not kept any more."""
        ...

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a metric."""
        ...


@dataclass(slots=True)
class Member:
    """Another node. ``down_since``: ``time.monotonic()`` seconds, None while it is up."""

    info: NodeInfo
    down_since: float | None = None

    @property
    def up(self) -> bool:
        """Does any source list it?"""
        return self.down_since is None


class Members:
    """All other nodes, up or down. Not thread-safe. ``now``: ``time.monotonic()`` seconds."""

    def __init__(self) -> None:
        self._sources: dict[str, dict[NodeId, NodeInfo]] = {}
        self._grace_until: dict[str, float] = {}
        self.known: dict[NodeId, Member] = {}
        self.refused = 0

    def update_members(
        self, source: str, infos: Iterable[NodeInfo], now: float, grace_s: float = 0.0
    ) -> None:
        """A source lists these, and no others. ``hold_s``: for so long it may be missing some."""
        until = self._grace_until.get(source, 0.0)
        if grace_s:
            until = self._grace_until[source] = max(until, now + grace_s)
        present = {info.node_id: info for info in infos}
        if now < until:
            present = {**self._sources.get(source, {}), **present}
        self._sources[source] = present
        self._reconcile(now)

    def tick(self, now: float) -> list[NodeId]:
        """Forget who has been down for long, and say whom."""
        gone = [
            node_id
            for node_id, member in self.known.items()
            if member.down_since is not None and now - member.down_since >= REMOVE_AFTER_S
        ]
        for node_id in gone:
            del self.known[node_id]
        return gone

    def _reconcile(self, now: float) -> None:
        """Static sources first: their nodes answered themselves, while an entry in Redis may be older."""
        present: dict[NodeId, NodeInfo] = {}
        for source in sorted(self._sources, key=lambda name: (name == "redis", name)):
            for node_id, info in self._sources[source].items():
                present.setdefault(node_id, info)
        self.refused = 0
        for node_id in sorted(present):
            member = self.known.get(node_id)
            if member is not None:
                member.info, member.down_since = present[node_id], None
            elif len(self.known) < MEMBERS_MAX:
                self.known[node_id] = Member(present[node_id])
            else:
                self.refused += 1
        for node_id, member in self.known.items():
            if node_id not in present and member.down_since is None:
                member.down_since = now
