"""Every message between nodes: little-endian structs in ZeroMQ frames. docs/DATA_FILE.md lists every byte.

Bytes in, a value or ``WireError`` out; nothing else leaves a decoder, whatever it is given. No length from
the wire is used before it was compared with a limit of this module and with the length of the frame it is
in. Packing trusts its caller (asserts). No sockets here. Threads: any.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.vocabulary import (
    BATCH_PAGES,
    CHANGE_KEYS,
    NAMESPACE_BYTES,
    PROTOCOL,
    Change,
    NodeInfo,
    PageStatus,
    Snapshot,
    namespace_bytes,
)
from flexkv_sglang.errors import PeerError
from flexkv_sglang.types import SECTOR, U64, PageKey, round_up

KEY_BYTES = 32
NONCE_BYTES = 16
PROOF_BYTES = 32
CLUSTER_BYTES_MAX = 128
TEXT_BYTES_MAX = 255
NAMESPACES_MAX = 2048
REQUEST_BYTES_MAX = 64 << 10
"""Largest frame that a server takes, and largest answer but for the bytes of pages and snapshots."""

BUDGET_MS_MAX = 60_000
PART_KEYS = 131_072
"""Fingerprints of one part of a snapshot: 1 MiB."""

SNAPSHOT_KEYS_MAX = 1 << 27
CHANGES_BYTES_MAX = 1 << 20
CHANGES_MAX = 4096
HOLD_MS_MAX = 60_000
BLOB_BYTES_MAX = 32 << 10
"""What a one-sided engine says of its memory, at most."""

PAGES_BYTES_MAX = 1 << 20
"""Bytes of pages in one message, but for a page that is larger by itself. What is late is lost by the message."""

STOP_AT_FIRST = 1
"""Flag of READ: the first page that is not OK is the last that is answered."""

MAGIC = b"fk"
HEAD_LAYOUT = struct.Struct("<2sBB")
READ_LAYOUT = struct.Struct(f"<2sBBHHIQ{NAMESPACE_BYTES}s")
PAGES_LAYOUT = struct.Struct("<2sBBHBBIIQ")
END_LAYOUT = struct.Struct("<2sBBHHQ")
RID_LAYOUT = struct.Struct("<2sBBIQ")
BAD_LAYOUT = struct.Struct(f"<2sBBHH{NAMESPACE_BYTES}s")
SNAP_LAYOUT = struct.Struct(f"<2sBBIQ{NAMESPACE_BYTES}s")
POLL_LAYOUT = struct.Struct(f"<2sBBIQQQ{NAMESPACE_BYTES}s")
PART_LAYOUT = struct.Struct("<2sBBHHQQQQQ")
CHANGES_LAYOUT = struct.Struct("<2sBBHHQ")
CHANGE_LAYOUT = struct.Struct("<QQBxHI")
OFFERED_LAYOUT = struct.Struct("<2sBBHHIQQ")
OFFERED_PAGE_LAYOUT = struct.Struct("<BBHIQQ")
HELLO_LAYOUT = struct.Struct(f"<2sBB{NONCE_BYTES}sHH")
NONCE_LAYOUT = struct.Struct(f"<2sBB{NONCE_BYTES}s")
PROOF_LAYOUT = struct.Struct(f"<2sBB{PROOF_BYTES}s")
REFUSED_LAYOUT = struct.Struct("<2sBBI")
WELCOME_LAYOUT = struct.Struct(f"<2sBB{NONCE_BYTES}s{PROOF_BYTES}sQIIHHI")


class WireError(PeerError):
    """A message that is none of ours."""


class Kind(IntEnum):
    """Fourth byte of every message."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    READ = 6
    PAGES = 7
    END = 8
    CANCEL = 9
    BAD = 10
    SNAP = 11
    PART = 12
    POLL = 13
    CHANGES = 14
    GONE = 15
    OFFER = 16
    OFFERED = 17
    DONE = 18


class Refusal(IntEnum):
    """Why a node does not talk to another."""

    PROTOCOL = 1
    CLUSTER = 2
    PROOF = 3
    NO_HELLO = 4


class UnavailableReason(IntEnum):
    """Why there is no answer to SNAP or POLL. LOST: the changes are not kept any more, take a snapshot."""

    UNKNOWN_NAMESPACE = 1
    LOST = 2
    BUSY = 3


