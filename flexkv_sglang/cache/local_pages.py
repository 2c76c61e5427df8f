"""LocalPages: one tier's index, slot files and lookup pins, kept in step with the journals.

``lock`` guards index, pins and debts and is held for dict work only: never for I/O, never while logging.
Each directory's journal has one thread (``Directory.journal``), which puts appends and the index changes that they
announce into one order. Callers wait for it until their deadline. What a journal does not say yet is a *debt* of its
directory: a CLEAR, and tombstones. A debt is paid before any later record, and before one of the slots is rewritten.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.opening import Recovered
from flexkv_sglang.backends.slots.slot_file import SlotFileTier
from flexkv_sglang.cache.disks.directories import Directory
from flexkv_sglang.cache.eviction.reuse_density import ReuseDensity
from flexkv_sglang.cache.index.index import TierIndex
from flexkv_sglang.cache.index.lookup_pins import LookupPins
from flexkv_sglang.errors import JournalError, TierUnavailableError
from flexkv_sglang.threads import succeeded, wait_for
from flexkv_sglang.types import PageKey, Reserved, SlotId

LOCK_SPAN = 512  # keys looked up under one hold of the lock

_APPEND_S = 2.0  # limit of appends that nobody waits for


@dataclass(slots=True)
class _Debt:
    """What one directory's journals do not say yet: how many clears, and tombstones that came after them."""

    clears: int = 0
    tombstones: list[tuple[PageKey, SlotId]] = field(default_factory=list)


