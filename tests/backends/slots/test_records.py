"""The bytes on disk. What is pinned here can be changed only together with the format version."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.backends.slots.records import (
    HEADER_BYTES,
    JOURNAL_MAGIC,
    NO_PARENT,
    RECORD,
    RECORD_BYTES,
    SNAPSHOT_MAGIC,
    Header,
    RecordOp,
    SlotClass,
    seal_records,
    valid_prefix,
)
from flexkv_sglang.errors import JournalError

EPOCH = 0x1122334455667788
KEY = bytes(range(32))
HEADER = Header(
    "namespace", "0123456789ab", EPOCH, 2, 41, "boot", (SlotClass(8192, 8000, 16),), 3, 77
)


def one_put() -> bytes:
    records = np.zeros(1, RECORD)
    records["op"], records["file"], records["flags"] = RecordOp.PUT, 1, 2
    records["len"], records["slot"], records["parent"] = 8000, 7, NO_PARENT
    records["sum"], records["key"] = 0x0102030405060708, np.void(KEY)
    return seal_records(records, EPOCH, 41)


def test_a_put_record_byte_by_byte() -> None:
    body = struct.pack("<BBHIIII Q32s", 1, 1, 2, 42, 8000, 7, 0xFFFFFFFF, 0x0102030405060708, KEY)
    crc = zlib.crc32(body, 0x55667788)
    assert one_put() == struct.pack("<I", crc) + body
    assert one_put().hex() == (
        "9429be3d010102002a000000401f000007000000ffffffff0807060504030201"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    )


def test_ops_have_their_numbers_for_ever() -> None:
    assert {op.name: op.value for op in RecordOp} == {
        "PUT": 1,
        "DEL": 2,
        "CLEAR": 3,
        "SEAL": 4,
        "CLOSE": 5,
    }


def test_a_header_byte_by_byte() -> None:
    raw = HEADER.pack(JOURNAL_MAGIC)
    assert len(raw) == HEADER_BYTES
    magic, version, length, crc = struct.unpack_from("<8sIII", raw)
    body = raw[20 : 20 + length]
    assert (magic, version, crc) == (b"FKJRNL01", 1, zlib.crc32(body))
    assert body == (
        b'{"base_seq": 41, "body_crc": 77, "boot_id": "boot", "epoch": 1234605616436508552, "files": '
        b'[{"payload_bytes": 8000, "slot_bytes": 8192, "slot_count": 16}], "generation": 2, "namespace": '
        b'"namespace", "owner": "0123456789ab", "record_count": 3}'
    )
    assert not any(raw[20 + length :])
    assert Header.unpack(raw, JOURNAL_MAGIC) == HEADER


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_header_with_a_changed_byte_is_refused_or_the_same(position: int, mask: int) -> None:
    raw = bytearray(HEADER.pack(JOURNAL_MAGIC))
    raw[position] ^= mask
    try:
        assert Header.unpack(bytes(raw), JOURNAL_MAGIC) == HEADER  # the zeros behind the fields
    except JournalError:
        return


@pytest.mark.parametrize("length", [0, 19, 20, HEADER_BYTES - 1])
def test_a_short_header_is_refused(length: int) -> None:
    with pytest.raises(JournalError, match="long"):
        Header.unpack(HEADER.pack(JOURNAL_MAGIC)[:length], JOURNAL_MAGIC)


def test_a_snapshot_is_not_a_journal() -> None:
    with pytest.raises(JournalError, match="magic"):
        Header.unpack(HEADER.pack(SNAPSHOT_MAGIC), JOURNAL_MAGIC)


def journal_of(count: int) -> bytes:
    records = np.zeros(count, RECORD)
    records["op"] = RecordOp.PUT
    records["slot"] = np.arange(count)
    return seal_records(records, EPOCH, 10)


@given(st.integers(0, 5 * RECORD_BYTES))
def test_a_torn_tail_is_not_an_error_and_never_read(cut: int) -> None:
    assert len(valid_prefix(journal_of(5)[:cut], EPOCH, 10)) == cut // RECORD_BYTES


@given(st.integers(0, 5 * RECORD_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_ends_the_journal_before_its_record(position: int, mask: int) -> None:
    raw = bytearray(journal_of(5))
    raw[position] ^= mask
    assert len(valid_prefix(bytes(raw), EPOCH, 10)) == position // RECORD_BYTES


@pytest.mark.parametrize(("epoch", "previous"), [(EPOCH + 1, 10), (EPOCH, 9), (EPOCH, 11)])
def test_records_of_another_owner_or_place_are_not_read(epoch: int, previous: int) -> None:
    assert len(valid_prefix(journal_of(2), epoch, previous)) == 0


def test_zeros_are_not_records() -> None:
    assert len(valid_prefix(bytes(4 * RECORD_BYTES), 0, 2**32 - 1)) == 0


def test_numbers_wrap_after_32_bits() -> None:
    raw = seal_records(np.ones(4, RECORD), EPOCH, 2**32 - 3)
    assert valid_prefix(raw, EPOCH, 2**32 - 3)["seq"].tolist() == [2**32 - 2, 2**32 - 1, 0, 1]


@pytest.mark.parametrize("count", [1, 1023, 1024, 20_000])
def test_many_records_get_the_same_checksums_as_one_by_one(count: int) -> None:
    records = np.frombuffer(np.random.default_rng(1).bytes(count * 64), RECORD).copy()
    raw = seal_records(records, 0x1234_5678_9ABC_DEF0, 41)
    for row in {0, count // 2, count - 1}:
        one = raw[row * 64 : row * 64 + 64]
        assert int.from_bytes(one[:4], "little") == zlib.crc32(one[4:], 0x9ABC_DEF0)
    assert len(valid_prefix(raw, 0x1234_5678_9ABC_DEF0, 41)) == count
    for row in {0, count // 2, count - 1}:
        damaged = bytearray(raw)
        damaged[row * 64 + 63] ^= 1
        assert len(valid_prefix(bytes(damaged), 0x1234_5678_9ABC_DEF0, 41)) == row