@dataclass(frozen=True, slots=True)
class Hello:
    nonce: bytes
    cluster_id: str
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Challenge:
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Proof:
    proof: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """``request_bytes``: more in flight for one reader is answered BUSY. ``queue``: requests that wait, at most."""

    nonce: bytes
    proof: bytes
    info: NodeInfo
    request_bytes: int
    queue: int


@dataclass(frozen=True, slots=True)
class Refused:
    reason: Refusal


@dataclass(frozen=True, slots=True)
class Read:
    """``namespace``: its 16 bytes. ``keys``: 1 to 128 of them, 32 bytes each."""

    request_id: int
    namespace: bytes
    budget_ms: int
    flags: int
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class Pages:
    """The header of the answer for pages ``[index, index + len(checksums))`` of a READ; one page if it is not OK.

    OK pages are the frame behind it: ``length`` bytes each, from one to the next ``stride_of(length)``.
    """

    request_id: int
    index: int
    status: PageStatus
    kind: ChecksumKind
    length: int
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    request_id: int
    sent: int


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: int


@dataclass(frozen=True, slots=True)
class ReportCorrupt:
    namespace: bytes
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    request_id: int
    namespace: bytes


@dataclass(frozen=True, slots=True)
class Poll:
    request_id: int
    namespace: bytes
    epoch: int
    last: int


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """One of ``parts`` pieces of a snapshot of ``count`` fingerprints; ``checksum``: xxh3_64 of this piece."""

    request_id: int
    part: int
    parts: int
    epoch: int
    last: int
    count: int
    checksum: int
    fingerprints: U64


@dataclass(frozen=True, slots=True)
class Changes:
    request_id: int
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class Unavailable:
    request_id: int
    reason: UnavailableReason


@dataclass(frozen=True, slots=True)
class Offer:
    """As READ, but the pages stay in the server's memory, where the reader's engine fetches them."""

    read: Read


@dataclass(frozen=True, slots=True)
class OfferedPage:
    """A page at ``address`` of the server's memory, if it is OK."""

    status: PageStatus
    kind: ChecksumKind
    length: int
    checksum: int
    address: int


@dataclass(frozen=True, slots=True)
class Offered:
    """The first pages of an OFFER: they stay for ``hold_ms`` or until DONE. ``blob``: for the reader's engine."""

    request_id: int
    hold: int
    hold_ms: int
    pages: tuple[OfferedPage, ...]
    blob: bytes


@dataclass(frozen=True, slots=True)
class Done:
    hold: int


Request = Hello | Proof | Read | Cancel | ReportCorrupt | SnapshotRequest | Poll | Offer | Done
Answer = (
    Challenge | Welcome | Refused | Pages | End | SnapshotPart | Changes | Unavailable | Offered
)
Bytes = bytes | memoryview


def stride_of(length: int) -> int:
    """From one page of a message to the next, bytes: as in a slot file. What is between them is zero."""
    return round_up(length, SECTOR)


def _head(kind: Kind) -> tuple[bytes, int, int]:
    return (MAGIC, PROTOCOL, kind)


def pack_hello(hello: Hello) -> list[bytes]:
    cluster = hello.cluster_id.encode()
    assert len(cluster) <= CLUSTER_BYTES_MAX
    head = (MAGIC, hello.protocol, Kind.HELLO)
    return [HELLO_LAYOUT.pack(*head, hello.nonce, len(cluster), 0) + cluster]


def pack_challenge(nonce: bytes) -> list[bytes]:
    return [NONCE_LAYOUT.pack(*_head(Kind.CHALLENGE), nonce)]


def pack_proof(proof: bytes) -> list[bytes]:
    return [PROOF_LAYOUT.pack(*_head(Kind.PROOF), proof)]


def pack_refused(reason: Refusal) -> list[bytes]:
    return [REFUSED_LAYOUT.pack(*_head(Kind.REFUSED), reason)]


def pack_welcome(welcome: Welcome) -> list[bytes]:
    """The names of namespaces beyond ``NAMESPACES_MAX`` are left out."""
    info = welcome.info
    names = b"".join(namespace_bytes(name) for name in info.namespaces[:NAMESPACES_MAX])
    fixed = WELCOME_LAYOUT.pack(
        *_head(Kind.WELCOME), welcome.nonce, welcome.proof, info.epoch, welcome.request_bytes >> 10,
        welcome.queue, len(names) // NAMESPACE_BYTES, len(info.engines), info.protocol,
    )  # fmt: skip
    texts = (info.node_id, info.address, info.share_group, info.version, *info.engines)
    return [fixed + b"".join(_text(text) for text in texts) + names]


