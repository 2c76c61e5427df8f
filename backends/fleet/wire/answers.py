"""Answers: the messages that a page server sends. Each class, then how it is packed and decoded.

``decode_answer`` returns a value or raises ``WireError``, whatever bytes it gets: no length from the wire is used
before it was compared with a limit and with the length of the frame. Packing trusts its caller (asserts).
Fuzzed (``scripts/fuzz-wire``). Threads: any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

from flexkv_sglang.backends.checksum import KIND_OF, ChecksumKind
from flexkv_sglang.backends.fleet.vocabulary import (
    BATCH_PAGES,
    CHANGE_KEYS,
    NAMESPACE_BYTES,
    Change,
    NodeId,
    NodeInfo,
    Op,
    PageStatus,
    Snapshot,
    namespace_bytes,
    namespace_name,
)
from flexkv_sglang.backends.fleet.wire.protocol import (
    ID_LAYOUT,
    NONCE_BYTES,
    PROOF_BYTES,
    REQUEST_BYTES_MAX,
    Bytes,
    Kind,
    WireError,
    count_at,
    fields_of,
    head,
    kind_of,
    stride_of,
    text_of,
)
from flexkv_sglang.types import U64

TEXT_BYTES_MAX = 255
NAMESPACES_MAX = 2048
TRANSPORTS_MAX = 16
PART_KEYS = 131_072
"""Fingerprints of one part of a snapshot: 1 MiB."""

SNAPSHOT_KEYS_MAX = 1 << 27
CHANGES_BYTES_MAX = 1 << 20
CHANGES_MAX = 4096
LEASE_MS_MAX = 60_000
BLOB_BYTES_MAX = 32 << 10
"""The description of an RDMA transport's memory is no larger."""

PAGES_BYTES_MAX = 1 << 20
"""Page bytes per message (one page if it is larger). A reader that times out loses at most one message."""

_NONCE_LAYOUT = struct.Struct(f"<2sBB{NONCE_BYTES}s")
_WELCOME_LAYOUT = struct.Struct(f"<2sBB{NONCE_BYTES}s{PROOF_BYTES}sQIIHHI")
_REFUSED_LAYOUT = struct.Struct("<2sBBI")
_PAGES_LAYOUT = struct.Struct("<2sBBHBBIIQ")
_END_LAYOUT = struct.Struct("<2sBBHHQ")
_OFFERED_LAYOUT = struct.Struct("<2sBBHHIQQ")
_OFFERED_PAGE_LAYOUT = struct.Struct("<BBHIQQ")
_PART_LAYOUT = struct.Struct("<2sBBHHQQQQQ")
_CHANGES_LAYOUT = struct.Struct("<2sBBHHQ")
_CHANGE_LAYOUT = struct.Struct("<QQBxHI")


class Refusal(IntEnum):
    """Why a server does not serve this connection."""

    PROTOCOL = 1
    CLUSTER = 2
    PROOF = 3
    NO_HELLO = 4


class UnavailableReason(IntEnum):
    """Why a follower gets no snapshot or changes. LOST: the changes are not kept any more, take a snapshot."""

    UNKNOWN_NAMESPACE = 1
    LOST = 2
    BUSY = 3


_STATUSES = {status.value: status for status in PageStatus}
_OPS = {op.value: op for op in Op}
_REFUSALS = {reason.value: reason for reason in Refusal}
_REASONS = {reason.value: reason for reason in UnavailableReason}


@dataclass(frozen=True, slots=True)
class Challenge:
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """``request_bytes``: more in flight for one reader is answered BUSY. ``queue``: waiting requests, at most."""

    nonce: bytes
    proof: bytes
    info: NodeInfo
    request_bytes: int
    queue: int


@dataclass(frozen=True, slots=True)
class Refused:
    reason: Refusal


@dataclass(frozen=True, slots=True)
class PagesHeader:
    """First frame of PAGES: pages ``[index, index + len(checksums))`` of a READ; one page if it is not OK.

    OK pages are the second frame: ``length`` bytes each, from one to the next ``stride_of(length)``.
    """

    request_id: int
    index: int
    status: PageStatus
    kind: ChecksumKind
    length: int
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Ends the answer to a READ of which ``sent`` pages were answered."""

    request_id: int
    sent: int


@dataclass(frozen=True, slots=True)
class OfferedPage:
    """One page of an OFFER. ``address``: in the server's memory, if the page is OK."""

    status: PageStatus
    kind: ChecksumKind
    length: int
    checksum: int
    address: int


