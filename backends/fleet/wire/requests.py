"""Requests: the messages that readers and followers send. Each class, then how it is packed and decoded.

``decode_request`` returns a value or raises ``WireError``, whatever bytes it gets: no length from the wire is used
before it was compared with a limit and with the length of the frame. Packing trusts its caller (asserts).
Fuzzed (``scripts/fuzz-wire``). Threads: any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexkv_sglang.backends.fleet.vocabulary import BATCH_PAGES, NAMESPACE_BYTES, PROTOCOL
from flexkv_sglang.backends.fleet.wire.protocol import (
    ID_LAYOUT,
    KEY_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    REQUEST_BYTES_MAX,
    Bytes,
    Kind,
    WireError,
    count_at,
    fields_of,
    head,
    keys_from,
    kind_of,
    text_of,
)
from flexkv_sglang.types import PageKey

CLUSTER_BYTES_MAX = 128
BUDGET_MS_MAX = 60_000
STOP_AT_FIRST = 1
"""Flag of READ: the first page that is not OK is the last that is answered."""

_HELLO_LAYOUT = struct.Struct(f"<2sBB{NONCE_BYTES}sHH")
_PROOF_LAYOUT = struct.Struct(f"<2sBB{PROOF_BYTES}s")
_READ_LAYOUT = struct.Struct(f"<2sBBHHIQ{NAMESPACE_BYTES}s")
_REPORT_LAYOUT = struct.Struct(f"<2sBBHH{NAMESPACE_BYTES}s")
_SNAPSHOT_LAYOUT = struct.Struct(f"<2sBBIQ{NAMESPACE_BYTES}s")
_POLL_LAYOUT = struct.Struct(f"<2sBBIQQQ{NAMESPACE_BYTES}s")


@dataclass(frozen=True, slots=True)
class Hello:
    nonce: bytes
    cluster_id: str
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Proof:
    proof: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """``namespace``: its 16 bytes. ``keys``: 1 to 128 of them, 32 bytes each."""

    request_id: int
    namespace: bytes
    budget_ms: int
    flags: int
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """As READ, but the pages stay in the server's memory, where the reader's RDMA transport fetches them."""

    read: Read


@dataclass(frozen=True, slots=True)
class Done:
    """The reader has finished with a lease of an OFFERED."""

    lease: int


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: int


@dataclass(frozen=True, slots=True)
class ReportCorrupt:
    """A hint: pages whose bytes did not match their checksum. No answer."""

    namespace: bytes
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    request_id: int
    namespace: bytes


@dataclass(frozen=True, slots=True)
class Poll:
    """Asks for the changes after number ``last`` of ``epoch``."""

    request_id: int
    namespace: bytes
    epoch: int
    last: int


Request = Hello | Proof | Read | Offer | Done | Cancel | ReportCorrupt | SnapshotRequest | Poll


def pack_hello(hello: Hello) -> list[bytes]:
    cluster = hello.cluster_id.encode()
    assert len(cluster) <= CLUSTER_BYTES_MAX
    fixed = _HELLO_LAYOUT.pack(*head(Kind.HELLO, hello.protocol), hello.nonce, len(cluster), 0)
    return [fixed + cluster]


def _hello(frame: bytes) -> Hello:
    length = count_at(_HELLO_LAYOUT, frame, 4 + NONCE_BYTES, CLUSTER_BYTES_MAX)
    nonce, _, _ = fields_of(_HELLO_LAYOUT, frame, rest=length)
    return Hello(nonce, text_of(frame[_HELLO_LAYOUT.size :]), frame[2])


def pack_proof(proof: bytes) -> list[bytes]:
    return [_PROOF_LAYOUT.pack(*head(Kind.PROOF), proof)]


def _proof(frame: bytes) -> Proof:
    return Proof(*fields_of(_PROOF_LAYOUT, frame))


def pack_read(read: Read, kind: Kind = Kind.READ) -> list[bytes]:
    """READ, or OFFER of the same pages."""
    assert 1 <= len(read.keys) <= BATCH_PAGES
    budget = min(max(0, read.budget_ms), BUDGET_MS_MAX)
    fixed = _READ_LAYOUT.pack(
        *head(kind), len(read.keys), read.flags, budget, read.request_id, read.namespace
    )
    return [fixed + b"".join(read.keys)]


def _read(frame: bytes) -> Read:
    rest = _keys_bytes(_READ_LAYOUT, frame)
    _, flags, budget, request_id, namespace = fields_of(_READ_LAYOUT, frame, rest=rest)
    keys = keys_from(frame, _READ_LAYOUT.size)
    return Read(request_id, namespace, min(budget, BUDGET_MS_MAX), flags, keys)


def _keys_bytes(layout: struct.Struct, frame: bytes) -> int:
    count = count_at(layout, frame, 4, BATCH_PAGES)
    if not count:
        raise WireError("no keys")
    return count * KEY_BYTES


def pack_offer(read: Read) -> list[bytes]:
    return pack_read(read, Kind.OFFER)


def _offer(frame: bytes) -> Offer:
    return Offer(_read(frame))


def pack_done(lease: int) -> list[bytes]:
    return [ID_LAYOUT.pack(*head(Kind.DONE), 0, lease)]


def _done(frame: bytes) -> Done:
    return Done(fields_of(ID_LAYOUT, frame)[1])


def pack_cancel(request_id: int) -> list[bytes]:
    return [ID_LAYOUT.pack(*head(Kind.CANCEL), 0, request_id)]


def _cancel(frame: bytes) -> Cancel:
    return Cancel(fields_of(ID_LAYOUT, frame)[1])


def pack_report_corrupt(namespace: bytes, keys: Sequence[PageKey]) -> list[bytes]:
    assert 1 <= len(keys) <= BATCH_PAGES
    fixed = _REPORT_LAYOUT.pack(*head(Kind.REPORT_CORRUPT), len(keys), 0, namespace)
    return [fixed + b"".join(keys)]


def _report_corrupt(frame: bytes) -> ReportCorrupt:
    _, _, namespace = fields_of(_REPORT_LAYOUT, frame, rest=_keys_bytes(_REPORT_LAYOUT, frame))
    return ReportCorrupt(namespace, keys_from(frame, _REPORT_LAYOUT.size))


def pack_snapshot_request(request_id: int, namespace: bytes) -> list[bytes]:
    return [_SNAPSHOT_LAYOUT.pack(*head(Kind.SNAPSHOT), 0, request_id, namespace)]


def _snapshot_request(frame: bytes) -> SnapshotRequest:
    _, request_id, namespace = fields_of(_SNAPSHOT_LAYOUT, frame)
    return SnapshotRequest(request_id, namespace)


def pack_poll(poll: Poll) -> list[bytes]:
    position = (poll.request_id, poll.epoch, poll.last, poll.namespace)
    return [_POLL_LAYOUT.pack(*head(Kind.POLL), 0, *position)]


def _poll(frame: bytes) -> Poll:
    _, request_id, epoch, last, namespace = fields_of(_POLL_LAYOUT, frame)
    return Poll(request_id, namespace, epoch, last)


_DECODERS: dict[Kind, Callable[[bytes], Request]] = {
    Kind.HELLO: _hello,
    Kind.PROOF: _proof,
    Kind.READ: _read,
    Kind.OFFER: _offer,
    Kind.DONE: _done,
    Kind.CANCEL: _cancel,
    Kind.REPORT_CORRUPT: _report_corrupt,
    Kind.SNAPSHOT: _snapshot_request,
    Kind.POLL: _poll,
}


def decode_request(frames: Sequence[Bytes]) -> Request:
    """The request in these frames. Raises ``WireError``."""
    if len(frames) != 1:
        raise WireError(f"{len(frames)} frames in a request")
    frame = bytes(frames[0])
    if len(frame) > REQUEST_BYTES_MAX:
        raise WireError(f"{len(frame)} bytes in a request")
    kind = kind_of(frame)
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise WireError(f"{kind} is no request")
    return decoder(frame)
