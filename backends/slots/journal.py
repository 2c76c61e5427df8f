"""Journal of one owner: the page in each slot. One format, read by restarts, by neighbours and by the agent.

Invariant: **data first, record second, index last**. A record is appended with one buffered ``write``
after the page's bytes are complete on the medium, so every process of the node sees it at once through
the page cache; a tombstone is appended before its slot is rewritten.

A *generation* is a snapshot (state at its start; absent for generation 0) plus a journal. ``rotate``
starts the next one: snapshot, new journal, SEAL in the old journal, old pair unlinked. Readers that
meet SEAL go on in the next journal without loading the snapshot: it says what they know already.
"""

from __future__ import annotations

import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.failpoints import Failpoint, reach
from flexkv_sglang.backends.file_lock import is_at
from flexkv_sglang.backends.safe_files import open_own, read_own, replacing, write_all
from flexkv_sglang.backends.slots.records import (
    HEADER_BYTES,
    JOURNAL_MAGIC,
    NO_PARENT,
    RECORD,
    RECORD_BYTES,
    SNAPSHOT_MAGIC,
    Header,
    RecordOp,
    Records,
    SlotClass,
    seal_records,
    valid_prefix,
)
from flexkv_sglang.errors import JournalError
from flexkv_sglang.types import PageKey

_JOURNAL_NAME = re.compile(r"^(?P<owner>[0-9a-f]{12})\.(?P<generation>\d+)\.journal$")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MIN_ROTATE_BYTES = 1 << 20
_SCRATCH_RECORDS = 1 << 13  # stay in the second-level cache


def journal_path(directory: Path, owner: str, generation: int) -> Path:
    """``<owner>.<generation>.journal``."""
    return directory / f"{owner}.{generation}.journal"


def snapshot_path(directory: Path, owner: str, generation: int) -> Path:
    """``<owner>.<generation>.snap``."""
    return directory / f"{owner}.{generation}.snap"


def slots_path(directory: Path, owner: str, slot_bytes: int) -> Path:
    """``<owner>.<slot_bytes>.slots``."""
    return directory / f"{owner}.{slot_bytes}.slots"


def stats_path(directory: Path, owner: str) -> Path:
    """``<owner>.stats.json``: live counters, for people and tools."""
    return directory / f"{owner}.stats.json"


def boot_id() -> str:
    """Identifies this boot of the kernel: page-cache writes of an earlier boot may be lost."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def new_records(op: RecordOp, count: int) -> Records:
    """``count`` blank records of one kind."""
    records = np.zeros(count, RECORD)
    records["op"] = op
    records["parent"] = NO_PARENT
    return records


def keys_field(keys: list[PageKey]) -> npt.NDArray[np.void]:
    """Keys as the array type of a record's ``key`` field."""
    return np.frombuffer(b"".join(keys), "V32")


@dataclass(frozen=True, slots=True)
class LiveState:
    """The pages of an owner: the last record per slot, oldest first. Arrays of one length.

    ``records`` are PUTs. ``end`` is the journal's valid length in bytes, ``seq`` the last number read.
    ``sealed``: the generation to go on in, or None. ``clean``: the owner closed it properly.
    """

    header: Header
    records: Records
    end: int
    seq: int
    sealed: int | None
    clean: bool


