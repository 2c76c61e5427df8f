"""NeighbourJournal: the pages of one neighbour, as its journal lists them, and a claim on one of them."""

from __future__ import annotations

import os
import threading
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.io.transfer import IoMode
from flexkv_sglang.backends.safe_files import open_own
from flexkv_sglang.backends.slots.journal import journal_path, recover, slots_path
from flexkv_sglang.backends.slots.records import (
    HEADER_BYTES,
    JOURNAL_MAGIC,
    RECORD_BYTES,
    Header,
    RecordOp,
    Records,
    valid_prefix,
)
from flexkv_sglang.backends.slots.slot_file import SlotFile
from flexkv_sglang.errors import JournalError
from flexkv_sglang.types import PageKey

_MAX_TAIL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class NeighbourPage:
    """A neighbour's claim to hold a page: valid only if ``still_valid`` says so after the read."""

    journal: NeighbourJournal
    key: PageKey
    slot: int
    version: int
    kind: ChecksumKind
    checksum: int


class NeighbourJournal:
    """The pages of one neighbour, as its journal lists them. Guarded by ``NeighbourStore``'s lock.

    The place in the file belongs to the one thread that polls.
    """

    def __init__(
        self,
        directory: Path,
        owner: str,
        namespace: str,
        payload_bytes: int,
        mode: IoMode,
        accepted: frozenset[ChecksumKind],
        *,
        observed: bool = False,
    ) -> None:
        self.owner = owner
        self._accepted = accepted
        self.events: list[tuple[bool, PageKey]] | None = None  # (present now, key), if observed
        self.leases = 0
        self.dropped = False
        self.directory = directory
        self._payload_bytes = payload_bytes
        state = recover(directory, owner, namespace)
        self._header = state.header
        slot_class = state.header.files[0]
        if slot_class.payload_bytes != payload_bytes:
            raise JournalError(
                f"neighbour {owner} stores pages of {slot_class.payload_bytes} bytes, not {payload_bytes}"
            )
        if (
            slots_path(directory, owner, slot_class.slot_bytes).lstat().st_size
            < slot_class.slot_bytes * slot_class.slot_count
        ):
            raise JournalError(
                f"the slot file of neighbour {owner} is smaller than its journal says"
            )
        self._position, self._seq = state.end, state.seq
        self._slot_of: dict[PageKey, int] = {}
        self._version = array(
            "Q", bytes(8 * slot_class.slot_count)
        )  # per slot, the number of the record that filled it
        self._sums = array("Q", [0]) * slot_class.slot_count
        self._kinds = bytearray(slot_class.slot_count)
        self._next_version = 1
        self._apply(state.records)
        if observed:
            self.events = [(True, key) for key in self._slot_of]
        self._fd = open_own(journal_path(directory, owner, state.header.generation))
        try:
            self.slots = SlotFile(
                slots_path(directory, owner, slot_class.slot_bytes),
                slot_class,
                mode,
                writable=False,
            )
        except BaseException:
            os.close(self._fd)
            raise

    def __len__(self) -> int:
        return len(self._slot_of)

    def keys(self) -> list[PageKey]:
        """Keys of all pages it claims."""
        return list(self._slot_of)

    def find(self, key: PageKey) -> NeighbourPage | None:
        """The neighbour's claim on ``key``."""
        slot = self._slot_of.get(key)
        if slot is None:
            return None
        return NeighbourPage(
            self, key, slot, self._version[slot], ChecksumKind(self._kinds[slot]), self._sums[slot]
        )

    def confirms(self, page: NeighbourPage) -> bool:
        """True if no record named the page's slot since it was found."""
        return (
            not self.dropped
            and self._slot_of.get(page.key) == page.slot
            and self._version[page.slot] == page.version
        )

    def forget(self, page: NeighbourPage) -> None:
        """Drop a page whose bytes were bad."""
        if self.confirms(page):
            del self._slot_of[page.key]

    def poll(self, lock: threading.Lock) -> bool:
        """Apply the records since the last look, under ``lock``. False: this journal cannot be followed any further."""
        try:
            for _ in range(2):  # twice, for a SEAL that came just before the file was unlinked
                while (records := self._read_tail()) is not None:
                    with lock:
                        self._apply(records)
                    if records["op"][-1] == RecordOp.SEAL and not self._follow(
                        int(records["slot"][-1])
                    ):
                        return False
                status = os.fstat(self._fd)
                if status.st_size < self._position:
                    return False
                if status.st_nlink:
                    return True
        except (OSError, JournalError):
            return False
        return False

    def close(self) -> None:
        """Close descriptors. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.slots.close()

    def _read_tail(self) -> Records | None:
        raw = os.pread(self._fd, _MAX_TAIL_BYTES, self._position)
        if len(raw) < RECORD_BYTES:
            return None
        records = valid_prefix(raw, self._header.crc_seed, self._seq)
        if not len(records):
            if len(raw) == _MAX_TAIL_BYTES:
                raise JournalError(f"{self.owner}: invalid record at {self._position}")
            return None  # a record that is being written right now; next time
        self._position += len(records) * RECORD_BYTES
        self._seq += len(records)
        seals = np.flatnonzero(records["op"] == RecordOp.SEAL)
        return records[: seals[0] + 1] if len(seals) else records

    def _follow(self, generation: int) -> bool:
        fd = open_own(journal_path(self.directory, self.owner, generation))
        os.close(self._fd)
        self._fd = fd
        header = Header.unpack(os.pread(fd, HEADER_BYTES, 0), JOURNAL_MAGIC)
        if header.crc_seed != self._header.crc_seed or header.files != self._header.files:
            return False
        self._header, self._position = header, HEADER_BYTES
        contiguous = header.base_seq == self._seq
        self._seq = header.base_seq
        return contiguous

    def _apply(self, records: Records) -> None:
        fields = zip(
            records["op"].tolist(),
            records["slot"].tolist(),
            records["key"].tolist(),
            records["sum"].tolist(),
            records["flags"].tolist(),
            records["len"].tolist(),
            strict=True,
        )
        for op, slot, key, total, flags, length in fields:
            self._next_version += 1
            if self.events is not None:
                self._tell(op, key)
            if op == RecordOp.PUT and slot < len(self._sums) and self._usable(flags, length):
                self._slot_of[key] = slot
                self._version[slot] = self._next_version
                self._sums[slot] = total
                self._kinds[slot] = flags & 0xFF
            elif op == RecordOp.DEL and slot < len(self._sums):
                self._version[slot] = self._next_version
                if self._slot_of.get(key) == slot:
                    del self._slot_of[key]
            elif op == RecordOp.CLEAR:
                self._slot_of.clear()

    def _tell(self, op: int, key: PageKey) -> None:
        """Note an event for the observer, before the record is applied."""
        assert self.events is not None
        if op == RecordOp.CLEAR:
            self.events += [(False, held) for held in self._slot_of]
        elif op in (RecordOp.PUT, RecordOp.DEL):
            self.events.append((op == RecordOp.PUT, key))

    def _usable(self, flags: int, length: int) -> bool:
        return length == self._payload_bytes and flags & 0xFF in self._accepted
