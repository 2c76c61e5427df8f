"""Files with the sets of pages of other nodes: written by the agent, mapped by the rank processes.

    <run_dir>/peers.tbl               the nodes, the agent's last heartbeat, the number of namespaces
    <run_dir>/<namespace>/index       the current set file of each node
    <run_dir>/<namespace>/p<slot>.<generation>.set

A node has a *slot* of the table, and a *tenancy* for as long as it keeps it. A set names its tenancy, so a slot that
changes hands never gives one node the pages of another. Files appear by rename, whole. Later changes in a mapped file
are single aligned words, or entries with a checksum that readers verify. All space is allocated before it is mapped:
a full disk is an error of the writer, never a fault of a reader.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.failpoints import Failpoint, reach
from flexkv_sglang.backends.fleet.replica.fingerprint_set import (
    HEADS_PER_RECORD,
    ChangeTable,
    Parts,
    SortedBase,
    bucket_count,
    bucket_starts,
    record_count,
)
from flexkv_sglang.backends.fleet.vocabulary import NodeId
from flexkv_sglang.backends.safe_files import open_own, remove_temporaries, replacing
from flexkv_sglang.types import U64, round_up

SLOTS = 1024
"""Limit of nodes in the table."""

NID_BYTES, ADDRESS_BYTES = 200, 280
"""Limits of a node's name and "host:port", as UTF-8."""

FREE, UP, DOWN = range(3)
"""States of a slot of the table."""

VERSION = 1
_TABLE_MAGIC, _INDEX_MAGIC, _SET_MAGIC = b"FKPEERS1", b"FKINDEX1", b"FKFPSET1"
_START = struct.Struct("<8sIIQ")  # magic, version, slots, writer
_ENTRY = struct.Struct(
    "<IIQQIHH"
)  # crc, version, tenancy, epoch, state, bytes of node_id, of address
_ENTRY_BYTES = 512
_PAGE = 4096
_ENTRIES_AT = 2 * _PAGE
_TABLE_BYTES = _ENTRIES_AT + SLOTS * _ENTRY_BYTES
_INDEX_BYTES = _PAGE + 16 * SLOTS
_SET_HEADER = struct.Struct("<8sIIQQQII")  # magic, version, slot, generation, tenancy, count, ...
_SET_HEADER_BYTES = 64
_MADV_POPULATE_READ = 22  # of Linux; Python has no name for it
_SET_NAME = re.compile(r"^p(?P<slot>\d+)\.(?P<generation>\d+)\.set$")
_NAMESPACE = re.compile(r"^[a-z2-7]{26}$")
_WRITER, _HEARTBEAT, _RETIRED, _NAMESPACES, _PID = (
    2,
    3,
    4,
    5,
    6,
)  # 8-byte words of the table's header


