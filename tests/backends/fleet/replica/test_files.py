"""Files with sets of other nodes: a full disk, damage, and every byte as in docs/DATA_FILE.md."""

from __future__ import annotations

import logging
import os
import resource
import signal
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.replica.files import SetPlace, open_set
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import Op
from flexkv_sglang.types import U64
from nodes.replicas import SPACE, A, B, fill, no_peer, open_reader, pages


@pytest.fixture
def writer(shm_path: Path) -> Iterator[PeerSetsWriter]:
    made = PeerSetsWriter(shm_path)
    yield made
    made.close()


def grow(writer: PeerSetsWriter, rounds: int) -> U64:
    """Add until the changes no longer fit beside the base; return the added fingerprints."""
    added = [pages(500) for _ in range(rounds)]
    for fingerprints in added:
        writer.apply(SPACE, A, Op.ADD, fingerprints)
    return np.concatenate(added)


def test_a_full_disk_freezes_what_readers_see(
    shm_path: Path, writer: PeerSetsWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """``RLIMIT_FSIZE`` is a disk that takes no larger file: the error is the kernel's."""
    caplog.set_level(logging.INFO)
    fill(writer, A, first := pages(2000))
    reader = open_reader(shm_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        added = grow(writer, 8)
        writer.apply(SPACE, A, Op.DROP, first[:100])
        fill(writer, B, other := pages(10))
        writer.tick()
        assert writer.frozen
        reader.refresh()
        assert reader.holds(first, no_peer).all()
        assert not reader.holds(added[-500:], no_peer).any()
        assert not reader.holds(other, no_peer).any()
        writer.apply(SPACE, A, Op.CLEAR, first[:0])  # works on a full disk too
        reader.refresh()
        assert not reader.holds(first, no_peer).any()
        writer.apply(SPACE, A, Op.ADD, added)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    writer.tick()
    assert not writer.frozen
    reader.refresh()
    assert reader.holds(np.concatenate([added, other]), no_peer).all()
    assert not reader.holds(first, no_peer).any()
    assert reader.page_count() == len(added) + len(other)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert not list((shm_path / SPACE).glob("*.tmp"))


def test_a_full_tmpfs_freezes_too(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        writer = PeerSetsWriter(place)
        fill(writer, A, first := pages(2000))
        ballast = place / "ballast"
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        ballast.write_bytes(bytes(free))
        reader = open_reader(place)
        added = grow(writer, 8)
        reader.refresh()
        assert writer.frozen
        assert reader.holds(first, no_peer).all()
        ballast.unlink()
        writer.tick()
        reader.refresh()
        assert not writer.frozen
        assert reader.holds(np.concatenate([first, added]), no_peer).all()
        reader.close()
        writer.close()
        del writer, reader
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_files_that_are_damaged_are_no_sets(shm_path: Path, writer: PeerSetsWriter) -> None:
    fill(writer, A, pages(100))
    tenancy = writer._entries[A].tenancy
    place = SetPlace(shm_path / SPACE, 0, tenancy, 1)
    whole = place.path.read_bytes()
    copy = SetPlace(shm_path / SPACE, 0, tenancy, 2)
    for data in (b"", whole[:40], whole[:-8], whole + bytes(8), whole):
        copy.path.write_bytes(data)
        assert open_set(copy) is None  # the last copy: of another generation
    for at in range(52):
        place.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert open_set(place) is None
    place.path.write_bytes(whole)
    assert open_set(place) is not None


def test_a_set_file_is_what_the_documents_say(shm_path: Path, writer: PeerSetsWriter) -> None:
    """Read by hand, after docs/DATA_FILE.md."""
    fingerprints = pages(1000)
    fill(writer, A, fingerprints)
    new, gone = pages(1), fingerprints[5:6]
    writer.apply(SPACE, A, Op.ADD, new)
    writer.apply(SPACE, A, Op.DROP, gone)
    data = (shm_path / SPACE / "p0.1.set").read_bytes()
    magic, version, slot, generation, _, count, buckets, records, crc = struct.unpack_from(
        "<8sIIQQQIII", data
    )
    assert (magic, version, slot, generation, count) == (b"FKFPSET1", 1, 0, 1, 1000)
    assert crc == zlib.crc32(data[:48])
    fps_at = -(-(64 + 4 * (buckets + 1)) // 64) * 64
    heads_at = -(-(fps_at + 8 * count) // 64) * 64
    records_at = heads_at + 32 * records
    assert len(data) == records_at + 16 * records
    starts = struct.unpack_from(f"<{buckets + 1}I", data, 64)
    stored = struct.unpack_from(f"<{count}Q", data, fps_at)
    assert list(stored) == fingerprints.tolist()
    for at, fp in enumerate(stored):
        bucket = fp >> (65 - buckets.bit_length())
        assert starts[bucket] <= at < starts[bucket + 1]
    heads = struct.unpack_from(f"<{8 * records}I", data, heads_at)
    for number, fp, op in ((1, int(new[0]), 1), (2, int(gone[0]), 2)):
        assert heads[fp % (8 * records)] == number
        found, word = struct.unpack_from("<2Q", data, records_at + 16 * (number - 1))
        low = word & (1 << 34) - 1
        check = (fp ^ low ^ generation) * 0xC2B2AE3D27D4EB4F % (1 << 64) >> 34
        assert (found, low >> 32, word & 0xFFFFFFFF, word >> 34) == (fp, op, 0, check)