class JournalWriter:
    """Appends to one owner's journal. The caller holds the owner's flock and serialises all calls."""

    def __init__(self, directory: Path, header: Header, *, position: int, seq: int) -> None:
        self.directory = directory
        self.header = header
        self._seq = seq
        self._size = position
        self._broken = False
        self._process = os.getpid()
        self._fd = open_own(self.path, os.O_WRONLY | os.O_APPEND)
        if os.fstat(self._fd).st_size != position:
            os.ftruncate(self._fd, position)  # a torn tail of a crashed owner

    @classmethod
    def create(
        cls, directory: Path, namespace: str, owner: str, files: tuple[SlotClass, ...]
    ) -> JournalWriter:
        """Generation 0 of a new owner."""
        header = Header(namespace, owner, secrets.randbits(63), 0, 0, boot_id(), files)
        _publish(journal_path(directory, owner, 0), header.pack(JOURNAL_MAGIC))
        return cls(directory, header, position=HEADER_BYTES, seq=0)

    @property
    def path(self) -> Path:
        """The file that is appended to."""
        return journal_path(self.directory, self.header.owner, self.header.generation)

    @property
    def size(self) -> int:
        """Bytes, header included."""
        return self._size

    @property
    def in_place(self) -> bool:
        """Does its path name the file that is appended to, as long as it was written? Raises ``OSError``."""
        return is_at(self.path, self._fd) and os.fstat(self._fd).st_size == self._size

    def append(self, records: Records) -> None:
        """Number, seal and append ``records`` with one write.

        Raises ``JournalError``; the journal then holds none of them, and takes nothing more if it could
        not be cut back to where it was.
        """
        self._refuse_child()
        if self._broken:
            raise JournalError(f"{self.path} was given up after a failed write")
        data = seal_records(records, self.header.crc_seed, self._seq)
        reach(Failpoint.APPEND_BEFORE, self._fd, data)
        try:
            written = os.write(self._fd, data)
        except OSError as exc:
            self._cut_back()
            raise JournalError(f"cannot append to {self.path}: {exc}") from exc
        if written != len(data):
            self._cut_back()
            raise JournalError(f"wrote {written} of {len(data)} bytes to {self.path}")
        self._size += written
        self._seq += len(records)
        reach(Failpoint.APPEND_DONE)

    def _refuse_child(self) -> None:
        """A forked process has our descriptor, too: its records would have the numbers of the next ones here."""
        if os.getpid() != self._process:
            raise JournalError(f"{self.path} belongs to process {self._process}, which forked")

    def should_rotate(self, live_count: int) -> bool:
        """True when most of the journal is history."""
        return self._size > max(_MIN_ROTATE_BYTES, 2 * live_count * RECORD_BYTES + HEADER_BYTES)

    def rotate(
        self, live: Records, files: tuple[SlotClass, ...] | None = None, *, sealed: bool = True
    ) -> None:
        """Start the next generation with ``live`` (PUTs, oldest first) as its snapshot.

        ``files``: the slot files from now on, if their sizes changed.
        ``sealed=False``: this journal may list more than ``live``, so no reader may go on from it: a neighbour that
        tails it sees it vanish, and loads the snapshot.
        """
        self._refuse_child()
        reach(Failpoint.ROTATE_BEFORE)
        old = self.header
        header = replace(
            old,
            generation=old.generation + 1,
            base_seq=self._seq + 1,
            boot_id=boot_id(),
            files=files or old.files,
        )
        new_path = journal_path(self.directory, old.owner, header.generation)
        old_path = self.path
        try:
            write_snapshot(self.directory, header, live)
            reach(Failpoint.ROTATE_SNAPSHOT)
            _publish(new_path, header.pack(JOURNAL_MAGIC))
            new_fd = open_own(new_path, os.O_WRONLY | os.O_APPEND)
        except OSError:
            self._drop_generation(header.generation)
            raise
        reach(Failpoint.ROTATE_JOURNAL)
        if sealed:
            self._seal(new_fd, header.generation)
        reach(Failpoint.ROTATE_SEALED)
        os.close(self._fd)
        self._fd, self.header, self._size, self._seq = new_fd, header, HEADER_BYTES, header.base_seq
        # The journal last: an adopter finds generations, and so their snapshots, by their journals.
        _unlink(snapshot_path(self.directory, old.owner, old.generation))
        reach(Failpoint.ROTATE_UNLINK)
        _unlink(old_path)
        reach(Failpoint.ROTATE_DONE)

    def _seal(self, new_fd: int, generation: int) -> None:
        seal = new_records(RecordOp.SEAL, 1)
        seal["slot"] = generation
        try:
            self.append(seal)
        except JournalError:
            os.close(new_fd)
            self._drop_generation(generation)
            raise

    def _drop_generation(self, generation: int) -> None:
        """Undo half a rotation: recovery takes the newest generation, and ours goes on in the old one."""
        for path in (journal_path, snapshot_path):  # the journal first: it makes a generation
            path(self.directory, self.header.owner, generation).unlink(missing_ok=True)

    def sync(self) -> None:
        """Flush to the medium."""
        os.fdatasync(self._fd)

    def repair(self) -> None:
        """After a failed append: cut the journal back to its last whole record. Raises ``OSError``."""
        os.ftruncate(self._fd, self._size)
        self._broken = False

    def close(self, *, clean: bool) -> None:
        """Idempotent. ``clean``: the slot file was flushed, so append CLOSE and flush the journal."""
        if self._fd < 0:
            return
        try:
            if clean and not self._broken:
                self.append(new_records(RecordOp.CLOSE, 1))
                reach(Failpoint.CLOSE_RECORDED)
                self.sync()
        finally:
            os.close(self._fd)
            self._fd = -1

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._broken = True