@dataclass(frozen=True, slots=True)
class Peer:
    """A node of the table. ``slot``: its own until the node is removed."""

    slot: int
    node_id: NodeId
    epoch: int
    address: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry of one slot of the table. ``version`` counts the changes of the slot, ``tenancy`` its owners."""

    version: int
    tenancy: int
    state: int
    peer: Peer

    def pack(self) -> bytes:
        """Encode as bytes of the table."""
        node_id, address = self.peer.node_id.encode(), self.peer.address.encode()
        assert len(node_id) <= NID_BYTES, self.peer
        assert len(address) <= ADDRESS_BYTES, self.peer
        fields = (
            self.version,
            self.tenancy,
            self.peer.epoch,
            self.state,
            len(node_id),
            len(address),
        )
        data = _ENTRY.pack(0, *fields) + node_id + address
        data += bytes(_ENTRY_BYTES - len(data))
        return struct.pack("<I", zlib.crc32(data[4:])) + data[4:]

    @classmethod
    def unpack(cls, slot: int, data: bytes) -> Entry | None:
        """Decode an entry; None while it is being written."""
        crc, version, tenancy, epoch, state, nid_bytes, address_bytes = _ENTRY.unpack_from(data)
        if crc != zlib.crc32(data[4:]):
            return None
        split = _ENTRY.size + nid_bytes
        node_id, address = data[_ENTRY.size : split], data[split : split + address_bytes]
        peer = Peer(slot, NodeId(node_id.decode()), epoch, address.decode())
        return cls(version, tenancy, state, peer)


def _map(path: Path, *, writable: bool) -> mmap.mmap | None:
    """Map the whole file; None if it is missing or empty."""
    try:
        fd = open_own(path, os.O_RDWR if writable else os.O_RDONLY)
    except OSError:
        return None
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


@contextmanager
def _new_file(path: Path, size: int) -> Iterator[mmap.mmap]:
    """Yield ``size`` allocated zeros to write to; its end puts them at ``path``. Raises ``OSError``."""
    with replacing(path.parent, path.name) as fd:
        os.posix_fallocate(fd, 0, size)
        yield mmap.mmap(fd, size)
        reach(Failpoint.REPLICA_WRITTEN)
    reach(Failpoint.REPLICA_RENAMED)


class PeersTable:
    """``peers.tbl``, mapped. One process writes, any process reads."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._words = memoryview(memory).cast("Q")
        self._versions = memoryview(memory)[_PAGE : _PAGE + 4 * SLOTS].cast("I")

    @staticmethod
    def path(run_dir: Path) -> Path:
        """Path of the table."""
        return run_dir / "peers.tbl"

    @classmethod
    def create(cls, run_dir: Path, writer: int) -> PeersTable:
        """Replace the table by an empty one, and mark the old one as retired."""
        path = cls.path(run_dir)
        old = cls.open(run_dir, writable=True)
        with _new_file(path, _TABLE_BYTES) as memory:
            memory[: _START.size] = _START.pack(_TABLE_MAGIC, VERSION, SLOTS, writer)
            table = cls(memory)
            table._words[_PID] = os.getpid()
        if old is not None:
            old._words[_RETIRED] = 1
        return table

    @classmethod
    def open(cls, run_dir: Path, *, writable: bool = False) -> PeersTable | None:
        """Map the table; None if it is missing or of another version."""
        path = cls.path(run_dir)
        memory = _map(path, writable=writable)
        if memory is None or len(memory) != _TABLE_BYTES:
            return None
        if _START.unpack_from(memory)[:3] != (_TABLE_MAGIC, VERSION, SLOTS):
            return None
        return cls(memory)

    @property
    def writer(self) -> int:
        """Random number of the ``PeerSetsWriter`` that writes it."""
        return int(self._words[_WRITER])

    @property
    def heartbeat_ns(self) -> int:
        """CLOCK_MONOTONIC of the last heartbeat; 0: none yet."""
        return int(self._words[_HEARTBEAT])

    @heartbeat_ns.setter
    def heartbeat_ns(self, now: int) -> None:
        self._words[_HEARTBEAT] = now

    @property
    def retired(self) -> bool:
        """Has a newer table replaced it?"""
        return bool(self._words[_RETIRED])

    @property
    def namespaces(self) -> int:
        """Number of namespaces with an index."""
        return int(self._words[_NAMESPACES])

    @namespaces.setter
    def namespaces(self, count: int) -> None:
        self._words[_NAMESPACES] = count

    def versions(self) -> bytes:
        """Return four bytes per slot, which change with each entry."""
        return self._memory[_PAGE : _PAGE + 4 * SLOTS]

    def entry(self, slot: int) -> Entry | None:
        """Return the entry of a slot; None while it is being written."""
        at = _ENTRIES_AT + slot * _ENTRY_BYTES
        return Entry.unpack(slot, self._memory[at : at + _ENTRY_BYTES])

    def put(self, entry: Entry) -> None:
        """Write an entry, then its version."""
        at = _ENTRIES_AT + entry.peer.slot * _ENTRY_BYTES
        self._memory[at : at + _ENTRY_BYTES] = entry.pack()
        self._versions[entry.peer.slot] = entry.version


