"""One process of the stress run: puts, gets, evicts, rotates, clears, closes and adopts until it is killed.

Pages are a function of their key, so every byte of every page delivered can be judged by any process.
What is judged here goes to the process's row of the shared counters, which survive its death.

Ownership is judged by the kernel, with a lock of another kind: while an engine is open, this process
holds one POSIX record lock per owner, in a file of its own. A dying process gives up record locks before
``flock``s, and we give them up before the engine closes; so where a record lock is refused, two live
processes own one set of files.
"""

from __future__ import annotations

import fcntl
import os
import random
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends import failpoints
from flexkv_sglang.backends.failpoints import Failpoint
from flexkv_sglang.backends.slots.journal import JournalWriter
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.cache.engine import CacheEngine
from stores.crash_child import CHAIN, NAMESPACE, Setting, open_here, rotate_often
from stores.engines import Bytes, keys, page_memory, soon
from stores.killer import KillAt

READERS = 2
COUNTERS = (
    "lives",
    "adoptions",  # owners taken over from a dead process
    "adopted_pages",
    "closes",
    "clears",
    "puts",
    "written",
    "evicted",
    "rotations",
    "gets",
    "read",  # pages delivered, by the engine's count
    "read_neighbour",  # pages read at neighbours that passed the second look
    "verified",  # pages delivered whose bytes were all compared
    "rejected",  # pages read at a neighbour that the second look refused
    "present",  # pages given to put that were stored already, here or at a neighbour
    "doubled",  # pages written while a neighbour wrote them too: a race, allowed
    # findings: must be 0
    "wrong",  # other bytes than were put
    "refused",  # bytes that fit no commit record although the second look confirmed them
    "shared_owners",  # two processes own one set of files
    "rewritten",  # pages written although a neighbour's claim stood before and after
    "troubles",  # I/O errors, refused writes, a tripped breaker, an exception in a thread of ours
)
FINDINGS = COUNTERS[-5:]
Row = npt.NDArray[np.int64]

_FROM_METRICS = {
    "read_pages": "read",
    "write_pages": "written",
    "evicted_pages": "evicted",
    "journal_rotations": "rotations",
    "neighbour_lost_pages": "rejected",
    "write_present_pages": "present",
    "corrupt_pages": "refused",
    "neighbour_read_pages": "read_neighbour",
    "read_failed_pages": "troubles",
    "write_failed_pages": "troubles",
    "upkeep_exceptions": "troubles",
    "journal_rotation_errors": "troubles",
    "breaker_opened": "troubles",
    "write_errors": "troubles",
    "read_errors": "troubles",
    "commit_errors": "troubles",
    "clear_errors": "troubles",
}


@dataclass(frozen=True)
class StressOrder:
    """The work of one life. ``puts``: before it closes and opens again; most lives are killed earlier."""

    seed: int
    slots: int
    puts: int
    point: Failpoint | None = None
    passes: int = 1
    cut: float | None = None