def write_snapshot(directory: Path, header: Header, live: Records) -> None:
    """Snapshot of ``header.generation``, flushed and put in place by rename.

    Its records have no number and no CRC of their own: the header has one over all of them.
    """
    crc = 0
    for part in _plain_parts(live):
        crc = zlib.crc32(part, crc)
    header = replace(header, record_count=len(live), body_crc=crc)
    path = snapshot_path(directory, header.owner, header.generation)
    _publish(path, header.pack(SNAPSHOT_MAGIC), _plain_parts(live), sync=True)


def _plain_parts(live: Records) -> Iterator[memoryview]:
    """The records without numbers and CRCs, piece by piece. A piece is good until the next one."""
    scratch = np.empty(_SCRATCH_RECORDS, RECORD)
    for start in range(0, len(live), _SCRATCH_RECORDS):
        part = live[start : start + _SCRATCH_RECORDS]
        piece = scratch[: len(part)]
        piece[:] = part
        piece["crc"] = piece["seq"] = 0
        yield piece.view(np.uint8).data


def _publish(
    path: Path, head: bytes, body: Iterable[memoryview] = (), *, sync: bool = False
) -> None:
    """Write a whole file and rename it into place: nobody ever sees a part of it."""
    with replacing(path.parent, path.name) as fd:
        reach(Failpoint.PUBLISH_BEFORE, fd, head)
        write_all(fd, chain([head], body), sync=sync)
        reach(Failpoint.PUBLISH_WRITTEN)
    reach(Failpoint.PUBLISH_RENAMED)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def generations(directory: Path, owner: str) -> list[int]:
    """Generations of ``owner`` with a journal on disk, newest first."""
    found = [
        int(match["generation"])
        for name in os.listdir(directory)
        if (match := _JOURNAL_NAME.match(name)) and match["owner"] == owner
    ]
    return sorted(found, reverse=True)


def recover(directory: Path, owner: str, namespace: str) -> LiveState:
    """State of ``owner`` from its newest valid generation.

    A record with a wrong CRC or number ends the journal; records that name an unknown file or a slot
    out of range are dropped; of two records for one slot the later wins. Raises ``JournalError`` when no
    generation is valid or the owner belongs to another namespace.
    """
    problems: list[str] = []
    for generation in generations(directory, owner):
        try:
            return _recover_generation(directory, owner, namespace, generation)
        except (JournalError, OSError) as exc:
            problems.append(f"generation {generation}: {exc}")
    raise JournalError(
        f"owner {owner} in {directory} has no valid journal: {'; '.join(problems) or 'none found'}"
    )


