"""Slot files, and all of one process as one range of slots (``SlotFileTier``; the ``Tier`` is ``CacheEngine``).

A slot file is preallocated once and never grows: its size is the byte quota. Slot ``i`` starts at
``i * slot_bytes``. The tier joins the slot files of all owners this process holds (one per directory,
plus adopted ones) into one range of slot numbers. It knows bytes and journals, not eviction; its own
columns are the checksum and the kind of checksum per slot.

Threads: ``extents`` and ``checksums`` may be called by any thread at any time for pinned or
reserved slots. The ``publish_*`` methods append to journals; the engine serialises them.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import KIND_OF, ChecksumKind
from flexkv_sglang.backends.failpoints import Failpoint, reach
from flexkv_sglang.backends.io.transfer import Extents, IoMode
from flexkv_sglang.backends.safe_files import open_own, remove_temporaries
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.journal import (
    JournalWriter,
    LiveState,
    boot_id,
    generations,
    journal_path,
    keys_field,
    new_records,
    recover,
    slots_path,
    snapshot_path,
)
from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.backends.slots.records import NO_PARENT, RecordOp, Records, SlotClass
from flexkv_sglang.backends.slots.space.allocation import preallocate
from flexkv_sglang.errors import JournalError, TierUnavailableError
from flexkv_sglang.types import I64, KeyArray, PageKey, SlotId

logger = logging.getLogger(__name__)


class SlotFile:
    """One open slot file. ``close`` is idempotent."""

    def __init__(self, path: Path, slot_class: SlotClass, mode: IoMode, *, writable: bool) -> None:
        self.path = path
        self.slot_class = slot_class
        self.mode = mode
        self.fd = open_own(path, mode.open_flags | (os.O_RDWR if writable else os.O_RDONLY))
        size = os.fstat(self.fd).st_size
        if size < slot_class.slot_bytes * slot_class.slot_count:
            os.close(self.fd)
            raise TierUnavailableError(f"{path} has {size} bytes, too few for {slot_class}")

    @classmethod
    def create(cls, path: Path, slot_class: SlotClass, mode: IoMode) -> SlotFile:
        """Preallocate and open. Raises ``OSError`` (ENOSPC when the disk cannot hold it)."""
        fd = open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            preallocate(fd, path, slot_class.slot_bytes * slot_class.slot_count)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        return cls(path, slot_class, mode, writable=True)

    def sync(self) -> None:
        """Flush to the medium."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class OwnedStore:
    """One owner's slot file and journal in one directory; this process holds the owner's lock."""

    def __init__(self, lock: OwnerLock, slots: SlotFile, journal: JournalWriter) -> None:
        self.lock = lock
        self.slots = slots
        self.journal = journal
        count = slots.slot_class.slot_count
        self.sums = array("Q", [0]) * count
        self.kinds = bytearray(count)
        self.breaker = (
            Breaker()
        )  # shared by all stores of a directory; open: nothing is written here
        self.durable = False  # flush data before its records, and records before their slots change

    @classmethod
    def create(
        cls, directory: Path, namespace: str, slot_class: SlotClass, mode: IoMode
    ) -> OwnedStore:
        """A new owner. Leaves nothing behind when it fails."""
        lock = OwnerLock.create(directory)
        reach(Failpoint.CREATE_LOCKED)
        try:
            slots = SlotFile.create(
                slots_path(directory, lock.owner, slot_class.slot_bytes), slot_class, mode
            )
            reach(Failpoint.CREATE_SLOTS)
            journal = JournalWriter.create(directory, namespace, lock.owner, (slot_class,))
            reach(Failpoint.CREATE_JOURNAL)
        except BaseException:
            lock.remove_files()
            lock.close()
            raise
        return cls(lock, slots, journal)

    @classmethod
    def adopt(
        cls,
        lock: OwnerLock,
        namespace: str,
        payload_bytes: int,
        mode: IoMode,
        *,
        slots_max: int,
        accepted: frozenset[ChecksumKind],
    ) -> tuple[OwnedStore, Records]:
        """Take over a dead owner whose lock we hold. Returns the store and its live PUT records.

        A new generation is started before anything is written, so that a process that still tails the old
        journal notices. More than ``slots_max`` slots: the file is cut and the pages beyond are lost.
        Pages whose kind of checksum is not ``accepted`` are forgotten; so is everything if the machine
        went down without a clean close, unless only fully verified pages are accepted. Raises
        ``JournalError``, ``TierUnavailableError`` or ``OSError`` when the files are not usable.
        """
        directory = lock.directory
        reach(Failpoint.ADOPT_LOCKED)
        remove_temporaries(directory, lock.owner + ".")
        state = recover(directory, lock.owner, namespace)
        reach(Failpoint.ADOPT_RECOVERED)
        if len(state.header.files) != 1 or state.header.files[0].payload_bytes != payload_bytes:
            raise JournalError(f"owner {lock.owner} holds other pages: {state.header.files}")
        found = state.header.files[0]
        path = slots_path(directory, lock.owner, found.slot_bytes)
        whole = path.stat().st_size // found.slot_bytes  # fewer after ``cut``
        found = replace(found, slot_count=max(1, min(found.slot_count, whole)))
        wanted = replace(found, slot_count=min(found.slot_count, slots_max))
        slots = SlotFile(path, found, mode, writable=True)
        try:
            trusted = accepted == {ChecksumKind.XXH3_64} or _survived(state)
            live = state.records if trusted else state.records[:0]
            kinds = (live["flags"] & 0xFF).astype(np.uint8)
            kept = (live["slot"] < wanted.slot_count) & np.isin(kinds, list(accepted))
            live = live if kept.all() else live[kept]
            journal = _start_generation(lock, state, live, wanted)
            reach(Failpoint.ADOPT_ROTATED)
            size = wanted.slot_bytes * wanted.slot_count
            if os.fstat(slots.fd).st_size > size:  # or an adoption before this one died here
                os.ftruncate(slots.fd, size)
                reach(Failpoint.ADOPT_CUT)
        except BaseException:
            slots.close()
            raise
        slots.slot_class = wanted
        store = cls(lock, slots, journal)
        np.frombuffer(store.sums, np.uint64)[live["slot"]] = live["sum"]
        np.frombuffer(store.kinds, np.uint8)[live["slot"]] = live["flags"] & 0xFF
        return store, live

    @property
    def failed(self) -> bool:
        """True while nothing may be written to its directory."""
        return self.breaker.is_open

    def append(self, records: Records) -> bool:
        """Append to the journal. A journal that does not take them opens the directory's breaker."""
        try:
            if self.durable and records["op"][0] == RecordOp.PUT:
                self.slots.sync()
            self.journal.append(records)
            if self.durable:
                self.journal.sync()
        except (JournalError, OSError) as exc:
            # While the journal takes no records, no slot may be rewritten: neighbours would trust the old records.
            if self.breaker.trip(f"journal: {exc}", readable=True):
                logger.error("flexkv: %s takes no more pages: %s", self.slots.path, exc)
            return False
        return True

    def revive(self, live: Records) -> None:
        """The directory answers again: a new generation with ``live``. Raises ``OSError``, ``JournalError``.

        Not sealed: a neighbour missed the changes that could not be recorded, and loads the new snapshot.
        """
        self.journal.repair()
        self.journal.rotate(live, (self.slots.slot_class,), sealed=False)

    def shrink(self, slot_count: int, live: Records) -> None:
        """Give the slots from ``slot_count`` on back to the disk; ``live`` is what the others hold.

        Raises ``OSError``, ``JournalError``.
        """
        smaller = replace(self.slots.slot_class, slot_count=slot_count)
        self.journal.rotate(live, (smaller,))
        self.slots.slot_class = smaller
        os.ftruncate(self.slots.fd, smaller.slot_bytes * slot_count)

    def cut(self, slot_count: int) -> None:
        """As ``shrink`` while the journal takes nothing: the file first, for the journal may need that space.

        ``revive`` tells the journal. An adopter before that finds a shorter file than the journal says, and neighbours
        read less than a page. Raises ``OSError``.
        """
        smaller = replace(self.slots.slot_class, slot_count=slot_count)
        os.ftruncate(self.slots.fd, smaller.slot_bytes * slot_count)
        self.slots.slot_class = smaller

    def close(self) -> None:
        """Flush, append the clean mark, release the lock. Idempotent."""
        clean = not self.failed and self.slots.fd >= 0
        try:
            if clean:  # without its lock file nobody would find these pages again
                self.lock.file.put_back()
            if clean:
                self.slots.sync()
                reach(Failpoint.CLOSE_SYNCED)
            self.journal.close(clean=clean)
        finally:
            self.slots.close()
            self.lock.close()


