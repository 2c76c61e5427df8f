"""NeighbourStore: pages of other owners in the same directory and namespace, found by tailing their journals.

No service, no shared memory: reading files. A neighbour's slot is protected by nothing, so every read is
followed by ``still_valid``, which tails the journal again (the idea of a seqlock): the owner appends the
tombstone *before* it rewrites a slot, so a torn read implies a tombstone that the second look sees. The
page's checksum is verified as well. Everything here is a hint until both have passed.

Threads: any. One lock guards the replicas; it is held for dict work and for reading the tail of a file
that lies in the page cache (0.5 us), never while loading a whole journal.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.journal import journal_path, recover, slots_path
from flexkv_sglang.backends.ownership import owners
from flexkv_sglang.backends.probe import IoMode
from flexkv_sglang.backends.records import (
    HEADER_BYTES,
    JOURNAL_MAGIC,
    RECORD_BYTES,
    Header,
    Op,
    Records,
    valid_prefix,
)
from flexkv_sglang.backends.slot_file import Extents, SlotFile
from flexkv_sglang.errors import JournalError, TierUnavailableError
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.001
_MAX_TAIL_BYTES = 1 << 20
_LOAD_TRIES = 3


@dataclass(frozen=True, slots=True)
class NeighbourPage:
    """A neighbour's claim to hold a page: valid only if ``still_valid`` says so after the read."""

    replica: Replica
    key: PageKey
    slot: int
    version: int
    kind: ChecksumKind
    checksum: int


