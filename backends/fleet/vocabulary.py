"""Words shared by everything that crosses a node boundary: fingerprints, changes, snapshots, nodes.

A *node* is one agent process and the directories it serves. A page is known to other nodes by its
*fingerprint*, the first 8 bytes of its key: enough to look a page up (a collision costs a miss), while a read
always carries the whole key. A node numbers the changes of its set of pages per namespace; (epoch, number)
tells a follower whether it has missed any. Imports nothing of ours but types and the checksum.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType, Protocol

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.config.share import ShareConfig as ShareConfig
from flexkv_sglang.types import U64, PageKey

PROTOCOL = 2
"""Version of the wire and of what is in Redis. Nodes of different versions do not see each other."""

NAMESPACE_BYTES = 16
"""A namespace on the wire: the digest that its 26-character name spells in base32."""

BATCH_PAGES = 128
"""Pages of one read request at most; SGLang asks for as many at a time."""

CHANGE_KEYS = 512
"""Fingerprints of one change at most."""

NodeId = NewType("NodeId", str)


class Op(IntEnum):
    """What a change says of its fingerprints. KEEP says nothing: it shows a follower that it is up to date."""

    ADD = 1
    DROP = 2
    CLEAR = 3
    HEARTBEAT = 4


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a node's change feed for one namespace.

    ``fingerprints``: uint64 ``[n]``, numbered ``first`` to ``first + n - 1``. CLEAR has no fingerprints and takes one
    number; KEEP has none and takes none: its ``first`` is the number the next change will have.
    """

    epoch: int
    first: int
    op: Op
    fingerprints: U64

    @property
    def numbers(self) -> int:
        """How many numbers this change takes."""
        return {Op.CLEAR: 1, Op.HEARTBEAT: 0}.get(self.op, len(self.fingerprints))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All pages of one node in one namespace: ``fingerprints`` uint64 ``[n]``, sorted; up to change ``last``."""

    epoch: int
    last: int
    fingerprints: U64


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a node tells others of itself. ``address``: "host:port" of its page server.

    ``epoch``: 64 random bits per agent start, and anew when it lost count of its changes. ``share_group``: nodes
    with the same label follow each other. ``namespaces``: names of those it holds pages of.
    """

    node_id: NodeId
    epoch: int
    address: str
    share_group: str = ""
    namespaces: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("zmq",)
    version: str = ""
    protocol: int = PROTOCOL


class PageStatus(IntEnum):
    """Of one page, in an answer to a read. Only OK carries bytes.

    MISS: not here, or changed while it was read. BUSY: limits; ask again in a moment. LATE: the reader's
    budget was over. UNKNOWN_NAMESPACE: no directory of this node has it.
    """

    OK = 0
    MISS = 1
    BUSY = 2
    UNKNOWN_NAMESPACE = 3
    LATE = 4


@dataclass(frozen=True, slots=True)
class ServedPage:
    """A page in the server's memory: what its owner's journal says of its bytes, never computed anew."""

    status: PageStatus
    kind: ChecksumKind = ChecksumKind.NONE
    checksum: int = 0


MISSING = ServedPage(PageStatus.MISS)


class PageSource(Protocol):
    """Pages of one namespace on this node, for the page server. Any thread."""

    payload_bytes: int

    def read(
        self, keys: Sequence[PageKey], addresses: Sequence[int], deadline: float
    ) -> list[ServedPage]:
        """Read pages into memory at ``addresses`` (4096-aligned, ``round_up(payload_bytes, 4096)`` bytes each).

        One answer per key. When this returns nothing is written there any more, and the bytes of every OK
        page are those that the checksum is of, or were damaged on the medium: the reader verifies.
        ``deadline``: ``time.monotonic()`` seconds. Never raises for a failing disk: MISS.
        """
        ...

    def reported_bad(self, keys: Sequence[PageKey]) -> None:
        """A reader says that these pages fail their checksum: verify, and hide those that do."""
        ...


class ChangeLog(Protocol):
    """A node's own changes in one namespace, for the page server. Any thread."""

    def since(self, epoch: int, last: int) -> list[Change] | None:
        """Changes after number ``last`` of ``epoch``; None: they are not kept any more, take a snapshot."""
        ...

    def snapshot(self) -> Snapshot:
        """All pages now."""
        ...


class ServedNode(Protocol):
    """This node, for its page server. Any thread."""

    def info(self) -> NodeInfo:
        """Describe the node for a greeting."""
        ...

    def pages_of(self, namespace: str) -> PageSource | None:
        """Its pages in a namespace; None: it has none."""
        ...

    def changes_of(self, namespace: str) -> ChangeLog | None:
        """Its changes in a namespace; None: it has none."""
        ...


class PeerControl(Protocol):
    """Questions of an agent to another node's agent. Each blocks for ``timeout_s`` at most. Any thread.

    Raises ``PeerError`` when there is no valid answer in time.
    """

    def hello(self, address: str, timeout_s: float) -> NodeInfo:
        """Who is there?"""
        ...

    def poll(
        self, address: str, namespace: str, epoch: int, last: int, timeout_s: float
    ) -> list[Change] | None:
        """As ``ChangeLog.since`` of that node."""
        ...

    def snapshot(self, address: str, namespace: str, timeout_s: float) -> Snapshot:
        """As ``ChangeLog.snapshot`` of that node."""
        ...


def fingerprints_of(keys: Sequence[PageKey]) -> U64:
    """uint64 ``[n]``: the first 8 bytes of each key, little-endian."""
    return np.frombuffer(b"".join([key[:8] for key in keys]), "<u8").astype(np.uint64, copy=False)


def namespace_bytes(name: str) -> bytes:
    """16 bytes of a namespace's 26-character name. Raises ``ValueError`` if it is none."""
    digest = base64.b32decode(name.upper() + "=" * 6)
    if len(digest) != NAMESPACE_BYTES or namespace_name(digest) != name:
        raise ValueError(f"{name!r} is not a namespace")
    return digest


def namespace_name(digest: bytes) -> str:
    """The name of a namespace's 16 bytes."""
    return base64.b32encode(digest).decode().rstrip("=").lower()
