"""Members: the other nodes, as Redis and static peers list them. Pure.

A node is *up* while any source lists it, *down* when none does any more, and removed a minute later. A silent
source changes nothing: when Redis is absent, its members stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexkv_sglang.backends.fleet.vocabulary import NodeId, NodeInfo

REMOVE_AFTER_S = 60.0
"""A node that is down for this long is removed."""

MEMBERS_MAX = 1000
"""Limit of known nodes; the table in ``replica/files.py`` has 1024 slots."""


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
    """All other nodes, up or down. Not thread-safe. ``now``: ``time.monotonic()`` seconds.

    ``refused``: the number of listed nodes beyond the limit.
    """

    def __init__(self) -> None:
        self._sources: dict[str, dict[NodeId, NodeInfo]] = {}
        self._grace_until: dict[str, float] = {}
        self.known: dict[NodeId, Member] = {}
        self.refused = 0

    def update_members(
        self, source: str, infos: Iterable[NodeInfo], now: float, grace_s: float = 0.0
    ) -> None:
        """A source lists these, and no others. ``grace_s``: for so long it may be missing some."""
        until = self._grace_until.get(source, 0.0)
        if grace_s:
            until = self._grace_until[source] = max(until, now + grace_s)
        present = {info.node_id: info for info in infos}
        if now < until:
            present = {**self._sources.get(source, {}), **present}
        self._sources[source] = present
        self._reconcile(now)

    def tick(self, now: float) -> list[NodeId]:
        """Remove the nodes that have been down for a minute; return them."""
        gone = [
            node_id
            for node_id, member in self.known.items()
            if member.down_since is not None and now - member.down_since >= REMOVE_AFTER_S
        ]
        for node_id in gone:
            del self.known[node_id]
        return gone

    def _reconcile(self, now: float) -> None:
        # Static sources first: their nodes answered themselves, while an entry in Redis may be older.
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