def pack_read(read: Read, kind: Kind = Kind.READ) -> list[bytes]:
    """READ, or OFFER of the same pages."""
    assert 1 <= len(read.keys) <= BATCH_PAGES
    budget = min(max(0, read.budget_ms), BUDGET_MS_MAX)
    fixed = READ_LAYOUT.pack(
        *_head(kind), len(read.keys), read.flags, budget, read.request_id, read.namespace
    )
    return [fixed + b"".join(read.keys)]


def pack_pages(pages: Pages) -> bytes:
    """The header frame; the caller puts the bytes of OK pages behind it."""
    count = len(pages.checksums)
    assert 1 <= count <= BATCH_PAGES
    fixed = PAGES_LAYOUT.pack(
        *_head(Kind.PAGES),
        pages.index,
        pages.status,
        pages.kind,
        pages.length,
        count,
        pages.request_id,
    )
    return fixed + struct.pack(f"<{count}Q", *pages.checksums)


def pack_end(request_id: int, sent: int) -> list[bytes]:
    return [END_LAYOUT.pack(*_head(Kind.END), sent, 0, request_id)]


def pack_cancel(request_id: int) -> list[bytes]:
    return [RID_LAYOUT.pack(*_head(Kind.CANCEL), 0, request_id)]


def pack_bad(namespace: bytes, keys: Sequence[PageKey]) -> list[bytes]:
    assert 1 <= len(keys) <= BATCH_PAGES
    return [BAD_LAYOUT.pack(*_head(Kind.BAD), len(keys), 0, namespace) + b"".join(keys)]


def pack_snap(request_id: int, namespace: bytes) -> list[bytes]:
    return [SNAP_LAYOUT.pack(*_head(Kind.SNAP), 0, request_id, namespace)]


def pack_poll(poll: Poll) -> list[bytes]:
    return [
        POLL_LAYOUT.pack(
            *_head(Kind.POLL), 0, poll.request_id, poll.epoch, poll.last, poll.namespace
        )
    ]


def pack_gone(request_id: int, reason: UnavailableReason) -> list[bytes]:
    return [RID_LAYOUT.pack(*_head(Kind.GONE), reason, request_id)]


def snapshot_parts(snapshot: Snapshot) -> int:
    """How many PART messages it takes; at least one."""
    return max(1, -(-len(snapshot.fingerprints) // PART_KEYS))


def pack_part(request_id: int, snapshot: Snapshot, part: int) -> list[bytes]:
    """Piece ``part`` of a snapshot: header, and its fingerprints."""
    piece = np.ascontiguousarray(
        snapshot.fingerprints[part * PART_KEYS : (part + 1) * PART_KEYS], "<u8"
    )
    data = piece.tobytes()
    header = PART_LAYOUT.pack(
        *_head(Kind.PART), part, snapshot_parts(snapshot), request_id, snapshot.epoch, snapshot.last,
        len(snapshot.fingerprints), xxhash.xxh3_64_intdigest(data),
    )  # fmt: skip
    return [header, data]


def pack_changes(request_id: int, changes: Sequence[Change]) -> list[bytes]:
    """As many of the first changes as one message takes; the follower asks for the rest."""
    body, count = [], 0
    size = 0
    for change in changes[:CHANGES_MAX]:
        assert len(change.fingerprints) <= CHANGE_KEYS
        size += CHANGE_LAYOUT.size + 8 * len(change.fingerprints)
        if size > CHANGES_BYTES_MAX:
            break
        body.append(
            CHANGE_LAYOUT.pack(change.epoch, change.first, change.op, len(change.fingerprints), 0)
        )
        body.append(change.fingerprints.astype("<u8").tobytes())
        count += 1
    return [CHANGES_LAYOUT.pack(*_head(Kind.CHANGES), count, 0, request_id), b"".join(body)]


def _text(text: str) -> bytes:
    data = text.encode()
    assert len(data) <= TEXT_BYTES_MAX, text
    return bytes([len(data)]) + data
