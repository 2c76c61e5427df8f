"""MemoryTier: pages in a dictionary. The smallest tier that keeps the whole contract of ``flexkv_sglang.tier``."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

from flexkv_sglang.tier import Tier
from flexkv_sglang.types import PageBuffers, PageKey, SlotId


class MemoryTier(Tier):
    """Keeps the ``room`` pages that were used last. Threads: any; bytes are copied under the lock."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()  # guards the rest
        self._pages: OrderedDict[PageKey, tuple[SlotId, bytes, int]] = OrderedDict()
        self._numbers = itertools.count()
        self._pins: Counter[SlotId] = Counter()
        self._closed = False

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        with self._lock:
            return [key in self._pages for key in keys]

    def get(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> list[bool]:
        done = 0
        with self._lock:
            for key, row in zip(keys, targets.addresses.tolist(), strict=True):
                _, page, checksum = self._pages.get(key, (0, b"", 0))
                if not page or time.monotonic() >= deadline:
                    break
                if zlib.crc32(page) != checksum:  # verified before a byte reaches the target
                    del self._pages[key]
                    break
                start = 0
                for address, length in zip(row, targets.lengths.tolist(), strict=True):
                    ctypes.memmove(address, page[start : start + length], length)
                    start += length
                done += 1
            for key in reversed(keys[:done]):  # the tail is evicted before its head
                self._pages.move_to_end(key)
        return [True] * done + [False] * (len(keys) - done)

    def put(
        self,
        keys: Sequence[PageKey],
        sources: PageBuffers,
        parent: PageKey | None,
        deadline: float,
        *,
        own: bool = False,
    ) -> list[bool]:
        with self._lock:
            for key, row in zip(keys, sources.addresses.tolist(), strict=True):
                late = self._closed or time.monotonic() >= deadline
                if key in self._pages or late or not self._make_room(keys):
                    continue
                parts = zip(row, sources.lengths.tolist(), strict=True)
                page = b"".join(ctypes.string_at(*part) for part in parts)
                self._pages[key] = SlotId(next(self._numbers)), page, zlib.crc32(page)
            return [key in self._pages for key in keys]

    def page_count(self) -> int:
        with self._lock:
            return len(self._pages)

    @property
    def slot_count(self) -> int:
        return self._room

    def pin(self, keys: Sequence[PageKey]) -> list[SlotId | None]:
        with self._lock:
            slots = [self._pages[key][0] if key in self._pages else None for key in keys]
            self._pins.update(slot for slot in slots if slot is not None)
        return slots

    def unpin(self, slots: Sequence[SlotId]) -> None:
        with self._lock:
            self._pins -= Counter(slots)

    def is_valid(self, pages: Sequence[tuple[PageKey, SlotId]]) -> list[bool]:
        with self._lock:
            return [key in self._pages and self._pages[key][0] == slot for key, slot in pages]

    def clear(self) -> None:
        with self._lock:
            self._pages.clear()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._pages.clear()

    def _make_room(self, keys: Sequence[PageKey]) -> bool:
        """Evict the page that was used least recently, but none of this call and none that is pinned."""
        if len(self._pages) < self._room:
            return True
        for key, (slot, _, _) in self._pages.items():
            if slot not in self._pins and key not in keys:
                del self._pages[key]
                return True
        return False
