"""The 64-byte journal record and the 4096-byte header: the format, and nothing but the format.

docs/DATA_FILE.md describes every byte; ``tests/backends/test_records.py`` holds golden bytes. All
integers are little-endian. ``op`` 0 is never valid, so zeros are not a record.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_sglang.errors import JournalError

FORMAT_VERSION = 1
JOURNAL_MAGIC = b"FKJRNL01"
SNAPSHOT_MAGIC = b"FKSNAP01"
HEADER_BYTES = 4096
RECORD_BYTES = 64
NO_PARENT = 0xFFFFFFFF

_HEAD = struct.Struct("<8sIII")  # magic, version, length of the JSON, CRC-32 of the JSON


class Op(IntEnum):
    """What a record says."""

    PUT = 1  # ``slot`` of ``file`` holds ``key``: ``len`` payload bytes with checksum ``sum``
    DEL = 2  # ``slot`` holds nothing any more; appended before the slot is rewritten
    CLEAR = 3  # all slots of this owner hold nothing
    SEAL = (
        4  # this journal ends; go on in generation ``slot``, whose first record has the next number
    )
    CLOSE = 5  # clean end: data and journal were flushed to the medium


RECORD = np.dtype(
    [
        ("crc", "<u4"),
        ("op", "u1"),
        ("file", "u1"),
        ("flags", "<u2"),
        ("seq", "<u4"),
        ("len", "<u4"),
        ("slot", "<u4"),
        ("parent", "<u4"),
        ("sum", "<u8"),
        ("key", "V32"),
    ]
)
assert RECORD.itemsize == RECORD_BYTES

Records = npt.NDArray[Any]
"""``[n]`` of ``RECORD``."""


@dataclass(frozen=True, slots=True)
class SlotClass:
    """One slot file of an owner: ``slot_count`` slots of ``slot_bytes`` holding pages of ``payload_bytes``."""

    slot_bytes: int
    payload_bytes: int
    slot_count: int


@dataclass(frozen=True, slots=True)
class Header:
    """First 4096 bytes of a journal or snapshot.

    ``namespace``: digest the pages belong to. ``epoch``: 64 random bits per owner, seed of every record's
    CRC. ``base_seq``: number before the first record. ``record_count`` / ``body_crc``: snapshots only.
    ``boot_id``: boot of the kernel that wrote it. ``files``: slot files, a record's ``file`` is the index.
    """

    namespace: str
    owner: str
    epoch: int
    generation: int
    base_seq: int
    boot_id: str
    files: tuple[SlotClass, ...]
    record_count: int = 0
    body_crc: int = 0

    def pack(self, magic: bytes) -> bytes:
        """4096 bytes."""
        body = json.dumps(asdict(self), sort_keys=True).encode()
        if _HEAD.size + len(body) > HEADER_BYTES:
            raise JournalError(f"header of {len(body)} bytes does not fit into {HEADER_BYTES}")
        head = _HEAD.pack(magic, FORMAT_VERSION, len(body), zlib.crc32(body))
        return (head + body).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, magic: bytes) -> Header:
        """Raises ``JournalError`` for anything that is not a whole, valid header of this format."""
        if len(data) < HEADER_BYTES:
            raise JournalError(f"header is {len(data)} bytes long, not {HEADER_BYTES}")
        found, version, length, crc = _HEAD.unpack_from(data)
        if found != magic or version != FORMAT_VERSION:
            raise JournalError(
                f"magic {found!r} version {version}, expected {magic!r} version {FORMAT_VERSION}"
            )
        body = data[_HEAD.size : _HEAD.size + length]
        if length > HEADER_BYTES - _HEAD.size or zlib.crc32(body) != crc:
            raise JournalError("header checksum does not match")
        try:
            fields = json.loads(body)
            fields["files"] = tuple(SlotClass(**item) for item in fields["files"])
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as exc:
            raise JournalError(
                f"header fields are not those of version {FORMAT_VERSION}: {exc}"
            ) from exc


def seal_records(records: Records, epoch: int, previous_seq: int) -> bytes:
    """Number ``records`` from ``previous_seq + 1``, fill in their CRCs, return the bytes to append."""
    count = len(records)
    records["seq"] = (np.uint64(previous_seq + 1) + np.arange(count, dtype=np.uint64)) & np.uint64(
        0xFFFFFFFF
    )
    raw = bytearray(records.tobytes())
    seed = epoch & 0xFFFFFFFF
    view = memoryview(raw)
    for start in range(0, len(raw), RECORD_BYTES):
        crc = zlib.crc32(view[start + 4 : start + RECORD_BYTES], seed)
        raw[start : start + 4] = crc.to_bytes(4, "little")
    return bytes(raw)


def valid_prefix(raw: bytes, epoch: int, previous_seq: int) -> Records:
    """The leading records of ``raw`` whose CRC and running number are right. A torn tail is not an error."""
    usable = len(raw) // RECORD_BYTES
    records = np.frombuffer(raw, RECORD, count=usable)
    seed = epoch & 0xFFFFFFFF
    view = memoryview(raw)
    crcs = records["crc"].tolist()
    seqs = records["seq"].tolist()
    for index in range(usable):
        start = index * RECORD_BYTES
        expected = (previous_seq + 1 + index) & 0xFFFFFFFF
        if (
            seqs[index] != expected
            or zlib.crc32(view[start + 4 : start + RECORD_BYTES], seed) != crcs[index]
        ):
            return records[:index]
    return records
