"""Decoders of ``backends.wire``: bytes in, a value or ``WireError`` out, whatever they are given.

No length from the wire is used before it was compared with a limit and with the length of the frame it is
in. Fuzzed (``scripts/fuzz-wire``). Threads: any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from flexkv_sglang.backends.checksum import KIND_OF
from flexkv_sglang.backends.fleet.vocabulary import (
    BATCH_PAGES,
    CHANGE_KEYS,
    NAMESPACE_BYTES,
    PROTOCOL,
    Change,
    NodeId,
    NodeInfo,
    Op,
    PageStatus,
    namespace_name,
)
from flexkv_sglang.backends.fleet.wire.messages import (
    BAD_LAYOUT,
    BLOB_BYTES_MAX,
    BUDGET_MS_MAX,
    CHANGE_LAYOUT,
    CHANGES_BYTES_MAX,
    CHANGES_LAYOUT,
    CHANGES_MAX,
    CLUSTER_BYTES_MAX,
    END_LAYOUT,
    HEAD_LAYOUT,
    HELLO_LAYOUT,
    HOLD_MS_MAX,
    KEY_BYTES,
    MAGIC,
    NAMESPACES_MAX,
    NONCE_BYTES,
    NONCE_LAYOUT,
    OFFERED_LAYOUT,
    OFFERED_PAGE_LAYOUT,
    PAGES_LAYOUT,
    PART_KEYS,
    PART_LAYOUT,
    POLL_LAYOUT,
    PROOF_LAYOUT,
    READ_LAYOUT,
    REFUSED_LAYOUT,
    REQUEST_BYTES_MAX,
    RID_LAYOUT,
    SNAP_LAYOUT,
    SNAPSHOT_KEYS_MAX,
    WELCOME_LAYOUT,
    Answer,
    Bytes,
    Cancel,
    Challenge,
    Changes,
    Done,
    End,
    Hello,
    Kind,
    Offer,
    Offered,
    OfferedPage,
    Pages,
    Poll,
    Proof,
    Read,
    Refusal,
    Refused,
    ReportCorrupt,
    Request,
    SnapshotPart,
    SnapshotRequest,
    Unavailable,
    UnavailableReason,
    Welcome,
    WireError,
    stride_of,
)
from flexkv_sglang.types import PageKey

_U16 = struct.Struct("<H")


def decode_request(frames: Sequence[Bytes]) -> Request:
    """What a node is asked. Raises ``WireError``."""
    if len(frames) != 1:
        raise WireError(f"{len(frames)} frames in a request")
    frame = bytes(frames[0])
    if len(frame) > REQUEST_BYTES_MAX:
        raise WireError(f"{len(frame)} bytes in a request")
    kind = _kind(frame)
    decoder = _REQUESTS.get(kind)
    if decoder is None:
        raise WireError(f"{kind} is no request")
    return decoder(frame)


def decode_answer(frames: Sequence[Bytes]) -> Answer:
    """What a node answers; the bytes of a page stay in ``frames[1]``. Raises ``WireError``."""
    if not 1 <= len(frames) <= 2:
        raise WireError(f"{len(frames)} frames in an answer")
    if len(frames[0]) > REQUEST_BYTES_MAX:
        raise WireError(f"{len(frames[0])} bytes in the head of an answer")
    frame = bytes(frames[0])
    kind = _kind(frame)
    if kind is Kind.PAGES:
        return _pages(frame, frames)
    if kind is Kind.PART:
        return _part(frame, frames)
    if kind is Kind.CHANGES:
        return _changes(frame, frames)
    decoder = _ANSWERS.get(kind)
    if decoder is None or len(frames) != 1:
        raise WireError(f"{kind} with {len(frames)} frames is no answer")
    return decoder(frame)


def _kind(frame: bytes) -> Kind:
    if len(frame) < HEAD_LAYOUT.size:
        raise WireError(f"{len(frame)} bytes")
    magic, protocol, number = HEAD_LAYOUT.unpack_from(frame)
    kind = _KINDS.get(number)
    if magic != MAGIC or kind is None:
        raise WireError(f"unknown message {frame[:4].hex()}")
    if protocol != PROTOCOL and kind not in (Kind.HELLO, Kind.REFUSED):
        raise WireError(f"protocol {protocol}, here {PROTOCOL}")
    return kind


def _fields(layout: struct.Struct, frame: bytes, *, rest: int = 0) -> tuple[int | bytes, ...]:
    """Fields behind the head; the frame must be as long as they are and ``rest`` bytes."""
    if len(frame) != layout.size + rest:
        raise WireError(f"{len(frame)} bytes instead of {layout.size + rest}")
    return layout.unpack_from(frame)[3:]


def _count(layout: struct.Struct, frame: bytes, at: int, most: int) -> int:
    """The number at offset ``at``, before anything else is looked at."""
    if len(frame) < layout.size:
        raise WireError(f"{len(frame)} bytes, at least {layout.size}")
    count: int = _U16.unpack_from(frame, at)[0]
    if count > most:
        raise WireError(f"{count}, at most {most}")
    return count


def _hello(frame: bytes) -> Hello:
    length = _count(HELLO_LAYOUT, frame, 4 + NONCE_BYTES, CLUSTER_BYTES_MAX)
    nonce, _, _ = _fields(HELLO_LAYOUT, frame, rest=length)
    return Hello(_b(nonce), _utf8(frame[HELLO_LAYOUT.size :]), frame[2])


def _read(frame: bytes) -> Read:
    count = _count(READ_LAYOUT, frame, 4, BATCH_PAGES)
    if not count:
        raise WireError("no keys")
    _, flags, budget, request_id, namespace = _fields(READ_LAYOUT, frame, rest=count * KEY_BYTES)
    budget_ms = min(_i(budget), BUDGET_MS_MAX)
    return Read(_i(request_id), _b(namespace), budget_ms, _i(flags), _keys(frame, READ_LAYOUT.size))


def _offer(frame: bytes) -> Offer:
    return Offer(_read(frame))


def _done(frame: bytes) -> Done:
    return Done(_i(_fields(RID_LAYOUT, frame)[1]))


def _offered(frame: bytes) -> Offered:
    count = _count(OFFERED_LAYOUT, frame, 4, BATCH_PAGES)
    size = _count(OFFERED_LAYOUT, frame, 6, BLOB_BYTES_MAX)
    rest = count * OFFERED_PAGE_LAYOUT.size + size
    _, _, hold_ms, request_id, hold = map(_i, _fields(OFFERED_LAYOUT, frame, rest=rest))
    if not 1 <= hold_ms <= HOLD_MS_MAX:
        raise WireError(f"a hold of {hold_ms} ms")
    pages, at = [], OFFERED_LAYOUT.size
    for index in range(count):
        status, kind, _, length, checksum, address = OFFERED_PAGE_LAYOUT.unpack_from(frame, at)
        at += OFFERED_PAGE_LAYOUT.size
        known, written = _STATUSES.get(status), KIND_OF.get(kind)
        if known is None or written is None:
            raise WireError(f"page {index}: status {status}, checksum of kind {kind}")
        pages.append(OfferedPage(known, written, length, checksum, address))
    return Offered(request_id, hold, hold_ms, tuple(pages), frame[at:])


def _bad(frame: bytes) -> ReportCorrupt:
    count = _count(BAD_LAYOUT, frame, 4, BATCH_PAGES)
    if not count:
        raise WireError("no keys")
    _, _, namespace = _fields(BAD_LAYOUT, frame, rest=count * KEY_BYTES)
    return ReportCorrupt(_b(namespace), _keys(frame, BAD_LAYOUT.size))


def _keys(frame: bytes, start: int) -> tuple[PageKey, ...]:
    return tuple(PageKey(frame[at : at + KEY_BYTES]) for at in range(start, len(frame), KEY_BYTES))


def _pages(frame: bytes, frames: Sequence[Bytes]) -> Pages:
    if len(frame) < PAGES_LAYOUT.size:
        raise WireError(f"{len(frame)} bytes of an answer")
    index, status, kind, length, count, request_id = PAGES_LAYOUT.unpack_from(frame)[3:]
    known, written = _STATUSES.get(status), KIND_OF.get(kind)
    if known is None or written is None:
        raise WireError(f"page {index}: status {status}, checksum of kind {kind}")
    if not 1 <= count <= BATCH_PAGES - index or len(frame) != PAGES_LAYOUT.size + 8 * count:
        raise WireError(f"{count} pages from {index} on in {len(frame)} bytes")
    if known is PageStatus.OK:
        expected = (count - 1) * stride_of(length) + length
        if len(frames) != 2 or not length or len(frames[1]) != expected:
            raise WireError(f"{count} pages of {length} bytes from {index} on are other bytes")
    elif len(frames) != 1 or length or count != 1:
        raise WireError(f"page {index}: {known.name} with {len(frames)} frames")
    checksums = struct.unpack_from(f"<{count}Q", frame, PAGES_LAYOUT.size)
    return Pages(request_id, index, known, written, length, checksums)


def _part(frame: bytes, frames: Sequence[Bytes]) -> SnapshotPart:
    part, parts, request_id, epoch, last, count, checksum = map(_i, _fields(PART_LAYOUT, frame))
    if len(frames) != 2 or count > SNAPSHOT_KEYS_MAX:
        raise WireError(f"a snapshot of {count} in {len(frames)} frames")
    if parts != max(1, -(-count // PART_KEYS)) or part >= parts:
        raise WireError(f"part {part} of {parts} for {count}")
    if len(frames[1]) != 8 * min(PART_KEYS, count - part * PART_KEYS):
        raise WireError(f"part {part} of {parts} for {count}: {len(frames[1])} bytes")
    data = bytes(frames[1])
    if xxhash.xxh3_64_intdigest(data) != checksum:
        raise WireError(f"part {part} of {parts}: its checksum does not match")
    return SnapshotPart(
        request_id, part, parts, epoch, last, count, checksum, np.frombuffer(data, "<u8")
    )


def _changes(frame: bytes, frames: Sequence[Bytes]) -> Changes:
    count, _, request_id = map(_i, _fields(CHANGES_LAYOUT, frame))
    if len(frames) != 2 or count > CHANGES_MAX or len(frames[1]) > CHANGES_BYTES_MAX:
        raise WireError(f"{count} changes in {len(frames)} frames")
    body, at, changes = bytes(frames[1]), 0, []
    for _ in range(count):
        if len(body) - at < CHANGE_LAYOUT.size:
            raise WireError("changes end early")
        epoch, first, op, keys, _ = CHANGE_LAYOUT.unpack_from(body, at)
        at += CHANGE_LAYOUT.size
        known = _OPS.get(op)
        if known is None or keys > CHANGE_KEYS or len(body) - at < 8 * keys:
            raise WireError(f"change {first}: operation {op}, {keys} keys")
        if (known in (Op.ADD, Op.DROP)) != (keys > 0):
            raise WireError(f"change {first}: {known.name} with {keys} keys")
        changes.append(Change(epoch, first, known, np.frombuffer(body, "<u8", keys, at)))
        at += 8 * keys
    if at != len(body):
        raise WireError(f"{len(body) - at} bytes behind the last change")
    return Changes(_i(request_id), changes)


def _welcome(frame: bytes) -> Welcome:
    if len(frame) < WELCOME_LAYOUT.size:
        raise WireError(f"{len(frame)} bytes of a welcome")
    nonce, proof, epoch, kib, queue, names, engines, protocol = WELCOME_LAYOUT.unpack_from(frame)[
        3:
    ]
    if names > NAMESPACES_MAX or engines > 16:
        raise WireError(f"{names} namespaces, {engines} engines")
    texts, at = [], WELCOME_LAYOUT.size
    for _ in range(4 + engines):
        if at >= len(frame) or at + 1 + frame[at] > len(frame):
            raise WireError("a welcome ends early")
        texts.append(_utf8(frame[at + 1 : at + 1 + frame[at]]))
        at += 1 + frame[at]
    if len(frame) - at != names * NAMESPACE_BYTES:
        raise WireError(f"{names} namespaces in {len(frame) - at} bytes")
    spaces = tuple(
        namespace_name(frame[i : i + NAMESPACE_BYTES])
        for i in range(at, len(frame), NAMESPACE_BYTES)
    )
    node_id, address, share_group, version, *engine_names = texts
    info = NodeInfo(
        NodeId(node_id), epoch, address, share_group, spaces, tuple(engine_names), version, protocol
    )
    return Welcome(nonce, proof, info, kib << 10, queue)


def _refused(frame: bytes) -> Refused:
    (number,) = map(_i, _fields(REFUSED_LAYOUT, frame))
    reason = {r.value: r for r in Refusal}.get(number)
    if reason is None:
        raise WireError(f"refused for {number}")
    return Refused(reason)


def _gone(frame: bytes) -> Unavailable:
    number, request_id = map(_i, _fields(RID_LAYOUT, frame))
    reason = {r.value: r for r in UnavailableReason}.get(number)
    if reason is None:
        raise WireError(f"gone for {number}")
    return Unavailable(request_id, reason)


def _proof(frame: bytes) -> Proof:
    return Proof(_b(_fields(PROOF_LAYOUT, frame)[0]))


def _challenge(frame: bytes) -> Challenge:
    return Challenge(_b(_fields(NONCE_LAYOUT, frame)[0]))


def _cancel(frame: bytes) -> Cancel:
    return Cancel(_i(_fields(RID_LAYOUT, frame)[1]))


def _end(frame: bytes) -> End:
    sent, _, request_id = map(_i, _fields(END_LAYOUT, frame))
    if sent > BATCH_PAGES:
        raise WireError(f"{sent} pages sent")
    return End(request_id, sent)


def _snap(frame: bytes) -> SnapshotRequest:
    _, request_id, namespace = _fields(SNAP_LAYOUT, frame)
    return SnapshotRequest(_i(request_id), _b(namespace))


def _poll(frame: bytes) -> Poll:
    _, request_id, epoch, last, namespace = _fields(POLL_LAYOUT, frame)
    return Poll(_i(request_id), _b(namespace), _i(epoch), _i(last))


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WireError("not text") from None


def _i(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value


def _b(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


_KINDS = {kind.value: kind for kind in Kind}
_STATUSES = {status.value: status for status in PageStatus}
_OPS = {op.value: op for op in Op}
_REQUESTS: dict[Kind, Callable[[bytes], Request]] = {
    Kind.HELLO: _hello, Kind.PROOF: _proof, Kind.READ: _read, Kind.CANCEL: _cancel, Kind.BAD: _bad,
    Kind.SNAP: _snap, Kind.POLL: _poll, Kind.OFFER: _offer, Kind.DONE: _done,
}  # fmt: skip
_ANSWERS: dict[Kind, Callable[[bytes], Answer]] = {
    Kind.CHALLENGE: _challenge, Kind.WELCOME: _welcome, Kind.REFUSED: _refused, Kind.END: _end,
    Kind.GONE: _gone, Kind.OFFERED: _offered,
}  # fmt: skip
