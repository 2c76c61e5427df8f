"""The ground of every message: kinds, limits, and the checks that both directions of decoding share.

A message is one or two ZeroMQ frames; the first begins with magic, protocol version and kind. Integers are
little-endian. docs/DATA_FILE.md lists every byte. No sockets here. Threads: any.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

from flexkv_sglang.backends.fleet.vocabulary import PROTOCOL
from flexkv_sglang.errors import PeerError
from flexkv_sglang.types import SECTOR, PageKey, round_up

KEY_BYTES = 32
NONCE_BYTES = 16
PROOF_BYTES = 32
REQUEST_BYTES_MAX = 64 << 10
"""Largest frame of a request, and largest first frame of an answer."""

ID_LAYOUT = struct.Struct("<2sBBIQ")
"""Of the messages that carry one number and an id."""

_MAGIC = b"fk"
_HEAD_LAYOUT = struct.Struct("<2sBB")
_U16 = struct.Struct("<H")

Bytes = bytes | memoryview


class WireError(PeerError):
    """A message that breaks the protocol."""


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
    REPORT_CORRUPT = 10
    SNAPSHOT = 11
    PART = 12
    POLL = 13
    CHANGES = 14
    UNAVAILABLE = 15
    OFFER = 16
    OFFERED = 17
    DONE = 18


_KINDS = {kind.value: kind for kind in Kind}


def stride_of(length: int) -> int:
    """Bytes from one page of a message to the next, as in a slot file. The gap is zero."""
    return round_up(length, SECTOR)


def head(kind: Kind, protocol: int = PROTOCOL) -> tuple[bytes, int, int]:
    """The first three fields of every layout."""
    return (_MAGIC, protocol, kind)


def kind_of(frame: bytes) -> Kind:
    """Check the head. Only HELLO and REFUSED may come from another protocol version. Raises ``WireError``."""
    if len(frame) < _HEAD_LAYOUT.size:
        raise WireError(f"{len(frame)} bytes")
    magic, protocol, number = _HEAD_LAYOUT.unpack_from(frame)
    kind = _KINDS.get(number)
    if magic != _MAGIC or kind is None:
        raise WireError(f"unknown message {frame[:4].hex()}")
    if protocol != PROTOCOL and kind not in (Kind.HELLO, Kind.REFUSED):
        raise WireError(f"protocol {protocol}, here {PROTOCOL}")
    return kind


def fields_of(layout: struct.Struct, frame: bytes, *, rest: int = 0) -> tuple[Any, ...]:
    """Fields behind the head of a frame of exactly ``layout.size + rest`` bytes. Raises ``WireError``."""
    if len(frame) != layout.size + rest:
        raise WireError(f"{len(frame)} bytes instead of {layout.size + rest}")
    return layout.unpack_from(frame)[3:]


def count_at(layout: struct.Struct, frame: bytes, at: int, most: int) -> int:
    """The uint16 at offset ``at``: a length to be checked before it is used. Raises ``WireError``."""
    if len(frame) < layout.size:
        raise WireError(f"{len(frame)} bytes, at least {layout.size}")
    count: int = _U16.unpack_from(frame, at)[0]
    if count > most:
        raise WireError(f"{count}, at most {most}")
    return count


def keys_from(frame: bytes, start: int) -> tuple[PageKey, ...]:
    """The page keys that fill the frame from ``start`` on."""
    return tuple(PageKey(frame[at : at + KEY_BYTES]) for at in range(start, len(frame), KEY_BYTES))


def text_of(data: bytes) -> str:
    """UTF-8. Raises ``WireError``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WireError("not text") from None