class SetIndex:
    """``index`` of one namespace, mapped: per slot of the table the current generation and its page count."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.writer = int(_START.unpack_from(memory)[3])
        words = memoryview(memory)[_PAGE:].cast("Q")
        self.generation, self.pages = words[:SLOTS], words[SLOTS:]

    @classmethod
    def create(cls, directory: Path, writer: int) -> SetIndex:
        """Make one without sets. Raises ``OSError``."""
        directory.mkdir(mode=0o700, exist_ok=True)
        with _new_file(directory / "index", _INDEX_BYTES) as memory:
            memory[: _START.size] = _START.pack(_INDEX_MAGIC, VERSION, SLOTS, writer)
        return cls(memory)

    @classmethod
    def open(cls, directory: Path, writer: int) -> SetIndex | None:
        """Map the index that ``writer`` made; None if it has made none."""
        memory = _map(directory / "index", writable=False)
        if memory is None or len(memory) != _INDEX_BYTES:
            return None
        if _START.unpack_from(memory) != (_INDEX_MAGIC, VERSION, SLOTS, writer):
            return None
        return cls(memory)

    def generations(self) -> bytes:
        """Return eight bytes per slot, which change when the slot gets another set."""
        return self._memory[_PAGE : _PAGE + 8 * SLOTS]


@dataclass(frozen=True, slots=True)
class SetPlace:
    """Identifies a set: directory of the namespace, slot, tenancy of the slot, generation of the set."""

    directory: Path
    slot: int
    tenancy: int
    generation: int

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.directory / f"p{self.slot}.{self.generation}.set"

    def header(self, count: int, buckets: int, records: int) -> bytes:
        """Encode the first bytes of the file, with their checksum at the end."""
        fields = (self.slot, self.generation, self.tenancy, count, buckets, records)
        data = _SET_HEADER.pack(_SET_MAGIC, VERSION, *fields)
        return data + struct.pack("<I", zlib.crc32(data))


def _set_layout(count: int, buckets: int, records: int) -> tuple[int, int, int, int]:
    """Return the offsets of fingerprints, chains and records, and of the file's end."""
    fps_at = round_up(_SET_HEADER_BYTES + 4 * (buckets + 1), 64)
    heads_at = round_up(fps_at + 8 * count, 64)
    records_at = heads_at + 4 * HEADS_PER_RECORD * records
    return fps_at, heads_at, records_at, records_at + 16 * records


def _set_parts(memory: mmap.mmap, place: SetPlace, sizes: tuple[int, int, int]) -> Parts:
    count, buckets, records = sizes
    fps_at, heads_at, records_at, _ = _set_layout(count, buckets, records)
    starts = np.frombuffer(memory, np.uint32, buckets + 1, _SET_HEADER_BYTES)
    fingerprints = np.frombuffer(memory, np.uint64, count, fps_at)
    heads = np.frombuffer(memory, np.uint32, HEADS_PER_RECORD * records, heads_at)
    rows = np.frombuffer(memory, np.uint64, 2 * records, records_at).reshape(records, 2)
    return SortedBase(fingerprints, starts), ChangeTable(heads, rows, place.generation & 0xFFFFFFFF)


def write_set(place: SetPlace, fingerprints: U64) -> Parts:
    """Write a set file of sorted, distinct ``fingerprints`` without changes; return it mapped. Raises ``OSError``."""
    sizes = len(fingerprints), bucket_count(len(fingerprints)), record_count(len(fingerprints))
    fps_at, heads_at, _, end = _set_layout(*sizes)
    with _new_file(place.path, end) as memory:
        header = place.header(*sizes)
        memory[: len(header)] = header
        starts = np.frombuffer(memory, np.uint32, sizes[1] + 1, _SET_HEADER_BYTES)
        starts[:] = bucket_starts(fingerprints)
        np.frombuffer(memory, np.uint64, sizes[0], fps_at)[:] = fingerprints
        # touches each page, so that readers can map it at once
        memory[heads_at:] = bytes(end - heads_at)
    return _set_parts(memory, place, sizes)


def open_set(place: SetPlace) -> Parts | None:
    """Map a set to read; None if there is no such file, or it is of another tenancy."""
    memory = _map(place.path, writable=False)
    if memory is None or len(memory) < _SET_HEADER_BYTES:
        return None
    count, buckets, records = _SET_HEADER.unpack_from(memory)[5:]
    header = place.header(count, buckets, records)
    if memory[: len(header)] != header or len(memory) != _set_layout(count, buckets, records)[3]:
        return None
    _touch(memory)
    return _set_parts(memory, place, (count, buckets, records))


def _touch(memory: mmap.mmap) -> None:
    """Map all pages now: page by page it would cost many later lookups 100 us and more each."""
    try:
        memory.madvise(_MADV_POPULATE_READ)
    except OSError:  # before Linux 5.14
        return


def remove_sets(run_dir: Path) -> None:
    """Remove the indexes and sets of an earlier writer, of all namespaces. Other files stay."""
    remove_temporaries(run_dir, PeersTable.path(run_dir).name + ".")
    for directory in run_dir.iterdir():
        if not _NAMESPACE.match(directory.name) or not directory.is_dir():
            continue
        for path in directory.iterdir():
            if path.name == "index" or _SET_NAME.match(path.name):
                path.unlink(missing_ok=True)
        remove_temporaries(directory, "")
