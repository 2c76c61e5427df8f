"""Page checksums: xxh3_64 over the payload, seeded with the page's key.

The seed makes the key part of what is checked: a misdirected write, or two slots that changed places,
fails even if both payloads are intact. The kind is stored in every journal record, so files written
with different settings can be read side by side. xxHash: https://github.com/Cyan4973/xxHash.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from enum import IntEnum

import xxhash

from flexkv_sglang.types import PageKey


class ChecksumKind(IntEnum):
    """Low byte of a record's ``flags``."""

    NONE = 0
    XXH3_64 = 2
    XXH3_64_SAMPLED = 3


KIND_OF = {kind.value: kind for kind in ChecksumKind}
"""Several times quicker than ``ChecksumKind(value)``."""

WRITTEN_KIND = {
    "full": ChecksumKind.XXH3_64,
    "sampled": ChecksumKind.XXH3_64_SAMPLED,
    "off": ChecksumKind.NONE,
}
"""``verify`` setting -> what is computed for a page that is written."""

ACCEPTED_KINDS = {
    "full": frozenset({ChecksumKind.XXH3_64}),
    "sampled": frozenset({ChecksumKind.XXH3_64, ChecksumKind.XXH3_64_SAMPLED}),
    "off": frozenset(ChecksumKind),
}
"""``verify`` setting -> pages that count as stored. Others do not exist for this process."""

_BLOCK = 4096
_SAMPLE_STRIDE = 16  # one 4 KiB block of 16 is read


def page_checksum(kind: ChecksumKind, key: PageKey, buffers: Iterable[tuple[int, int]]) -> int:
    """Checksum of one page that lies at ``buffers`` (address, length in bytes), in stored order.

    Releases the GIL while hashing. The memory must be mapped: a wrong address is a crash, not an error.
    """
    if kind is ChecksumKind.NONE:
        return 0
    digest = xxhash.xxh3_64(seed=int.from_bytes(key[:8], "little"))
    for address, length in buffers:
        if kind is ChecksumKind.XXH3_64_SAMPLED:
            for start in sample_offsets(length):
                digest.update(_view(address + start, min(_BLOCK, length - start)))
        else:
            digest.update(_view(address, length))
    return digest.intdigest()


def sample_offsets(length: int) -> list[int]:
    """Where ``sampled`` looks inside a buffer: the first block, every 16th after it, and the last."""
    offsets = list(range(0, length, _BLOCK * _SAMPLE_STRIDE))
    last = max(0, (length - 1) // _BLOCK * _BLOCK)
    return offsets if not offsets or last == offsets[-1] else [*offsets, last]


def _view(address: int, length: int) -> ctypes.Array[ctypes.c_ubyte]:
    return (ctypes.c_ubyte * length).from_address(address)
