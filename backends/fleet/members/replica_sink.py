"""Where a roster writes what it knows of other nodes. ``PeerSetsWriter`` is the real one."""

from __future__ import annotations

from typing import Protocol

from flexkv_sglang.backends.fleet.vocabulary import NodeId, Op, Snapshot
from flexkv_sglang.types import U64


class ReplicaSink(Protocol):
    """The sets of other nodes, as the ranks of this node see them. One thread at a time: the roster's lock.

    May raise ``OSError`` or ``FlexKVError`` (a full disk): the roster counts it and asks for a snapshot later.
    """

    def set_peer(self, node_id: NodeId, epoch: int, address: str, up: bool) -> None:
        """A node is there, or has changed. ``up`` False: look-ups skip it."""
        ...

    def remove_peer(self, node_id: NodeId) -> None:
        """A node is gone, with all its sets."""
        ...

    def reset(self, namespace: str, node_id: NodeId, snapshot: Snapshot) -> None:
        """Replace a node's set."""
        ...

    def apply(self, namespace: str, node_id: NodeId, op: Op, fingerprints: U64) -> None:
        """ADD, DROP or CLEAR."""
        ...

    def drop(self, namespace: str, node_id: NodeId) -> None:
        """Forget a node's set until the next ``reset``."""
        ...

    def heartbeat(self) -> None:
        """The writer lives. Every 200 ms."""
        ...

    def tick(self) -> None:
        """Merges and tidies. Every second."""
        ...
