"""Types that cross a node boundary: fingerprints, changes, snapshots, nodes.

A *node* is one agent process and the directories it serves. A *fingerprint* is the first 8 bytes of a page's key:
enough for a lookup (a collision costs a miss), while a read carries the whole key. The *epoch* of a node is a random
number, drawn at each start of its agent and when the node lost count of its changes. Within an epoch a node numbers
the changes of its set of pages, per namespace: (epoch, number) shows a follower whether it missed any.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType, Protocol

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.types import U64, PageKey

PROTOCOL = 2
"""Version of the wire and of the entries in Redis. Nodes of different versions do not see each other."""

NAMESPACE_BYTES = 16
"""Length of a namespace on the wire: the digest that its 26-character name spells in base32."""

BATCH_PAGES = 128
"""Limit of pages per read request; SGLang reads as many at a time."""

CHANGE_KEYS = 512
"""Limit of fingerprints per change."""

NodeId = NewType("NodeId", str)


class Op(IntEnum):
    """Kind of a change. HEARTBEAT carries no fingerprints, only the next number: a follower sees what it missed."""

    ADD = 1
    DROP = 2
    CLEAR = 3
    HEARTBEAT = 4


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a node's change feed for one namespace.

    ``fingerprints``: uint64 ``[n]``, numbered ``first`` to ``first + n - 1``. CLEAR has no fingerprints and takes one
    number; HEARTBEAT has none and takes none: its ``first`` is the number of the next change.
    """

    epoch: int
    first: int
    op: Op
    fingerprints: U64

    @property
    def numbers(self) -> int:
        """Count of numbers that this change takes."""
        return {Op.CLEAR: 1, Op.HEARTBEAT: 0}.get(self.op, len(self.fingerprints))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All pages of one node in one namespace: ``fingerprints`` uint64 ``[n]``, sorted; up to change ``last``."""

    epoch: int
    last: int
    fingerprints: U64


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node's entry for other nodes. ``address``: "host:port" of its page server.

    ``epoch``: 64 random bits, never 0. ``share_group``: nodes with the same label follow each other.
    ``namespaces``: names of the namespaces it has pages of.
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
    """Result for one page of a read. Only OK carries bytes.

    MISS: not here, or changed during the read. BUSY: a limit was reached; ask again in a moment. LATE: the reader's
    time was over. UNKNOWN_NAMESPACE: no directory of this node has the namespace.
    """

    OK = 0
    MISS = 1
    BUSY = 2
    UNKNOWN_NAMESPACE = 3
    LATE = 4


@dataclass(frozen=True, slots=True)
class ServedPage:
    """A page in the server's memory. The checksum is the one in its owner's journal, never a new one."""

    status: PageStatus
    kind: ChecksumKind = ChecksumKind.NONE
    checksum: int = 0


MISSING = ServedPage(PageStatus.MISS)


class PageSource(Protocol):
    """Pages of one namespace on this node, for the page server. Any thread.

    ``sharing/node_pages.py`` implements it, on a floor that this folder must not import.
    """

    payload_bytes: int

    def read(
        self, keys: Sequence[PageKey], addresses: Sequence[int], deadline: float
    ) -> list[ServedPage]:
        """Read pages into memory at ``addresses`` (4096-aligned, ``round_up(payload_bytes, 4096)`` bytes each).

        One result per key. After the return nothing is written there any more. The bytes of an OK page match its
        checksum unless the medium damaged them: the reader verifies. ``deadline``: ``time.monotonic()`` seconds.
        A failing disk is a MISS and raises nothing.
        """
        ...

    def reported_bad(self, keys: Sequence[PageKey]) -> None:
        """Verify pages that failed their checksum at a reader, and hide the bad ones."""
        ...


class ChangeLog(Protocol):
    """A node's own changes in one namespace, for the page server (``members/change_log.py``). Any thread."""

    def since(self, epoch: int, last: int) -> list[Change] | None:
        """Changes after number ``last`` of ``epoch``; None: they are no longer kept, take a snapshot."""
        ...

    def snapshot(self) -> Snapshot:
        """Return all pages of now."""
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


def fingerprints_of(keys: Sequence[PageKey]) -> U64:
    """uint64 ``[n]``: the first 8 bytes of each key, little-endian."""
    return np.frombuffer(b"".join([key[:8] for key in keys]), "<u8").astype(np.uint64, copy=False)


def namespace_bytes(name: str) -> bytes:
    """16 bytes of a namespace's 26-character name. Raises ``ValueError`` for any other text."""
    digest = base64.b32decode(name.upper() + "=" * 6)
    if len(digest) != NAMESPACE_BYTES or namespace_name(digest) != name:
        raise ValueError(f"{name!r} is not a namespace")
    return digest


def namespace_name(digest: bytes) -> str:
    """The name of a namespace's 16 bytes."""
    return base64.b32encode(digest).decode().rstrip("=").lower()
