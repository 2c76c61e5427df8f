"""LocalPages: one tier's index, slot files and lookup pins with the two locks that keep them in step.

``lock`` guards index and pins and is held for dict work only: never for I/O, never while logging.
``publishing`` puts journal appends and the index changes they announce into one order. It is taken before ``lock``,
never after it. A read takes it only to drop bad pages, and no caller waits for it without a bound.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flexkv_sglang.backends.slots.opening import Recovered
from flexkv_sglang.backends.slots.slot_file import SlotFileTier
from flexkv_sglang.cache.eviction.reuse_density import ReuseDensity
from flexkv_sglang.cache.index.index import TierIndex
from flexkv_sglang.cache.index.lookup_pins import LookupPins
from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.types import PageKey, Reserved, SlotId

LOCK_SPAN = 512  # keys looked up under one hold of the lock


class LocalPages:
    """Shared by an engine, its plans and its upkeep. All but ``tier`` is guarded by the two locks."""

    def __init__(self, tier: SlotFileTier, recovered: Recovered) -> None:
        self.tier = tier
        self.lock = threading.Lock()
        self._publish = threading.Lock()
        count = tier.slot_count
        self.index = TierIndex(count, ReuseDensity(count), tier.regions())
        self._lookup_pins = LookupPins(count)
        dropped = self.index.load(recovered.keys, recovered.slots, recovered.parents)
        keys, slots = recovered.keys[dropped].tolist(), recovered.slots[dropped].tolist()
        lost = [(PageKey(key), SlotId(slot)) for key, slot in zip(keys, slots, strict=True)]
        # Else their slots would be rewritten while their records are still valid.
        tier.publish_del(lost)
        self.recovered_count = len(recovered.keys) - len(dropped)
        self._pending_tombstones: list[
            tuple[PageKey, SlotId]
        ] = []  # tombstones not on the journal yet

    @contextmanager
    def publishing(self, deadline: float) -> Iterator[None]:
        """Hold the lock that orders appends. Raises ``TierUnavailableError`` if it is not free before ``deadline``."""
        if not self._publish.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierUnavailableError("a journal does not answer")
        try:
            yield
        finally:
            self._publish.release()

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

    def publish_del(self, victims: Sequence[tuple[PageKey, SlotId]], deadline: float) -> None:
        """Append tombstones, with those that are pending. Raises ``TierUnavailableError``: then they stay pending."""
        with self.lock:
            self._pending_tombstones += victims
            # Another thread may have taken our tombstones and not appended them yet; wait for ``publishing``.
            if not self._pending_tombstones:
                return
        with self.publishing(deadline):
            with self.lock:
                pending, self._pending_tombstones = self._pending_tombstones, []
            self.tier.publish_del(pending)

    def commit(self, slots: Sequence[SlotId], done: Sequence[bool]) -> list[bool]:
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
        """Forget every page."""
        with self.lock:
            self._end(self._lookup_pins.release_all())
            self.index.clear()

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
