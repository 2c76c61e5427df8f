"""The format of the 64-byte journal record and of the 4096-byte header.

docs/DATA_FILE.md describes every byte; ``tests/backends/slots/test_records.py`` holds golden bytes. All
integers are little-endian. ``op`` 0 is never valid, so zeros are not a record.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_sglang.errors import JournalError
from flexkv_sglang.types import SECTOR, U32

FORMAT_VERSION = 1
JOURNAL_MAGIC = b"FKJRNL01"
SNAPSHOT_MAGIC = b"FKSNAP01"
HEADER_BYTES = 4096
RECORD_BYTES = 64
NO_PARENT = 0xFFFFFFFF
SLOTS_MAX = (1 << 32) - 2

_FILES_MAX = 16

_CRC_CHUNK = 1 << 14  # records whose columns stay in the second-level cache
_CRC_BY_COLUMN = 1 << 10  # fewer are faster one by one

_HEAD = struct.Struct("<8sIII")  # magic, version, length of the JSON, CRC-32 of the JSON


class RecordOp(IntEnum):
    """Meaning of a record."""

    PUT = 1  # ``slot`` of ``file`` holds ``key``: ``len`` payload bytes with checksum ``sum``
    DEL = 2  # ``slot`` holds nothing any more; appended before the slot is rewritten
    CLEAR = 3  # all slots of this owner hold nothing
    SEAL = 4  # this journal ends; generation ``slot`` goes on with the next number
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

    ``namespace``: digest the pages belong to. ``crc_seed``: 63 random bits per owner, seed of every record's
    CRC, named ``epoch`` on disk. ``base_seq``: number before the first record. ``record_count``, ``body_crc``:
    snapshots only. ``boot_id``: boot of the kernel that wrote it. ``files``: slot files, a record's ``file`` is
    the index.
    """

    namespace: str
    owner: str
    crc_seed: int
    generation: int
    base_seq: int
    boot_id: str
    files: tuple[SlotClass, ...]
    record_count: int = 0
    body_crc: int = 0

    def check(self) -> None:
        """Raises ``ValueError`` for a type or a number that this format cannot have, before memory is taken for it."""
        texts = self.namespace, self.owner, self.boot_id
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text is none")
        _check_int("epoch", self.crc_seed, 0, 1 << 63)
        _check_int("generation", self.generation, 0, 1 << 63)
        _check_int("base_seq", self.base_seq, 0, 1 << 63)
        _check_int("record_count", self.record_count, 0, 1 << 36)
        _check_int("body_crc", self.body_crc, 0, 1 << 32)
        if not 1 <= len(self.files) <= _FILES_MAX:
            raise ValueError(f"{len(self.files)} slot files")
        for item in self.files:
            _check_int("slot_bytes", item.slot_bytes, SECTOR, (1 << 32) + 1)
            _check_int("payload_bytes", item.payload_bytes, 1, item.slot_bytes + 1)
            _check_int("slot_count", item.slot_count, 0, SLOTS_MAX + 1)
            if item.slot_bytes % SECTOR:
                raise ValueError(f"slot_bytes {item.slot_bytes} is no multiple of {SECTOR}")

    def pack(self, magic: bytes) -> bytes:
        """4096 bytes."""
        fields = asdict(self)
        fields["epoch"] = fields.pop("crc_seed")
        body = json.dumps(fields, sort_keys=True).encode()
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
            fields["crc_seed"] = fields.pop("epoch")
            header = cls(**fields)
            header.check()
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as exc:
            raise JournalError(
                f"header fields are not those of version {FORMAT_VERSION}: {exc}"
            ) from exc
        return header


def _check_int(name: str, value: object, low: int, end: int) -> None:
    if type(value) is not int or not low <= value < end:  # a bool is no number here
        raise ValueError(f"{name} is {value!r}, not a number from {low} to {end - 1}")


def seal_records(records: Records, crc_seed: int, previous_seq: int) -> bytes:
    """Number ``records`` from ``previous_seq + 1``, fill in their CRCs, return the bytes to append."""
    count = len(records)
    records["seq"] = (np.uint64(previous_seq + 1) + np.arange(count, dtype=np.uint64)) & np.uint64(
        0xFFFFFFFF
    )
    records["crc"] = _record_crcs(memoryview(records.tobytes()), count, crc_seed)
    return records.tobytes()


def valid_prefix(raw: bytes, crc_seed: int, previous_seq: int) -> Records:
    """The leading records of ``raw`` whose CRC and running number are right. A torn tail is not an error."""
    usable = len(raw) // RECORD_BYTES
    records = np.frombuffer(raw, RECORD, count=usable)
    expected = np.uint64(previous_seq + 1) + np.arange(usable, dtype=np.uint64)
    wrong = records["seq"] != (expected & np.uint64(0xFFFFFFFF))
    usable = int(wrong.argmax()) if wrong.any() else usable
    wrong = records["crc"][:usable] != _record_crcs(memoryview(raw), usable, crc_seed)
    return records[: int(wrong.argmax()) if wrong.any() else usable]


def _record_crcs(view: memoryview, count: int, crc_seed: int) -> U32:
    """CRC-32 of bytes 4..63 of each of ``count`` records, started with the low half of ``crc_seed``."""
    seed = crc_seed & 0xFFFFFFFF
    sums = np.empty(count, np.uint32)
    for start in range(0, count, _CRC_CHUNK):
        part = min(_CRC_CHUNK, count - start)
        if part >= _CRC_BY_COLUMN:
            words = np.frombuffer(view, "<u4", part * 16, start * RECORD_BYTES)
            sums[start : start + part] = _crc_by_column(words.reshape(part, 16)[:, 1:], seed)
            continue
        at = range(start * RECORD_BYTES, (start + part) * RECORD_BYTES, RECORD_BYTES)
        sums[start : start + part] = [zlib.crc32(view[i + 4 : i + RECORD_BYTES], seed) for i in at]
    return sums


def _crc_by_column(words: U32, seed: int) -> U32:
    """CRC-32 of every row at once, 16 bits per table look-up: a million records in a tenth of a second.

    The tables follow Sarwate (CACM 1988) and Kounavis and Berry's slicing (ISCC 2005).
    """
    low, high = _crc_tables()
    crc = np.full(len(words), seed ^ 0xFFFFFFFF, np.uint32)
    for column in range(words.shape[1]):
        crc ^= words[:, column]
        crc = low[crc & np.uint32(0xFFFF)] ^ high[crc >> np.uint32(16)]
    return crc ^ np.uint32(0xFFFFFFFF)


@cache
def _crc_tables() -> tuple[U32, U32]:
    """Contribution of the low and the high half of a 32-bit word, uint32 ``[65536]`` each."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(0xEDB88320)
    tables = [table]
    for _ in range(3):
        tables.append((tables[-1] >> np.uint32(8)) ^ table[tables[-1] & np.uint32(0xFF)])
    value = np.arange(65536, dtype=np.uint32)
    first, second = value & np.uint32(0xFF), value >> np.uint32(8)
    return tables[3][first] ^ tables[2][second], tables[1][first] ^ tables[0][second]
