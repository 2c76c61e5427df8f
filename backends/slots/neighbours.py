"""Pages of other owners in the same directory and namespace, found by following their journals.

There is no service and no shared memory, only files. Nothing protects a neighbour's slot, so every read is
followed by ``still_valid``, which reads the journal's tail again (the idea of a seqlock): the owner appends the
tombstone *before* it rewrites a slot, so a torn read implies a tombstone that the second look sees. The
page's checksum is verified as well. Until both have passed, everything here is a hint.

Threads: any. One lock guards the journals of ``NeighbourStore``; it is held for dict work and for reading the tail
of a file that lies in the page cache (0.5 us), never while loading a whole journal.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.io.transfer import Extents, IoMode
from flexkv_sglang.backends.safe_files import open_own
from flexkv_sglang.backends.slots.journal import journal_path, recover, slots_path
from flexkv_sglang.backends.slots.ownership import owners
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
from flexkv_sglang.errors import JournalError, TierUnavailableError
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.001
_LOAD_TRIES = 3
_MAX_TAIL_BYTES = 1 << 20

Observer = Callable[[bool, list[PageKey]], None]
"""(present now, keys). A key may be reported again without a change."""


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
    """The pages of one neighbour, as its journal lists them. Guarded by ``NeighbourStore``'s lock."""

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
        self._directory = directory
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

    def poll(self) -> bool:
        """Apply the records since the last look. False: this journal cannot be followed any further."""
        try:
            for _ in range(2):  # twice, for a SEAL that came just before the file was unlinked
                while (records := self._read_tail()) is not None:
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
        fd = open_own(journal_path(self._directory, self.owner, generation))
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