@dataclass(frozen=True, slots=True)
class Offered:
    """The first pages of an OFFER. They stay for ``lease_ms`` or until DONE.

    ``lease``: its number, 0: none. ``blob``: for the reader's RDMA transport.
    """

    request_id: int
    lease: int
    lease_ms: int
    pages: tuple[OfferedPage, ...]
    blob: bytes


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
    """Instead of a snapshot or changes."""

    request_id: int
    reason: UnavailableReason


Answer = (
    Challenge | Welcome | Refused | PagesHeader | End | Offered | SnapshotPart | Changes | Unavailable
)  # fmt: skip


def pack_challenge(nonce: bytes) -> list[bytes]:
    return [_NONCE_LAYOUT.pack(*head(Kind.CHALLENGE), nonce)]


def _challenge(frame: bytes) -> Challenge:
    return Challenge(*fields_of(_NONCE_LAYOUT, frame))


def pack_refused(reason: Refusal) -> list[bytes]:
    return [_REFUSED_LAYOUT.pack(*head(Kind.REFUSED), reason)]


def _refused(frame: bytes) -> Refused:
    (number,) = fields_of(_REFUSED_LAYOUT, frame)
    reason = _REFUSALS.get(number)
    if reason is None:
        raise WireError(f"refused for {number}")
    return Refused(reason)


def pack_welcome(welcome: Welcome) -> list[bytes]:
    """The names of namespaces beyond ``NAMESPACES_MAX`` are left out."""
    info = welcome.info
    names = b"".join(namespace_bytes(name) for name in info.namespaces[:NAMESPACES_MAX])
    fixed = _WELCOME_LAYOUT.pack(
        *head(Kind.WELCOME), welcome.nonce, welcome.proof, info.epoch, welcome.request_bytes >> 10,
        welcome.queue, len(names) // NAMESPACE_BYTES, len(info.engines), info.protocol,
    )  # fmt: skip
    texts = (info.node_id, info.address, info.share_group, info.version, *info.engines)
    return [fixed + b"".join(_text(text) for text in texts) + names]


def _text(text: str) -> bytes:
    data = text.encode()
    assert len(data) <= TEXT_BYTES_MAX, text
    return bytes([len(data)]) + data


def _welcome(frame: bytes) -> Welcome:
    if len(frame) < _WELCOME_LAYOUT.size:
        raise WireError(f"{len(frame)} bytes of a welcome")
    fixed = _WELCOME_LAYOUT.unpack_from(frame)[3:]
    nonce, proof, epoch, kib, queue, names, transports, protocol = fixed
    if names > NAMESPACES_MAX or transports > TRANSPORTS_MAX:
        raise WireError(f"{names} namespaces, {transports} transports")
    texts, at = [], _WELCOME_LAYOUT.size
    for _ in range(4 + transports):
        if at >= len(frame) or at + 1 + frame[at] > len(frame):
            raise WireError("a welcome ends early")
        texts.append(text_of(frame[at + 1 : at + 1 + frame[at]]))
        at += 1 + frame[at]
    if len(frame) - at != names * NAMESPACE_BYTES:
        raise WireError(f"{names} namespaces in {len(frame) - at} bytes")
    spaces = tuple(
        namespace_name(frame[i : i + NAMESPACE_BYTES])
        for i in range(at, len(frame), NAMESPACE_BYTES)
    )
    node_id, address, share_group, version, *named = texts
    info = NodeInfo(
        NodeId(node_id), epoch, address, share_group, spaces, tuple(named), version, protocol
    )
    return Welcome(nonce, proof, info, kib << 10, queue)


def pack_pages(pages: PagesHeader) -> bytes:
    """The header frame; the caller puts the bytes of OK pages behind it."""
    count = len(pages.checksums)
    assert 1 <= count <= BATCH_PAGES
    fixed = _PAGES_LAYOUT.pack(
        *head(Kind.PAGES), pages.index, pages.status, pages.kind, pages.length, count, pages.request_id
    )  # fmt: skip
    return fixed + struct.pack(f"<{count}Q", *pages.checksums)


