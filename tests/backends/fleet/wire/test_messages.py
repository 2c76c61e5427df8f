"""Messages between nodes: they survive the wire, their bytes are fixed, and invalid bytes do no harm."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.vocabulary import Change, NodeInfo, Op, PageStatus, Snapshot
from flexkv_sglang.backends.fleet.wire import answers, protocol, requests
from nodes.page_servers import EPOCH, NAME, NID, SPACE
from nodes.page_sources import keys_of
from nodes.wire_fuzz import (
    CHANGES,
    OFFERED,
    SNAPSHOT,
    fuzz_decoders,
    fuzz_server,
    valid_answers,
    valid_requests,
)

KEYS = tuple(keys_of(128))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            requests.pack_hello(requests.Hello(bytes(16), "c" * 128)),
            requests.Hello(bytes(16), "c" * 128),
        ),
        (requests.pack_proof(bytes(32)), requests.Proof(bytes(32))),
        (requests.pack_cancel(1 << 63), requests.Cancel(1 << 63)),
        (requests.pack_report_corrupt(SPACE, KEYS), requests.ReportCorrupt(SPACE, KEYS)),
        (requests.pack_snapshot_request(3, SPACE), requests.SnapshotRequest(3, SPACE)),
        (
            requests.pack_poll(requests.Poll(3, SPACE, (1 << 64) - 1, 9)),
            requests.Poll(3, SPACE, (1 << 64) - 1, 9),
        ),
        (
            requests.pack_read(requests.Read(1, SPACE, 10**9, 1, KEYS)),
            requests.Read(1, SPACE, 60_000, 1, KEYS),
        ),
        (
            requests.pack_offer(requests.Read(1, SPACE, 10**9, 1, KEYS)),
            requests.Offer(requests.Read(1, SPACE, 60_000, 1, KEYS)),
        ),
        (requests.pack_done(1 << 63), requests.Done(1 << 63)),
    ],
)
def test_requests_survive(frames: list[bytes], message: requests.Request) -> None:
    assert requests.decode_request(frames) == message


def test_answers_survive() -> None:
    info = NodeInfo(NID, 1 << 63, "[::1]:9", "rack", (NAME, NAME), ("zmq", "nixl"), "0.1")
    welcome = answers.Welcome(bytes(16), bytes(range(32)), info, 64 << 20, 32)
    assert answers.decode_answer(answers.pack_welcome(welcome)) == welcome
    full = ChecksumKind.XXH3_64
    page = answers.PagesHeader(1 << 60, 127, PageStatus.OK, full, 8, ((1 << 64) - 1,))
    assert answers.decode_answer([answers.pack_pages(page), bytes(8)]) == page
    pages = answers.PagesHeader(1, 100, PageStatus.OK, full, 4097, tuple(range(28)))
    assert answers.decode_answer([answers.pack_pages(pages), bytes(27 * 8192 + 4097)]) == pages
    assert answers.decode_answer(answers.pack_end(1, 128)) == answers.End(1, 128)
    assert answers.decode_answer(answers.pack_offered(OFFERED)) == OFFERED
    most = answers.Offered(1, 2, 60_000, OFFERED.pages[:1] * 128, bytes(32 << 10))
    assert answers.decode_answer(answers.pack_offered(most)) == most
    changes = answers.decode_answer(answers.pack_changes(4, CHANGES))
    assert isinstance(changes, answers.Changes)
    for decoded, sent in zip(changes.changes, CHANGES, strict=True):
        assert (decoded.epoch, decoded.first, decoded.op) == (sent.epoch, sent.first, sent.op)
        assert decoded.fingerprints.tolist() == sent.fingerprints.tolist()


@pytest.mark.parametrize("count", [0, 1, 131_072, 131_073, 300_000])
def test_a_snapshot_survives_in_parts(count: int) -> None:
    snapshot = Snapshot(5, 6, np.arange(count, dtype=np.uint64))
    parts = [
        answers.decode_answer(answers.pack_part(1, snapshot, part))
        for part in range(answers.parts_of(count))
    ]
    assert all(isinstance(part, answers.SnapshotPart) and part.count == count for part in parts)
    assert (
        np.concatenate([part.fingerprints for part in parts]).tolist()
        == snapshot.fingerprints.tolist()
    )  # type: ignore[union-attr]


def test_many_changes_are_cut_to_one_message() -> None:
    many = [Change(1, 1 + 512 * i, Op.ADD, np.arange(512, dtype=np.uint64)) for i in range(1000)]
    frames = answers.pack_changes(1, many)
    assert len(frames[1]) <= answers.CHANGES_BYTES_MAX
    decoded = answers.decode_answer(frames)
    assert isinstance(decoded, answers.Changes)
    assert 200 < len(decoded.changes) < 1000
    assert decoded.changes[-1].first == 1 + 512 * (len(decoded.changes) - 1)


def test_golden_bytes() -> None:
    """Nodes of one protocol version understand each other. A change of these bytes needs another version."""
    read = requests.pack_read(requests.Read(0x0102030405060708, SPACE, 250, 1, KEYS[:1]))
    assert read[0].hex() == (
        "666b020601000100fa0000000807060504030201" + SPACE.hex() + KEYS[0].hex()
    )  # fmt: skip
    full = ChecksumKind.XXH3_64
    pages = answers.pack_pages(answers.PagesHeader(7, 3, PageStatus.OK, full, 4096, (0xAABB, 0xCC)))
    assert pages.hex() == (
        "666b0207030000020010000002000000" + "0700000000000000" + "bbaa000000000000" + "cc00000000000000"
    )  # fmt: skip
    assert answers.pack_end(7, 3)[0].hex() == "666b0208030000000700000000000000"
    hello = requests.pack_hello(requests.Hello(bytes(range(16)), "ab"))[0]
    assert hello.hex() == "666b0201" + bytes(range(16)).hex() + "020000006162"
    assert (
        requests.pack_offer(requests.Read(1, SPACE, 250, 1, KEYS[:1]))[0][:8].hex()
        == "666b021001000100"
    )
    assert requests.pack_done(7)[0].hex() == "666b0212000000000700000000000000"
    assert answers.pack_offered(OFFERED)[0].hex() == (
        "666b02110200040088130000" + "0d00000000000000" + "0500000000000000"
        + "0002000000100000" + "0000000000000080" + "0000000000010000"
        + "0100000000000000" + bytes(16).hex() + b"blob".hex()
    )  # fmt: skip
    part = answers.pack_part(1, SNAPSHOT, 0)
    assert struct.unpack("<2sBBHHQQQQ", part[0][:40]) == (b"fk", 2, 12, 0, 1, 1, EPOCH, 40, 1000)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"fk"],
        [b"fk\x01\x63"],
        [b"fk\x02\x06" + bytes(60)],
        answers.pack_end(1, 1),
        [requests.pack_read(requests.Read(1, SPACE, 1, 0, KEYS[:2]))[0][:-1]],
        [requests.pack_read(requests.Read(1, SPACE, 1, 0, KEYS[:2]))[0] + bytes(32)],
        [bytes(1 << 17)],
        [*requests.pack_cancel(1), b""],
        [b"fk\x01\x06" + struct.pack("<HHIQ", 129, 0, 1, 1) + SPACE + bytes(129 * 32)],
        [b"fk\x01\x06" + struct.pack("<HHIQ", 0, 0, 1, 1) + SPACE],
        [b"fk\x01\x01" + bytes(16) + struct.pack("<HH", 1, 0) + b"\xff"],
    ],
)
def test_invalid_requests_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(protocol.WireError):
        requests.decode_request(frames)


def _part(part: int, parts: int, count: int, data: bytes) -> list[bytes]:
    import xxhash

    check = xxhash.xxh3_64_intdigest(data)
    return [struct.pack("<2sBBHHQQQQQ", b"fk", 2, 12, part, parts, 1, 2, 3, count, check), data]


def _pages(
    index: int, length: int, count: int, checksums: int | None = None, status: int = 0
) -> bytes:
    """The head of PAGES; what it says need not be true."""
    decoded = bytes(8 * (count if checksums is None else checksums))
    return struct.pack("<2sBBHBBIIQ", b"fk", 2, 7, index, status, 2, length, count, 1) + decoded


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"", b"", b""],
        requests.pack_cancel(1),
        _part(0, 1, 1 << 40, bytes(8)),
        _part(0, 65535, 1 << 27, bytes(8)),
        _part(0, 65535, 65535 * 131_072, bytes(1 << 20)),
        _part(1, 1, 1, bytes(8)),
        _part(0, 1, 2, bytes(8)),
        [_part(0, 1, 1, bytes(8))[0], bytes([1]) + bytes(7)],
        [_pages(0, 8, 1), bytes(9)],
        [_pages(0, 8, 1)],
        [_pages(0, 0, 1), b""],
        [_pages(0, 8, 2), bytes(16)],
        [_pages(0, 8, 2), bytes(8192)],
        [_pages(127, 8, 2), bytes(4096 + 8)],
        [_pages(0, 8, 2)[:-8], bytes(4096 + 8)],
        [_pages(0, 8, 1) + bytes(8), bytes(8)],
        [_pages(0, 8, 1)[:24], bytes(8)],
        [_pages(0, 8, 0), b""],
        [_pages(0, 0xFFFFFFFF, 0xFFFFFFFF, 1), bytes(8)],
        [_pages(0, 0, 1, status=1), b""],
        [_pages(0, 8, 1, status=1)],
        [_pages(0, 0, 2, status=1)],
        [_pages(128, 0, 1, status=1)],
        [_pages(0, 0, 1, status=9)],
        [answers.pack_changes(1, CHANGES)[0], answers.pack_changes(1, CHANGES)[1][:-1]],
        [answers.pack_changes(1, CHANGES)[0], answers.pack_changes(1, CHANGES)[1] + b"x"],
        answers.pack_end(1, 129),
        [struct.pack("<2sBBHHIQQ", b"fk", 2, 17, 129, 0, 5000, 1, 1) + bytes(129 * 24)],
        [struct.pack("<2sBBHHIQQ", b"fk", 2, 17, 0, 32769, 5000, 1, 1) + bytes(32769)],
        [struct.pack("<2sBBHHIQQ", b"fk", 2, 17, 0, 0, 0, 1, 1)],
        [struct.pack("<2sBBHHIQQ", b"fk", 2, 17, 0, 0, 60_001, 1, 1)],
        [struct.pack("<2sBBHHIQQ", b"fk", 2, 17, 1, 0, 1, 1, 1) + b"\x63" + bytes(23)],
        [*answers.pack_offered(OFFERED), b""],
    ],
)
def test_invalid_answers_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(protocol.WireError):
        answers.decode_answer(frames)


def test_every_cut_of_every_message_is_refused() -> None:
    for decode, messages in (
        (requests.decode_request, valid_requests()),
        (answers.decode_answer, valid_answers()),
    ):
        for frames in messages:
            for place, frame in enumerate(frames):
                for length in range(0, len(frame), 1 + len(frame) // 200):
                    with pytest.raises(protocol.WireError):
                        decode([*frames[:place], frame[:length], *frames[place + 1 :]])


def test_fuzzed_messages_do_no_harm() -> None:
    result = fuzz_decoders(8_000, seed=1)
    assert result["understood"] > 0
    assert result["refused"] > 8_000


def test_a_server_survives_fuzzed_messages() -> None:
    counts = fuzz_server(12_000, seed=2)
    assert counts["served"] == 8 * 3
    assert counts["invalid_messages"] > 1000
    assert counts["grown_kib"] < 32 << 10