class NeighbourStore:
    """All neighbours of this process in a list of (directory, how to read there)."""

    def __init__(
        self,
        places: Sequence[tuple[Path, IoMode]],
        namespace: str,
        payload_bytes: int,
        own: Iterable[str],
        accepted: frozenset[ChecksumKind],
        observer: Observer | None = None,
    ) -> None:
        """``observer`` is called for every page that appears or vanishes, under the lock."""
        self._accepted = accepted
        self._observer = observer
        self._departed: list[PageKey] = []  # of owners that were dropped; guarded by _lock
        self._places = list(places)
        self._namespace = namespace
        self._payload_bytes = payload_bytes
        self._own = frozenset(own)
        self._lock = threading.Lock()
        self._journals: dict[tuple[Path, str], NeighbourJournal] = {}  # guarded by _lock
        self._polled_at = 0.0  # guarded by _lock
        self._log = RateLimitedLog(logger, math.inf)  # each reason once

    def __len__(self) -> int:
        """Pages that neighbours claim to hold (a page held twice counts twice)."""
        with self._lock:
            return sum(len(journal) for journal in self._journals.values())

    @property
    def neighbour_count(self) -> int:
        """Owners whose journals are followed."""
        return len(self._journals)

    @property
    def directories(self) -> list[Path]:
        """Where it looks."""
        return [directory for directory, _ in self._places]

    def scan(self) -> None:
        """Look for new owners in every directory and load their journals. One thread at a time."""
        for directory, _ in self._places:
            self.scan_directory(directory)

    def scan_directory(self, directory: Path) -> None:
        """Look for new owners in one directory and load their journals. One thread at a time per directory."""
        (mode,) = (mode for place, mode in self._places if place == directory)
        try:
            names = owners(directory)
        except FileNotFoundError:
            names = []  # no pages of this namespace there
        except OSError as exc:
            kind = directory, str(exc)
            self._log.log(kind, logging.WARNING, "flexkv: cannot list %s: %s", directory, exc)
            names = []
        for owner in names:
            if owner not in self._own and (directory, owner) not in self._journals:
                self._load(directory, owner, mode)
        with self._lock:
            self._poll_locked()
            departed, self._departed = self._departed, []
            self._report(
                [(False, key) for key in departed]
            )  # ``_report`` looks whether another owner has it by now

    def poll(self) -> None:
        """Follow the journals of the owners that are known."""
        with self._lock:
            self._poll_locked()

    def find(self, keys: Sequence[PageKey]) -> list[NeighbourPage]:
        """Claims on the leading run of ``keys``. Takes a lease on every journal named: give them to ``release``."""
        found: list[NeighbourPage] = []
        with self._lock:
            self._poll_if_due()
            for key in keys:
                page = self._find_locked(key)
                if page is None:
                    break
                page.journal.leases += 1
                found.append(page)
        return found

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: does a neighbour claim it?"""
        with self._lock:
            self._poll_if_due()
            return [self._find_locked(key) is not None for key in keys]

    def prefix(self, keys: Sequence[PageKey]) -> int:
        """Length of the leading run of keys that neighbours claim. Memory only."""
        with self._lock:
            self._poll_if_due()
            if not self._journals:
                return 0
            for count, key in enumerate(keys):
                if self._find_locked(key) is None:
                    return count
        return len(keys)

    def still_valid(self, pages: Sequence[NeighbourPage]) -> list[bool]:
        """The second look: per page, whether the bytes just read are those that were claimed."""
        with self._lock:
            self._poll_locked()
            return [page.journal.confirms(page) for page in pages]

    def forget(self, pages: Sequence[NeighbourPage]) -> None:
        """Drop pages whose bytes were bad, until their owner records them again."""
        with self._lock:
            for page in pages:
                page.journal.forget(page)

    def release(self, pages: Sequence[NeighbourPage]) -> None:
        """Give back the leases of ``find``."""
        with self._lock:
            for page in pages:
                page.journal.leases -= 1
                self._close_if_unused(page.journal)

    def close(self) -> None:
        """Close all journals. Idempotent."""
        with self._lock:
            for key in list(self._journals):
                self._drop(key)

    @staticmethod
    def extents(pages: Sequence[NeighbourPage]) -> Extents:
        """Files, offsets and modes of claimed pages, as ``PageTransfer`` takes them."""
        files = [page.journal.slots for page in pages]
        offsets = [
            page.slot * file.slot_class.slot_bytes for page, file in zip(pages, files, strict=True)
        ]
        return (
            np.array([file.fd for file in files], np.int32),
            np.array(offsets, np.uint64),
            tuple(file.mode for file in files),
        )

    def _load(self, directory: Path, owner: str, mode: IoMode) -> None:
        for _ in range(_LOAD_TRIES):  # the owner may start a new generation while we read
            try:
                journal = NeighbourJournal(
                    directory,
                    owner,
                    self._namespace,
                    self._payload_bytes,
                    mode,
                    self._accepted,
                    observed=self._observer is not None,
                )
            except FileNotFoundError:
                continue
            except (JournalError, TierUnavailableError, OSError) as exc:
                text = "flexkv: owner %s in %s is not readable (yet): %s"
                kind = directory, owner, str(exc)
                self._log.log(kind, logging.INFO, text, owner, directory, exc)
                return
            with self._lock:
                self._journals[directory, owner] = journal
            logger.info("flexkv: neighbour %s in %s: %d pages", owner, directory, len(journal))
            return

    def _find_locked(self, key: PageKey) -> NeighbourPage | None:
        for journal in self._journals.values():
            page = journal.find(key)
            if page is not None:
                return page
        return None

    def _poll_if_due(self) -> None:
        if time.monotonic() - self._polled_at > _POLL_INTERVAL_S:
            self._poll_locked()

    def _poll_locked(self) -> None:
        for key, journal in list(self._journals.items()):
            if not journal.poll():
                self._drop(key)
            if journal.events:
                events, journal.events = journal.events, []
                self._report(events)
        self._polled_at = time.monotonic()

    def _report(self, events: list[tuple[bool, PageKey]]) -> None:
        """Tell the observer, in order, which of these keys are present now."""
        if self._observer is None or not events:
            return
        now = [(self._find_locked(key) is not None, key) for _, key in events]
        for present, group in groupby(now, key=itemgetter(0)):
            self._observer(present, [key for _, key in group])

    def _drop(self, key: tuple[Path, str]) -> None:
        journal = self._journals.pop(key)
        journal.dropped = True
        if self._observer is not None:  # it may be back at the next scan
            self._departed += journal.keys()
        self._close_if_unused(journal)

    @staticmethod
    def _close_if_unused(journal: NeighbourJournal) -> None:
        if journal.dropped and journal.leases == 0:
            journal.close()