def _start_generation(
    lock: OwnerLock, state: LiveState, live: Records, slot_class: SlotClass
) -> JournalWriter:
    """Journal of an adopted owner, on a new generation whose snapshot is ``live``."""
    directory = lock.directory
    for generation in generations(directory, lock.owner):
        if generation != state.header.generation:  # a neighbour that tails these sees them vanish
            snapshot_path(directory, lock.owner, generation).unlink(missing_ok=True)
            reach(Failpoint.ADOPT_UNLINK)
            journal_path(directory, lock.owner, generation).unlink(missing_ok=True)
    journal = JournalWriter(directory, state.header, position=state.end, seq=state.seq)
    # Never sealed. The dead owner may have died with a victim out of its last snapshot and the tombstone
    # not yet appended: a neighbour still believes in that page, and its slot is free to us.
    journal.rotate(live, (slot_class,), sealed=False)
    return journal


def _survived(state: LiveState) -> bool:
    """Page-cache writes of this boot are safe from a process crash; of an earlier boot only after CLOSE."""
    return state.clean or (bool(boot_id()) and state.header.boot_id == boot_id())


class SlotFileTier:
    """All slots this process owns, numbered from 0: store after store, slot after slot."""

    def __init__(self, stores: Sequence[OwnedStore]) -> None:
        self.stores = list(stores)
        counts = [store.slots.slot_class.slot_count for store in self.stores]
        self._bases = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.slot_count = int(self._bases[-1])

    def regions(self) -> list[int]:
        """Slots per store, as they were at the start."""
        return [self.base(i + 1) - self.base(i) for i in range(len(self.stores))]

    def base(self, store_index: int) -> int:
        """First slot number of a store."""
        return int(self._bases[store_index])

    def locate(self, slots: Sequence[int]) -> tuple[I64, I64]:
        """(store index ``[n]``, slot within the store ``[n]``)."""
        array_of = np.asarray(slots, np.int64)
        store = np.searchsorted(self._bases, array_of, side="right") - 1
        return store, array_of - self._bases[store]

    def extents(self, slots: Sequence[int]) -> Extents:
        """Files, offsets and modes of these slots, as ``PageTransfer`` takes them."""
        store, local = self.locate(slots)
        fds = np.array([s.slots.fd for s in self.stores], np.int32)
        sizes = np.array([s.slots.slot_class.slot_bytes for s in self.stores], np.uint64)
        modes = [s.slots.mode for s in self.stores]
        offsets = local.astype(np.uint64) * sizes[store]
        return fds[store], offsets, tuple(modes[i] for i in store.tolist())

    def checksums(self, slots: Sequence[int]) -> tuple[list[ChecksumKind], list[int]]:
        """What the journal says of these slots' payloads: kinds and sums."""
        store_of, local = self.locate(slots)
        kinds, sums = np.zeros(len(local), np.uint8), np.zeros(len(local), np.uint64)
        for index, store in enumerate(self.stores):
            rows = slice(None) if len(self.stores) == 1 else np.flatnonzero(store_of == index)
            kinds[rows] = np.frombuffer(store.kinds, np.uint8)[local[rows]]
            sums[rows] = np.frombuffer(store.sums, np.uint64)[local[rows]]
        return [KIND_OF[kind] for kind in kinds.tolist()], sums.tolist()

    def breakers(self, slots: Sequence[int]) -> list[Breaker]:
        """Health of the directory of each slot."""
        store, _ = self.locate(slots)
        return [self.stores[s].breaker for s in store.tolist()]

    def writable(self, slots: Sequence[int]) -> list[bool]:
        """Per slot: False if its store's journal has failed."""
        store, _ = self.locate(slots)
        return [not self.stores[s].failed for s in store.tolist()]

    def publish_put(
        self, entries: Sequence[tuple[PageKey, SlotId, int, int]], kind: ChecksumKind
    ) -> list[bool]:
        """Append commit records for (key, slot, checksum, parent slot or -1): one write per journal.

        The pages' bytes are complete on the medium. Returns per entry whether its record was appended.
        """
        reach(Failpoint.PUT_MOVED)
        done = [False] * len(entries)
        store_of, local = self.locate([slot for _, slot, _, _ in entries])
        parent_store, parent_local = self.locate([max(parent, 0) for _, _, _, parent in entries])
        for index, store in enumerate(self.stores):
            rows = np.flatnonzero(store_of == index).tolist()
            if not rows or store.failed:
                continue
            records = new_records(RecordOp.PUT, len(rows))
            records["flags"] = int(kind)
            records["len"] = store.slots.slot_class.payload_bytes
            records["slot"] = local[rows]
            records["key"] = keys_field([entries[row][0] for row in rows])
            records["sum"] = np.array([entries[row][2] for row in rows], np.uint64)
            linked = np.array([entries[row][3] >= 0 for row in rows]) & (
                parent_store[rows] == index
            )
            records["parent"] = np.where(linked, parent_local[rows], NO_PARENT)
            if store.append(records):
                for row in rows:
                    done[row] = True
                    store.sums[int(local[row])] = entries[row][2]
                    store.kinds[int(local[row])] = int(kind)
        reach(Failpoint.PUT_RECORDED)
        return done

    def publish_del(
        self, victims: Sequence[tuple[PageKey, SlotId]], *, revived: bool = False
    ) -> bool:
        """Append tombstones. A store whose journal fails takes no more writes. True: they are on the journals.

        ``revived``: also in stores that are not in use again yet; the others have nothing to say there.
        """
        reach(Failpoint.EVICT_BEFORE)
        whole = True
        store_of, local = self.locate([slot for _, slot in victims])
        for index, store in enumerate(self.stores):
            rows = np.flatnonzero(store_of == index).tolist()
            if rows and (revived or not store.failed):
                records = new_records(RecordOp.DEL, len(rows))
                records["slot"] = local[rows]
                records["key"] = keys_field([victims[row][0] for row in rows])
                whole &= store.append(records)
        reach(Failpoint.EVICT_RECORDED)
        return whole

    def publish_clear(self, stores: Sequence[OwnedStore]) -> None:
        """Append CLEAR to the journals of these stores."""
        reach(Failpoint.CLEAR_BEFORE)
        for store in stores:
            if not store.failed:
                store.append(new_records(RecordOp.CLEAR, 1))
        reach(Failpoint.CLEAR_RECORDED)

    def snapshot_records(
        self, keys: KeyArray, slots: I64, parents: I64, store_index: int
    ) -> Records:
        """PUT records of one store for pages in ``slots`` (int64 ``[n]``, parents or -1), in that order."""
        store = self.stores[store_index]
        low, high = self.base(store_index), self.base(store_index + 1)
        mine = np.flatnonzero((slots >= low) & (slots < high))
        local, linked = slots[mine] - low, parents[mine]
        records = new_records(RecordOp.PUT, len(mine))
        records["slot"] = local
        records["len"] = store.slots.slot_class.payload_bytes
        records["key"] = keys[mine]
        records["flags"] = np.frombuffer(store.kinds, np.uint8)[local]
        records["sum"] = np.frombuffer(store.sums, np.uint64)[local]
        inside = (linked >= low) & (linked < high)
        records["parent"] = np.where(inside, linked - low, NO_PARENT)
        return records