def _pages(frame: bytes, body: Bytes | None) -> PagesHeader:
    if len(frame) < _PAGES_LAYOUT.size:
        raise WireError(f"{len(frame)} bytes of an answer")
    index, status, kind, length, count, request_id = _PAGES_LAYOUT.unpack_from(frame)[3:]
    known, checksum_kind = _page_state(index, status, kind)
    if not 1 <= count <= BATCH_PAGES - index or len(frame) != _PAGES_LAYOUT.size + 8 * count:
        raise WireError(f"{count} pages from {index} on in {len(frame)} bytes")
    if known is PageStatus.OK:
        expected = (count - 1) * stride_of(length) + length
        if body is None or not length or len(body) != expected:
            raise WireError(f"{count} pages of {length} bytes from {index} on are other bytes")
    elif body is not None or length or count != 1:
        raise WireError(f"page {index}: {known.name} with bytes")
    checksums = struct.unpack_from(f"<{count}Q", frame, _PAGES_LAYOUT.size)
    return PagesHeader(request_id, index, known, checksum_kind, length, checksums)


def _page_state(index: int, status: int, kind: int) -> tuple[PageStatus, ChecksumKind]:
    known, checksum_kind = _STATUSES.get(status), KIND_OF.get(kind)
    if known is None or checksum_kind is None:
        raise WireError(f"page {index}: status {status}, checksum of kind {kind}")
    return known, checksum_kind


def pack_end(request_id: int, sent: int) -> list[bytes]:
    return [_END_LAYOUT.pack(*head(Kind.END), sent, 0, request_id)]


def _end(frame: bytes) -> End:
    sent, _, request_id = fields_of(_END_LAYOUT, frame)
    if sent > BATCH_PAGES:
        raise WireError(f"{sent} pages sent")
    return End(request_id, sent)


def pack_offered(offered: Offered) -> list[bytes]:
    assert len(offered.pages) <= BATCH_PAGES
    assert len(offered.blob) <= BLOB_BYTES_MAX
    assert offered.lease_ms <= LEASE_MS_MAX
    fixed = _OFFERED_LAYOUT.pack(
        *head(Kind.OFFERED), len(offered.pages), len(offered.blob), offered.lease_ms,
        offered.request_id, offered.lease,
    )  # fmt: skip
    pages = [
        _OFFERED_PAGE_LAYOUT.pack(p.status, p.kind, 0, p.length, p.checksum, p.address)
        for p in offered.pages
    ]
    return [fixed + b"".join(pages) + offered.blob]


def _offered(frame: bytes) -> Offered:
    count = count_at(_OFFERED_LAYOUT, frame, 4, BATCH_PAGES)
    size = count_at(_OFFERED_LAYOUT, frame, 6, BLOB_BYTES_MAX)
    rest = count * _OFFERED_PAGE_LAYOUT.size + size
    _, _, lease_ms, request_id, lease = fields_of(_OFFERED_LAYOUT, frame, rest=rest)
    if not 1 <= lease_ms <= LEASE_MS_MAX:
        raise WireError(f"a lease of {lease_ms} ms")
    pages, at = [], _OFFERED_LAYOUT.size
    for index in range(count):
        status, kind, _, length, checksum, address = _OFFERED_PAGE_LAYOUT.unpack_from(frame, at)
        at += _OFFERED_PAGE_LAYOUT.size
        pages.append(OfferedPage(*_page_state(index, status, kind), length, checksum, address))
    return Offered(request_id, lease, lease_ms, tuple(pages), frame[at:])


