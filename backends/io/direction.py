"""Direction: the I/O engines, the bounce slab and the announced memory of all reads, or of all writes.

Reads and writes have one each, so a long write does not hold up a read. Threads: any.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np

from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.transfer import CLOSE_TIMEOUT_S, IoEngine, PageTransfer
from flexkv_sglang.backends.memory import AlignedMemory
from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.types import SECTOR

MakeEngine = Callable[[str, ReadPriority], IoEngine]
"""As ``probe.make_engine``."""

_SLAB_BYTES = 32 << 20


class Slab:
    """Memory for bounced pages, made at first use, in huge pages where the machine gives them.

    ``addresses``: uint64 ``[rows]``; ``region``: (address, bytes).
    """

    def __init__(self, row_bytes: int) -> None:
        self.lock = threading.Lock()  # held while the bounced pages of one call use it
        self.rows = max(1, _SLAB_BYTES // row_bytes)
        self._memory = AlignedMemory(self.rows * row_bytes, huge_pages=True)
        self.region = (self._memory.address, self._memory.byte_count)
        self.addresses = self._memory.rows(row_bytes, self.rows)

    def touch(self) -> None:
        """Have the kernel give the memory now, not page by page as it is used."""
        with self.lock:
            np.frombuffer(self._memory.view, np.uint8)[::SECTOR] = 0


class Direction:
    """One direction: its engines (one per kind), and one slab."""

    def __init__(self, row_bytes: int, traffic: ReadPriority, make: MakeEngine) -> None:
        self._row_bytes = row_bytes
        self._make = make
        self._traffic = traffic
        self._guard = threading.Lock()  # guards making engines and the slab, and announcing memory
        self._engines: dict[str, IoEngine] = {}
        self._abandoned: list[IoEngine] = []  # hold transfers that do not end
        self._memory: list[tuple[int, int]] = []
        self._slab: Slab | None = None
        self._closed = False

    def engine(self, kind: str) -> IoEngine:
        """The engine of this kind, made at first use. Raises ``TierUnavailableError`` after ``close``."""
        with self._guard:
            if self._closed:  # the numbers of closed files may be others' by now
                raise TierUnavailableError("transfers are closed")
            if kind in self._engines and self._engines[kind].given_up:
                self._abandoned.append(self._engines.pop(kind))
            if kind not in self._engines:
                engine = self._engines[kind] = self._make(kind, self._traffic)
                regions = self._memory if self._slab is None else [*self._memory, self._slab.region]
                for address, byte_count in regions:
                    engine.register_memory(address, byte_count)
            return self._engines[kind]

    def engines(self, kind: str, transfer: PageTransfer) -> Iterator[IoEngine]:
        """The engine of this kind for ``transfer``; the next one, if a disk hangs in it before the transfer's turn."""
        while True:
            engine = self.engine(kind)
            yield engine
            if not engine.given_up or transfer.tried or time.monotonic() >= transfer.deadline:
                return

    def prepare(self, kind: str, *, bounces: bool) -> None:
        """Make now what the first call would wait for: the engine; the slab if pages are copied (``bounces``).

        What cannot be made now is left to that call.
        """
        with suppress(OSError):
            self.engine(kind)
            if bounces:
                self.slab().touch()

    def slab(self) -> Slab:
        """The slab, made at first use."""
        with self._guard:
            if self._slab is None:
                self._slab = Slab(self._row_bytes)
                self._announce(*self._slab.region)
            return self._slab

    def register_memory(self, address: int, byte_count: int) -> None:
        """Announce memory to every engine, also to those made later; see ``IoEngine``."""
        with self._guard:
            self._memory.append((address, byte_count))
            self._announce(address, byte_count)

    def counts(self) -> Counter[str]:
        """Sum of the engines' counts."""
        with self._guard:
            return sum((engine.counts for engine in self._engines.values()), Counter[str]())

    def abandon(self, traffic: ReadPriority) -> None:
        """Leave engines and slab to calls that hang in them; the next call gets new ones."""
        with self._guard:
            for engine in self._engines.values():
                engine.given_up = True
            self._abandoned += self._engines.values()
            self._engines = {}
            self._slab = None
            self._traffic = traffic

    def close(self, seconds: float = CLOSE_TIMEOUT_S) -> bool:
        """Close every engine, within ``seconds`` in all; False if one still runs."""
        end = time.monotonic() + seconds
        with self._guard:
            self._closed = True
            engines = [*self._engines.values(), *self._abandoned]
        ended = [
            engine.close(end - time.monotonic()) for engine in engines
        ]  # each, also after a False
        return all(ended)

    def _announce(self, address: int, byte_count: int) -> None:
        for engine in self._engines.values():
            engine.register_memory(address, byte_count)
