"""Page sources and change logs for tests of the wire. A page is a function of its key; faults can be added."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind, page_checksum
from flexkv_sglang.backends.fleet.vocabulary import (
    MISSING,
    Change,
    PageStatus,
    ServedPage,
    Snapshot,
)
from flexkv_sglang.types import PageBuffers, PageKey


def keys_of(count: int, seed: int = 0) -> list[PageKey]:
    """``count`` page keys."""
    return [PageKey(hashlib.sha256(b"%d %d" % (seed, i)).digest()) for i in range(count)]


def page_of(key: PageKey, byte_count: int) -> bytes:
    """The bytes of a page."""
    return np.random.default_rng(int.from_bytes(key[:8], "little")).bytes(byte_count)


class PageMemory:
    """Targets of a read: ``count`` pages of ``len(lengths)`` buffers each, filled with 0xEE."""

    def __init__(self, count: int, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        self.bytes = np.full((count, sum(lengths)), 0xEE, np.uint8)
        starts = np.cumsum([0, *lengths[:-1]]).astype(np.uint64)
        rows = self.bytes.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(sum(lengths))
        self.buffers = PageBuffers(
            rows[:, None] + starts[None, :], np.array(self._lengths, np.uint64)
        )

    def page(self, index: int) -> bytes:
        """The bytes of page ``index``."""
        return self.bytes[index].tobytes()

    def untouched(self, index: int) -> bool:
        """True if page ``index`` was never written."""
        return bool((self.bytes[index] == 0xEE).all())


class MemorySource:
    """Holds ``keys``. ``before``: called with the keys of each read; ``damage``: keys whose bytes are wrong."""

    def __init__(
        self,
        keys: Sequence[PageKey],
        payload_bytes: int,
        before: Callable[[Sequence[PageKey]], None] = lambda keys: None,
        kind: ChecksumKind = ChecksumKind.XXH3_64,
    ) -> None:
        self.payload_bytes = payload_bytes
        self.kind = kind
        self.pages = {key: page_of(key, payload_bytes) for key in keys}
        self.before = before
        self.damage: set[PageKey] = set()
        self.bad: list[PageKey] = []
        self.bad_reported = threading.Event()

    def read(
        self, keys: Sequence[PageKey], addresses: Sequence[int], deadline: float
    ) -> list[ServedPage]:
        """As ``PageSource``."""
        self.before(keys)
        return [self._read(key, address) for key, address in zip(keys, addresses, strict=True)]

    def _read(self, key: PageKey, address: int) -> ServedPage:
        page = self.pages.get(key)
        if page is None:
            return MISSING
        ctypes.memmove(address, page, len(page))
        checksum = page_checksum(self.kind, key, [(address, len(page))])
        if key in self.damage:
            ctypes.memset(address + len(page) // 2, page[len(page) // 2] ^ 1, 1)
        return ServedPage(PageStatus.OK, self.kind, checksum)

    def reported_bad(self, keys: Sequence[PageKey]) -> None:
        """As ``PageSource``."""
        self.bad += keys
        self.bad_reported.set()


class ListedChanges:
    """A change log with a fixed list of changes and a fixed snapshot."""

    def __init__(self, changes: Sequence[Change], snapshot: Snapshot) -> None:
        self.changes, self.fixed = list(changes), snapshot

    def since(self, epoch: int, last: int) -> list[Change] | None:
        """As ``ChangeLog``."""
        if epoch != self.fixed.epoch:
            return None
        return [change for change in self.changes if change.first + change.numbers - 1 > last]

    def snapshot(self) -> Snapshot:
        """As ``ChangeLog``."""
        return self.fixed