class Replica:
    """What one neighbour holds, as its journal says. Guarded by ``NeighbourStore``'s lock."""

    def __init__(
        self,
        directory: Path,
        owner: str,
        namespace: str,
        payload_bytes: int,
        mode: IoMode,
        accepted: frozenset[ChecksumKind],
    ) -> None:
        self.owner = owner
        self._accepted = accepted
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
        self._position, self._seq = state.end, state.seq
        self._slot_of: dict[PageKey, int] = {}
        self._version = array(
            "Q", bytes(8 * slot_class.slot_count)
        )  # number of the record that says so
        self._sums = array("Q", [0]) * slot_class.slot_count
        self._kinds = bytearray(slot_class.slot_count)
        self._next_version = 1
        self._apply(state.records)
        self._fd = os.open(
            journal_path(directory, owner, state.header.generation), os.O_RDONLY | os.O_CLOEXEC
        )
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

    def find(self, key: PageKey) -> NeighbourPage | None:
        """The neighbour's claim on ``key``."""
        slot = self._slot_of.get(key)
        if slot is None:
            return None
        return NeighbourPage(
            self, key, slot, self._version[slot], ChecksumKind(self._kinds[slot]), self._sums[slot]
        )

    def confirms(self, page: NeighbourPage) -> bool:
        """True if nothing was said about the page since it was found."""
        return (
            not self.dropped
            and self._slot_of.get(page.key) == page.slot
            and self._version[page.slot] == page.version
        )

    def forget(self, page: NeighbourPage) -> None:
        """Stop believing in a page that turned out bad."""
        if self.confirms(page):
            del self._slot_of[page.key]

    def poll(self) -> bool:
        """Apply what the journal says since the last look. False: the replica is of no use any more."""
        try:
            for _ in range(
                2
            ):  # once more after the file was unlinked: SEAL may have come in between
                while (records := self._read_tail()) is not None:
                    self._apply(records)
                    if records["op"][-1] == Op.SEAL and not self._follow(int(records["slot"][-1])):
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
        records = valid_prefix(raw, self._header.epoch, self._seq)
        if not len(records):
            if len(raw) == _MAX_TAIL_BYTES:
                raise JournalError(f"{self.owner}: invalid record at {self._position}")
            return None  # a record that is being written right now; next time
        self._position += len(records) * RECORD_BYTES
        self._seq += len(records)
        seals = np.flatnonzero(records["op"] == Op.SEAL)
        return records[: seals[0] + 1] if len(seals) else records

    def _follow(self, generation: int) -> bool:
        fd = os.open(
            journal_path(self._directory, self.owner, generation), os.O_RDONLY | os.O_CLOEXEC
        )
        os.close(self._fd)
        self._fd = fd
        header = Header.unpack(os.pread(fd, HEADER_BYTES, 0), JOURNAL_MAGIC)
        if header.epoch != self._header.epoch or header.files != self._header.files:
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
            if op == Op.PUT and slot < len(self._sums) and self._usable(flags, length):
                self._slot_of[key] = slot
                self._version[slot] = self._next_version
                self._sums[slot] = total
                self._kinds[slot] = flags & 0xFF
            elif op == Op.DEL and slot < len(self._sums):
                self._version[slot] = self._next_version
                if self._slot_of.get(key) == slot:
                    del self._slot_of[key]
            elif op == Op.CLEAR:
                self._slot_of.clear()

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
    ) -> None:
        self._accepted = accepted
        self._places = list(places)
        self._namespace = namespace
        self._payload_bytes = payload_bytes
        self._own = frozenset(own)
        self._lock = threading.Lock()
        self._replicas: dict[tuple[Path, str], Replica] = {}  # guarded by _lock
        self._polled_at = 0.0  # guarded by _lock
        self._rejected: dict[
            tuple[Path, str], str
        ] = {}  # used by scan() alone: logged once per reason

    def __len__(self) -> int:
        """Pages that neighbours claim to hold (a page held twice counts twice)."""
        with self._lock:
            return sum(len(replica) for replica in self._replicas.values())

    @property
    def neighbour_count(self) -> int:
        """Owners that are tailed."""
        return len(self._replicas)

    def scan(self) -> None:
        """Look for new owners and load their journals. Called at start and by the engine's tail thread alone."""
        for directory, mode in self._places:
            try:
                names = owners(directory)
            except OSError as exc:
                logger.warning("flexkv: cannot list %s: %s", directory, exc)
                continue
            for owner in names:
                if owner not in self._own and (directory, owner) not in self._replicas:
                    self._load(directory, owner, mode)
        with self._lock:
            self._poll_locked()

    def find(self, keys: Sequence[PageKey]) -> list[NeighbourPage]:
        """Claims on the leading run of ``keys``. Takes a lease on every replica named: give them to ``release``."""
        found: list[NeighbourPage] = []
        with self._lock:
            self._poll_if_due()
            for key in keys:
                page = self._find_locked(key)
                if page is None:
                    break
                page.replica.leases += 1
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
            if not self._replicas:
                return 0
            for count, key in enumerate(keys):
                if self._find_locked(key) is None:
                    return count
        return len(keys)

    def still_valid(self, pages: Sequence[NeighbourPage]) -> list[bool]:
        """The second look: per page, whether the bytes just read are those that were claimed."""
        with self._lock:
            self._poll_locked()
            return [page.replica.confirms(page) for page in pages]

    def forget(self, pages: Sequence[NeighbourPage]) -> None:
        """These turned out bad: do not claim them again until their owner says something new."""
        with self._lock:
            for page in pages:
                page.replica.forget(page)

    def release(self, pages: Sequence[NeighbourPage]) -> None:
        """Give back the leases of ``find``."""
        with self._lock:
            for page in pages:
                page.replica.leases -= 1
                self._close_if_unused(page.replica)

    def close(self) -> None:
        """Drop all replicas. Idempotent."""
        with self._lock:
            for key in list(self._replicas):
                self._drop(key)

    @staticmethod
    def extents(pages: Sequence[NeighbourPage]) -> Extents:
        """Where claimed pages lie."""
        return Extents(
            np.array([page.replica.slots.fd for page in pages], np.int32),
            np.array(
                [page.slot * page.replica.slots.slot_class.slot_bytes for page in pages], np.uint64
            ),
            tuple(page.replica.slots.mode for page in pages),
        )

    def _load(self, directory: Path, owner: str, mode: IoMode) -> None:
        for _ in range(_LOAD_TRIES):  # the owner may start a new generation while we read
            try:
                replica = Replica(
                    directory, owner, self._namespace, self._payload_bytes, mode, self._accepted
                )
            except FileNotFoundError:
                continue
            except (JournalError, TierUnavailableError, OSError) as exc:
                if self._rejected.get((directory, owner)) != str(exc):
                    self._rejected[directory, owner] = str(exc)
                    logger.info(
                        "flexkv: owner %s in %s is not readable (yet): %s", owner, directory, exc
                    )
                return
            with self._lock:
                self._replicas[directory, owner] = replica
            logger.info("flexkv: neighbour %s in %s: %d pages", owner, directory, len(replica))
            return

    def _find_locked(self, key: PageKey) -> NeighbourPage | None:
        for replica in self._replicas.values():
            page = replica.find(key)
            if page is not None:
                return page
        return None

    def _poll_if_due(self) -> None:
        if time.monotonic() - self._polled_at > _POLL_INTERVAL_S:
            self._poll_locked()

    def _poll_locked(self) -> None:
        for key, replica in list(self._replicas.items()):
            if not replica.poll():
                self._drop(key)
        self._polled_at = time.monotonic()

    def _drop(self, key: tuple[Path, str]) -> None:
        replica = self._replicas.pop(key)
        replica.dropped = True
        self._close_if_unused(replica)

    @staticmethod
    def _close_if_unused(replica: Replica) -> None:
        if replica.dropped and replica.leases == 0:
            replica.close()