def _recover_generation(directory: Path, owner: str, namespace: str, generation: int) -> LiveState:
    path = journal_path(directory, owner, generation)
    with open(open_own(path), "rb") as file:
        header = Header.unpack(file.read(HEADER_BYTES), JOURNAL_MAGIC)  # cheap to refuse
        size, limit = os.fstat(file.fileno()).st_size, _journal_bytes_max(header)
        if size > limit:
            raise JournalError(f"{path} has {size} bytes, more than the {limit} that it can have")
        raw = file.read(size)
    if header.namespace != namespace or header.owner != owner or header.generation != generation:
        raise JournalError(f"belongs to {header.namespace}/{header.owner}.{header.generation}")
    parts = [read_snapshot(directory, header)] if generation else []
    journal = valid_prefix(raw, header.crc_seed, header.base_seq)
    parts.append(journal)
    parts = [part for part in parts if len(part)] or [journal]
    # One part alone is not copied: 64 bytes per page that are never touched.
    live = last_words(parts[0] if len(parts) == 1 else np.concatenate(parts), header)
    ops = journal["op"]
    sealed = int(journal["slot"][-1]) if len(journal) and ops[-1] == RecordOp.SEAL else None
    return LiveState(
        header,
        live,
        HEADER_BYTES + len(journal) * RECORD_BYTES,
        header.base_seq + len(journal),
        sealed,
        bool(len(journal) and ops[-1] == RecordOp.CLOSE),
    )


def _journal_bytes_max(header: Header) -> int:
    """Four times the size at which an owner starts a new generation; it may be late, but not by that much."""
    slots = sum(item.slot_count for item in header.files)
    return 4 * max(_MIN_ROTATE_BYTES, 2 * slots * RECORD_BYTES + HEADER_BYTES)


def read_snapshot(directory: Path, journal_header: Header) -> Records:
    """Records of the snapshot that belongs to a journal. Raises ``JournalError`` if it is not whole."""
    slots = sum(item.slot_count for item in journal_header.files)
    path = snapshot_path(directory, journal_header.owner, journal_header.generation)
    raw = read_own(path, HEADER_BYTES + slots * RECORD_BYTES)
    header = Header.unpack(raw[:HEADER_BYTES], SNAPSHOT_MAGIC)
    body = raw[HEADER_BYTES:]
    if header.crc_seed != journal_header.crc_seed or header.namespace != journal_header.namespace:
        raise JournalError("the snapshot belongs to another owner")
    if len(body) != header.record_count * RECORD_BYTES or zlib.crc32(body) != header.body_crc:
        raise JournalError("the snapshot's checksum does not match")
    return np.frombuffer(body, RECORD)


def last_words(records: Records, header: Header) -> Records:
    """The PUTs that still hold after all of ``records``, in the order they were written."""
    ops = np.ascontiguousarray(records["op"])
    clears = np.flatnonzero(ops == RecordOp.CLEAR)
    if len(clears):
        records, ops = records[clears[-1] + 1 :], ops[clears[-1] + 1 :]
    counts = np.array([item.slot_count for item in header.files], np.int64)
    bases = np.concatenate([[0], np.cumsum(counts)])
    known = np.flatnonzero(
        ((ops == RecordOp.PUT) | (ops == RecordOp.DEL)) & (records["file"] < len(counts))
    )
    file, slot = _taken(records["file"], known), _taken(records["slot"], known)
    inside = slot < counts[file]
    if not inside.all():
        known, file, slot = known[inside], file[inside], slot[inside]
    place = bases[file] + slot
    stands = np.zeros(len(records), np.bool_)
    if (
        bases[-1] > 64 * len(known) + _SCRATCH_RECORDS
    ):  # memory by the records, not by what a header says
        latest = np.unique(place[::-1], return_index=True)[1]
        stands[known[len(known) - 1 - latest]] = True
    else:
        position = np.full(int(bases[-1]), -1, np.int64)
        position[place] = known  # of several, the last stays
        stands[position[position >= 0]] = True
    return _taken(records, np.flatnonzero(stands & (ops == RecordOp.PUT)))


def _taken(column: Records, rows: npt.NDArray[np.intp]) -> Records:
    """``column[rows]``, ``rows`` ascending; not a copy if they follow each other, as they mostly do."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return column[rows[0] : rows[-1] + 1]
    return column[rows]