def parts_of(key_count: int) -> int:
    """PART messages of a snapshot of that many fingerprints; at least one."""
    return max(1, -(-key_count // PART_KEYS))


def pack_part(request_id: int, snapshot: Snapshot, part: int) -> list[bytes]:
    """Piece ``part`` of a snapshot: header, and its fingerprints."""
    count = len(snapshot.fingerprints)
    piece = snapshot.fingerprints[part * PART_KEYS : (part + 1) * PART_KEYS]
    data = np.ascontiguousarray(piece, "<u8").tobytes()
    header = _PART_LAYOUT.pack(
        *head(Kind.PART), part, parts_of(count), request_id, snapshot.epoch, snapshot.last, count,
        xxhash.xxh3_64_intdigest(data),
    )  # fmt: skip
    return [header, data]


def _part(frame: bytes, body: Bytes | None) -> SnapshotPart:
    part, parts, request_id, epoch, last, count, checksum = fields_of(_PART_LAYOUT, frame)
    if body is None or count > SNAPSHOT_KEYS_MAX:
        raise WireError(f"a snapshot of {count}, or no fingerprints")
    if parts != parts_of(count) or part >= parts:
        raise WireError(f"part {part} of {parts} for {count}")
    if len(body) != 8 * min(PART_KEYS, count - part * PART_KEYS):
        raise WireError(f"part {part} of {parts} for {count}: {len(body)} bytes")
    data = bytes(body)
    if xxhash.xxh3_64_intdigest(data) != checksum:
        raise WireError(f"part {part} of {parts}: its checksum does not match")
    fingerprints = np.frombuffer(data, "<u8")
    return SnapshotPart(request_id, part, parts, epoch, last, count, checksum, fingerprints)


def pack_changes(request_id: int, changes: Sequence[Change]) -> list[bytes]:
    """As many of the first changes as one message takes; the follower asks for the rest."""
    body: list[bytes] = []
    count = size = 0
    for change in changes[:CHANGES_MAX]:
        keys = len(change.fingerprints)
        assert keys <= CHANGE_KEYS
        size += _CHANGE_LAYOUT.size + 8 * keys
        if size > CHANGES_BYTES_MAX:
            break
        body.append(_CHANGE_LAYOUT.pack(change.epoch, change.first, change.op, keys, 0))
        body.append(change.fingerprints.astype("<u8").tobytes())
        count += 1
    return [_CHANGES_LAYOUT.pack(*head(Kind.CHANGES), count, 0, request_id), b"".join(body)]


def _changes(frame: bytes, body: Bytes | None) -> Changes:
    count, _, request_id = fields_of(_CHANGES_LAYOUT, frame)
    if body is None or count > CHANGES_MAX or len(body) > CHANGES_BYTES_MAX:
        raise WireError(f"{count} changes, too large or without a body")
    data, at, changes = bytes(body), 0, []
    for _ in range(count):
        if len(data) - at < _CHANGE_LAYOUT.size:
            raise WireError("changes end early")
        epoch, first, op, keys, _ = _CHANGE_LAYOUT.unpack_from(data, at)
        at += _CHANGE_LAYOUT.size
        known = _OPS.get(op)
        if known is None or keys > CHANGE_KEYS or len(data) - at < 8 * keys:
            raise WireError(f"change {first}: operation {op}, {keys} keys")
        if (known in (Op.ADD, Op.DROP)) != (keys > 0):
            raise WireError(f"change {first}: {known.name} with {keys} keys")
        changes.append(Change(epoch, first, known, np.frombuffer(data, "<u8", keys, at)))
        at += 8 * keys
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes behind the last change")
    return Changes(request_id, changes)


def pack_unavailable(request_id: int, reason: UnavailableReason) -> list[bytes]:
    return [ID_LAYOUT.pack(*head(Kind.UNAVAILABLE), reason, request_id)]


def _unavailable(frame: bytes) -> Unavailable:
    number, request_id = fields_of(ID_LAYOUT, frame)
    reason = _REASONS.get(number)
    if reason is None:
        raise WireError(f"unavailable for {number}")
    return Unavailable(request_id, reason)


_DECODERS: dict[Kind, Callable[[bytes], Answer]] = {
    Kind.CHALLENGE: _challenge,
    Kind.WELCOME: _welcome,
    Kind.REFUSED: _refused,
    Kind.END: _end,
    Kind.OFFERED: _offered,
    Kind.UNAVAILABLE: _unavailable,
}
_BODY_DECODERS: dict[Kind, Callable[[bytes, Bytes | None], Answer]] = {
    Kind.PAGES: _pages,
    Kind.PART: _part,
    Kind.CHANGES: _changes,
}


def decode_answer(frames: Sequence[Bytes]) -> Answer:
    """The answer in these frames; the bytes of pages stay in ``frames[1]``. Raises ``WireError``."""
    if not 1 <= len(frames) <= 2:
        raise WireError(f"{len(frames)} frames in an answer")
    if len(frames[0]) > REQUEST_BYTES_MAX:
        raise WireError(f"{len(frames[0])} bytes in the head of an answer")
    frame = bytes(frames[0])
    kind = kind_of(frame)
    with_body = _BODY_DECODERS.get(kind)
    if with_body is not None:
        return with_body(frame, frames[1] if len(frames) == 2 else None)
    decoder = _DECODERS.get(kind)
    if decoder is None or len(frames) != 1:
        raise WireError(f"{kind} with {len(frames)} frames is no answer")
    return decoder(frame)