class Claims:
    """Record locks on the owners a process holds. One descriptor per process: closing any drops them all."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, owner: str) -> bool:
        """False: another live process holds this owner."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(owner, 16))
        except OSError:
            return False
        return True

    def give_back(self) -> None:
        """Release all of them."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN)


class Member:
    """One process between fork and death. ``row``: its counters, in shared memory."""

    def __init__(self, setting: Setting, order: StressOrder, content: Bytes, row: Row) -> None:
        self._setting = setting
        self._order = order
        self._content = content
        self._row = row
        self._row_lock = threading.Lock()
        self._keys = keys(setting.key_count)
        self._claims = Claims(setting.directory / "claims")
        self._seen: dict[str, int] = {}  # metrics of the open engine that are in the row already
        self._over = threading.Event()

    def run(self) -> None:
        """Open, work and close in a loop. Only SIGKILL ends it."""
        JournalWriter.should_rotate = rotate_often  # type: ignore[method-assign]
        order = self._order
        if order.point is not None:
            failpoints.set_hook(KillAt(order.point, order.passes, order.cut))
        rng = random.Random(order.seed)
        while True:
            engine = self._open()
            self._over.clear()
            threads = [
                threading.Thread(target=self._guarded, args=(engine, rng.randrange(1 << 30)))
                for _ in range(READERS)
            ]
            for thread in threads:
                thread.start()
            for _ in range(order.puts):
                self._write_step(engine, rng)
            self._over.set()
            for thread in threads:
                thread.join()
            self._claims.give_back()
            engine.close()
            self._count(closes=1)

    def _open(self) -> CacheEngine:
        before = set(owners(self._setting.directory / NAMESPACE))
        engine = open_here(self._setting, self._order.slots)
        self._seen = {}
        mine = [store.lock.owner for store in engine._tier.stores]
        shared = sum(not self._claims.take(owner) for owner in mine)
        self._count(
            lives=1,
            adoptions=len(before.intersection(mine)),
            adopted_pages=engine.page_count(),
            shared_owners=shared,
        )
        engine.check()
        return engine

    def _guarded(self, engine: CacheEngine, seed: int) -> None:
        try:
            rng = random.Random(seed)
            while not self._over.is_set():
                self._get(engine, rng.randrange(self._setting.chains) * CHAIN, CHAIN)
        except BaseException:  # noqa: BLE001 - the end of the process
            traceback.print_exc()
            os._exit(3)

    def _write_step(self, engine: CacheEngine, rng: random.Random) -> None:
        """Put a run. Only the main thread puts, so every change of the own index is its own."""
        if rng.random() < 0.004:
            engine.clear()
            self._count(clears=1)
            return
        first = rng.randrange(self._setting.chains) * CHAIN
        start = rng.choice((0, 0, 0, rng.randrange(CHAIN)))
        self._put(engine, first + start, rng.randint(1, CHAIN - start))
        if rng.random() < 0.3:
            self._get(engine, first, CHAIN)

    def _put(self, engine: CacheEngine, first: int, count: int) -> None:
        names = self._keys[first : first + count]
        memory, buffers = page_memory(count, self._setting.payload)
        memory[:] = self._content[first : first + count]
        parent = self._keys[first - 1] if first % CHAIN else None
        here = self._own(engine, first, count)
        claims = engine._neighbours.find(names)  # the leading run that neighbours hold
        try:
            engine.put(names, buffers, parent, soon())
            stood = engine._neighbours.still_valid(claims)
        finally:
            engine._neighbours.release(claims)
        new = [b and not a for a, b in zip(here, self._own(engine, first, count), strict=True)]
        claimed_before = [*stood, *[False] * (count - len(stood))]
        held_now = engine._neighbours.holds(names)
        self._count(
            puts=1,
            rewritten=sum(a and b for a, b in zip(new, claimed_before, strict=True)),
            doubled=sum(a and b for a, b in zip(new, held_now, strict=True)),
        )
        self._publish(engine)

    def _own(self, engine: CacheEngine, first: int, count: int) -> list[bool]:
        """Per key: is it READY in the own index?"""
        with engine._pages.lock:
            return [
                engine._pages.index.find(key) is not None
                for key in self._keys[first : first + count]
            ]

    def _get(self, engine: CacheEngine, first: int, count: int) -> None:
        memory, buffers = page_memory(count, self._setting.payload)
        done = engine.get(self._keys[first : first + count], buffers, soon())
        served = [i for i, flag in enumerate(done) if flag]
        wrong = sum(
            not np.array_equal(memory[i], self._content[first + i]) for i in served
        )  # every byte of every page delivered
        self._count(gets=1, verified=len(served), wrong=wrong)
        self._publish(engine)

    def _publish(self, engine: CacheEngine) -> None:
        """Bring the row up to date with the engine's own counters."""
        with self._row_lock:
            counts = engine._metrics.snapshot()
            for metric, name in _FROM_METRICS.items():
                more = counts.get(metric, 0) - self._seen.get(metric, 0)
                self._row[COUNTERS.index(name)] += more
            self._seen = counts

    def _count(self, **more: int) -> None:
        with self._row_lock:
            for name, number in more.items():
                self._row[COUNTERS.index(name)] += number