class LocalPages:
    """Shared by an engine, its plans and its upkeep. All but ``tier`` is guarded by ``lock``.

    ``directories``: those of the tier's stores.
    """

    def __init__(
        self, tier: SlotFileTier, recovered: Recovered, directories: Sequence[Directory]
    ) -> None:
        self.tier = tier
        self.lock = threading.Lock()
        self._directories = [directory for directory in directories if directory.stores]
        self._debts = {directory: _Debt() for directory in self._directories}
        self._of_region = {r: d for d in self._directories for r in d.stores}
        count = tier.slot_count
        self.index = TierIndex(count, ReuseDensity(count), tier.regions())
        self._lookup_pins = LookupPins(count)
        dropped = self.index.load(recovered.keys, recovered.slots, recovered.parents)
        keys, slots = recovered.keys[dropped].tolist(), recovered.slots[dropped].tolist()
        lost = [(PageKey(key), SlotId(slot)) for key, slot in zip(keys, slots, strict=True)]
        # Else their slots would be rewritten while their records are still valid.
        tier.publish_del(lost)
        self.recovered_count = len(recovered.keys) - len(dropped)

    def prefix(self, keys: Sequence[PageKey], *, promise: bool) -> int:
        """Length of the leading run of READY keys, at most one hold of the lock long."""
        with self.lock:
            run = self.index.run(keys)
            if promise and run:
                now = time.monotonic()
                self._end(self._lookup_pins.expire(now))
                self.index.pin(self._lookup_pins.add(run, self.index.parents, now))
        return len(run)

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: is it READY? At most one hold of the lock long."""
        with self.lock:
            return self.index.found(keys)

    def pin(self, keys: Sequence[PageKey]) -> list[SlotId]:
        """Pin and touch the leading run of READY keys; their lookup pins end."""
        with self.lock:
            slots = self.index.pin_run(keys)
            self._end(self._lookup_pins.release(slots))
        return slots

    def pin_each(self, keys: Sequence[PageKey]) -> list[SlotId | None]:
        """Pin the READY pages among ``keys``, which is no use of them. Per key its slot; ``unpin`` each once."""
        slots: list[SlotId | None] = []
        for start in range(0, len(keys), LOCK_SPAN):
            with self.lock:
                found = [self.index.find(key) for key in keys[start : start + LOCK_SPAN]]
                self.index.pin([slot for slot in found if slot is not None])
            slots += found
        return slots

    def is_valid(self, pages: Sequence[tuple[PageKey, SlotId]]) -> list[bool]:
        """Per pinned page: is it still READY in its slot? A pin keeps a slot, not a page that turned out to be bad."""
        flags: list[bool] = []
        for start in range(0, len(pages), LOCK_SPAN):
            with self.lock:
                find = self.index.find
                flags += [find(key) == slot for key, slot in pages[start : start + LOCK_SPAN]]
        return flags

    def unpin(self, slots: Sequence[SlotId]) -> None:
        """Undo ``pin`` or ``pin_each``."""
        with self.lock:
            self.index.unpin(slots)

    def reserve(
        self, keys: Sequence[PageKey], parent: PageKey | None, held: frozenset[int]
    ) -> Reserved:
        """Slots for what is absent; see ``TierIndex.reserve``. Lookup pins give way when no other page can."""
        with self.lock:
            self._end(self._lookup_pins.expire(time.monotonic()))
            first = self.index.reserve(keys, parent, held)
            if not first.refused or not len(self._lookup_pins):
                return first
            self._end(self._lookup_pins.release_all())
            second = self.index.reserve(keys, parent, held)
        return Reserved(
            sorted(first.granted + second.granted),
            first.victims + second.victims,
            second.refused,
            second.declined,
        )

    def bury(
        self,
        victims: Sequence[tuple[PageKey, SlotId]],
        slots: Sequence[SlotId],
        deadline: float,
    ) -> tuple[list[bool], frozenset[int]]:
        """Have the tombstones of ``victims`` appended. Per slot of ``slots``: may it be rewritten now?

        Also the positions of slots that are left: an append that hangs may name them. They are freed when it ends.
        """
        places = self._places(slots)
        with self.lock:
            self._owe(victims)
            asked = [d for d in dict.fromkeys(places) if self._in_debt(d)]
        if not asked:
            return [True] * len(slots), frozenset()
        limit = max(0.0, deadline - time.monotonic())
        jobs = {d: d.journal.post(partial(self._pay, d), limit) for d in asked}
        wait_for(list(jobs.values()), deadline)
        left = frozenset(i for i, d in enumerate(places) if d in jobs and not jobs[d].done())
        for directory, job in jobs.items():
            self.abort_after(job, [slots[i] for i in left if places[i] is directory])
        return [d not in jobs or succeeded(jobs[d]) for d in places], left

    def record(
        self,
        keys: Sequence[PageKey],
        slots: Sequence[SlotId],
        sums: Sequence[int],
        moved: Sequence[bool],
        kind: ChecksumKind,
        deadline: float,
        left: frozenset[int] = frozenset(),
    ) -> list[bool]:
        """Commit records of the pages that ``moved``, then the index; other slots are freed, but for those ``left``.

        Per slot: is it READY? Waits until ``deadline``. A slot whose record is under way then is left to the
        journal's thread.
        """
        results = [False] * len(slots)
        self.abort([s for i, s in enumerate(slots) if not moved[i] and i not in left])
        rows_of: dict[Directory, list[int]] = {}
        for row, directory in enumerate(self._places(slots)):
            if moved[row]:
                rows_of.setdefault(directory, []).append(row)
        limit = max(0.0, deadline - time.monotonic())
        jobs = {}
        for directory, rows in rows_of.items():
            entries = [(keys[row], slots[row], sums[row]) for row in rows]
            work = partial(self._record, directory, entries, kind)
            jobs[directory] = directory.journal.post(work, limit)
        wait_for(list(jobs.values()), deadline)
        for directory, job in jobs.items():
            if job.cancelled():
                self.abort([slots[row] for row in rows_of[directory]])
            elif succeeded(job):
                for row, flag in zip(rows_of[directory], job.result(), strict=True):
                    results[row] = flag
        return results

    def _record(
        self,
        directory: Directory,
        entries: list[tuple[PageKey, SlotId, int]],
        kind: ChecksumKind,
    ) -> list[bool]:
        """On the journal's thread: what is owed, the records, the index. No CLEAR comes between the last two."""
        slots = [slot for _, slot, _ in entries]
        recorded = [False] * len(slots)
        try:
            self._pay(directory)
            with self.lock:
                alive = self.index.still_writing(slots)
                parents = [self.index.parent_slot(slot) for slot in slots]
            good = [i for i, flag in enumerate(alive) if flag]
            flags = self.tier.publish_put([(*entries[i], parents[i]) for i in good], kind)
            for i, flag in zip(good, flags, strict=True):
                recorded[i] = flag
        finally:
            ready = self._commit(slots, recorded)
        return ready

    def _pay(self, directory: Directory) -> None:
        """On the journal's thread: append what the directory's journals do not say yet."""
        debt = self._debts[directory]
        with self.lock:
            clears, tombstones = debt.clears, debt.tombstones
            due = list(tombstones)
        if clears:
            self.tier.publish_clear(list(directory.stores.values()))
        if due:
            self.tier.publish_del(due)
        with self.lock:
            debt.clears -= clears
            del tombstones[: len(due)]  # ``clear`` has put another list in its place

    def _in_debt(self, directory: Directory) -> bool:
        debt = self._debts[directory]
        return bool(debt.clears or debt.tombstones)

    def _owe(self, victims: Sequence[tuple[PageKey, SlotId]]) -> None:
        for victim, directory in zip(
            victims, self._places([slot for _, slot in victims]), strict=True
        ):
            self._debts[directory].tombstones.append(victim)

    def _places(self, slots: Sequence[SlotId]) -> list[Directory]:
        if len(self._directories) == 1:
            return self._directories * len(slots)
        regions, _ = self.tier.locate(slots)
        return [self._of_region[region] for region in regions.tolist()]

    def drop(self, pages: Sequence[tuple[PageKey, SlotId]]) -> None:
        """Forget own pages with bad bytes. Their tombstones follow; no slot is rewritten before."""
        with self.lock:
            gone = [(key, slot) for key, slot in pages if self.index.discard(key, slot)]
            self._owe(gone)
        for directory in dict.fromkeys(self._places([slot for _, slot in gone])):
            directory.journal.post(partial(self._pay, directory), _APPEND_S)

    def abort(self, slots: Sequence[SlotId]) -> None:
        """WRITING slots that get no record are free again."""
        if slots:
            with self.lock:
                self.index.abort(slots)

    def abort_after(self, ends: Future[Any], slots: Sequence[SlotId]) -> None:
        """Free slots that something still writes to, or names, when it has ended."""
        if slots:
            ends.add_done_callback(lambda _: self.abort(slots))

    def _commit(self, slots: Sequence[SlotId], done: Sequence[bool]) -> list[bool]:
        """Make the ``done`` and still wanted slots READY, free the others. Per slot: is it READY?"""
        with self.lock:
            alive = self.index.still_writing(slots)
            ready = [a and b for a, b in zip(alive, done, strict=True)]
            good = [slot for slot, flag in zip(slots, ready, strict=True) if flag]
            self.index.commit(good[::-1])  # tail first, as a chain is used
            self.index.abort([slot for slot, flag in zip(slots, ready, strict=True) if not flag])
            self._end(self._lookup_pins.release(good))
        return ready

    def clear(self) -> None:
        """Forget every page, at once. The journals say so before they say anything else."""
        with self.lock:
            self._end(self._lookup_pins.release_all())
            self.index.clear()
            for debt in self._debts.values():
                debt.clears, debt.tombstones = debt.clears + 1, []
        for directory in self._directories:
            directory.journal.post(partial(self._pay, directory), _APPEND_S)

    def close(self, held: Collection[Breaker], deadline: float) -> str:
        """Flush, mark the journals clean and release the owners' locks, in all directories at once, until ``deadline``.

        ``held``: health of the directories where transfers are in flight; these, and those that hang, keep their locks,
        or late writes would land in an adopter's slots. Idempotent. Returns what went wrong.
        """
        jobs, limit = {}, max(0.0, deadline - time.monotonic())
        locked = [directory for directory in self._directories if directory.locked]
        for directory in locked:
            hung = directory.journal.refused and not directory.idle
            if not hung and directory.breaker not in held:
                directory.journal.accept()
                work = partial(self._close, directory)
                jobs[directory] = directory.journal.post(work, limit)  # behind the records
        wait_for(list(jobs.values()), deadline)
        problems = []
        for directory in locked:
            job = jobs.get(directory)
            if job is None or not job.done() or job.cancelled():
                problems.append(f"{directory.path} does not answer; its files stay locked")
            elif job.exception() is not None:
                problems.append(f"{directory.path}: {job.exception()}")
        return "; ".join(problems)

    def _close(self, directory: Directory) -> None:
        self._pay(directory)
        first: OSError | JournalError | None = None
        for store in directory.stores.values():
            try:
                store.close()
            except (OSError, JournalError) as exc:
                first = first or exc
        if first is not None:
            raise TierUnavailableError(f"closing the tier: {first}") from first

    def suspend(self, region: int, *, readable: bool = False) -> int:
        """See ``TierIndex.suspend``."""
        with self.lock:
            return self.index.suspend(region, readable=readable)

    def give_up(self, region: int) -> bool:
        """Forget every page of a suspended region, whose file is gone. False: some are in use; try again."""
        self.release_lookup_pins()
        low, high = self.tier.base(region), self.tier.base(region + 1)
        for start in range(low, high, LOCK_SPAN):
            with self.lock:
                if not self.index.give_up(range(start, min(start + LOCK_SPAN, high))):
                    return False
        return True

    def release_lookup_pins(self) -> None:
        """End all lookup pins."""
        with self.lock:
            self._end(self._lookup_pins.release_all())

    def _end(self, slots: Sequence[SlotId]) -> None:
        if slots:
            self.index.unpin(slots)
