"""The process that is killed: adopts the files of the last one, checks every page, then puts, gets and clears.

Pages are a function of their key, so any process can say whether bytes are right. Keys come in chains of
``CHAIN``, as prefixes do. Each thread puts chains of its own: a page that another thread is writing is
answered with True before it is committed (ARCHITECTURE.md, "A get, a put"), which would make "lost" undecidable.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexkv_sglang.backends import failpoints
from flexkv_sglang.backends.failpoints import Failpoint
from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.backends.slots.journal import JournalWriter
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.types import round_up
from stores.crash_ledger import Kind, Ledger
from stores.engines import Bytes, keys, open_engine, page_memory, soon
from stores.killer import KillAt

CHAIN = 8
THREADS = 3
BATCH_MAX = 6
IN_FLIGHT = THREADS * BATCH_MAX
ROTATE_RECORDS = 60
NAMESPACE = "crash"


@dataclass(frozen=True)
class Setting:
    """One directory under test. ``slots``: pages of quota; ``payload``: bytes of a page."""

    directory: Path
    mode: IoMode
    slots: int
    payload: int
    chains: int
    verify: str
    durable: bool
    alone: bool  # no other process owns files here, so every file can be accounted for

    @property
    def key_count(self) -> int:
        return self.chains * CHAIN

    @property
    def slot_bytes(self) -> int:
        return round_up(self.payload, 4096)


@dataclass(frozen=True)
class Order:
    """The work of one life. ``steps``: per thread, before a normal close; most lives are killed earlier."""

    seed: int
    slots: int
    steps: int
    point: Failpoint | None = None
    passes: int = 1
    cut: float | None = None


def make_content(count: int, payload: int) -> Bytes:
    """Bytes of every page, uint8 ``[count, payload]``."""
    rng = np.random.default_rng(99)
    return rng.integers(0, 256, (count, payload), dtype=np.uint8)


def open_here(setting: Setting, slots: int) -> CacheEngine:
    """An engine as the product assembles it, but without the probe. 0 slots: it only reads its neighbours."""
    return open_engine(
        setting.directory,
        setting.payload,
        slots * setting.slot_bytes,
        verify=setting.verify,
        namespace=NAMESPACE,
        mode=setting.mode,
        durable=setting.durable,
    )


class Life:
    """One child process between fork and death."""

    def __init__(self, setting: Setting, order: Order, ledger: Ledger, content: Bytes) -> None:
        self._setting = setting
        self._order = order
        self._ledger = ledger
        self._content = content
        self._keys = keys(setting.key_count)
        self._refused = 0

    def run(self) -> None:
        """Carry out the order. Runs only in the child."""
        order = self._order
        JournalWriter.should_rotate = rotate_often  # type: ignore[method-assign]
        if order.point is not None:
            failpoints.set_hook(KillAt(order.point, order.passes, order.cut))
        engine = open_here(self._setting, order.slots)
        engine.check()
        self._ledger.note(Kind.READY, number=engine.page_count())
        self._account_for_files(engine)
        self._look_at_all(engine)
        threads = [
            threading.Thread(target=self._guarded, args=(engine, index)) for index in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.check()
        engine.close()
        self._ledger.note(Kind.CLOSED)

    def read_for_ever(self) -> None:
        """Read the pages of all journals as a neighbour without files of its own."""
        engine = open_here(self._setting, 0)
        rng = random.Random(self._order.seed)
        served = 0
        while True:
            before = served
            for _ in range(20):
                served += len(self._get(engine, rng.randrange(self._setting.chains) * CHAIN, CHAIN))
            if served > before:
                self._ledger.note(Kind.CHECKED, number=served - before)
            else:
                time.sleep(0.002)

    def _guarded(self, engine: CacheEngine, index: int) -> None:
        try:
            rng = random.Random(self._order.seed * THREADS + index)
            for _ in range(self._order.steps):
                self._step(engine, index, rng)
        except BaseException:  # noqa: BLE001 - the end of the process
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)

    def _step(self, engine: CacheEngine, index: int, rng: random.Random) -> None:
        dice = rng.random()
        if dice < 0.65:
            chain = rng.randrange(index, self._setting.chains, THREADS)
            start = rng.choice((0, 0, rng.randrange(CHAIN)))
            self._put(engine, index, chain * CHAIN + start, min(CHAIN - start, BATCH_MAX))
        elif dice < 0.985 or index:
            self._get(engine, rng.randrange(self._setting.chains) * CHAIN, CHAIN)
        else:
            self._ledger.note(Kind.CLEAR_BEGIN)
            engine.clear()
            for (
                directory
            ) in engine._upkeep.directories:  # a kill before the record brings pages back
                directory.journal.run(lambda: None, time.monotonic() + 5.0)
            self._ledger.note(Kind.CLEAR_END)

    def _put(self, engine: CacheEngine, index: int, first: int, count: int) -> None:
        memory, buffers = page_memory(count, self._setting.payload)
        memory[:] = self._content[first : first + count]
        parent = self._keys[first - 1] if first % CHAIN else None
        self._ledger.note(Kind.PUT_BEGIN, first, count, thread=index)
        done = engine.put(self._keys[first : first + count], buffers, parent, soon())
        mask = sum(1 << i for i, flag in enumerate(done) if flag)
        self._ledger.note(Kind.PUT_END, first, count, mask, thread=index)

    def _get(self, engine: CacheEngine, first: int, count: int) -> list[int]:
        """Keys served of a run, after comparing each."""
        memory, buffers = page_memory(count, self._setting.payload)
        done = engine.get(self._keys[first : first + count], buffers, soon())
        served = [first + i for i, flag in enumerate(done) if flag]
        for key in served:
            if not np.array_equal(memory[key - first], self._content[key]):
                self._ledger.note(Kind.WRONG, key)
        refused = int(engine._metrics.snapshot().get("corrupt_pages", 0))
        if refused > self._refused:  # counted twice if two threads meet here: any is one too many
            self._refused = refused
            self._ledger.note(Kind.REFUSED, first)
            sys.stderr.write(f"refused by {self._order}\n")
        return served

    def _look_at_all(self, engine: CacheEngine) -> None:
        """All stored pages, also those behind a missing one."""
        checked = 0
        for first in range(0, self._setting.key_count, CHAIN):
            served: list[int] = []
            for key in range(first, first + CHAIN):
                if key not in served and engine.prefix([self._keys[key]]):
                    served += self._get(engine, key, first + CHAIN - key)
            mask = sum(1 << (key - first) for key in set(served))
            self._ledger.note(Kind.SEEN, first, CHAIN, mask)
            checked += len(set(served))
        self._ledger.note(Kind.CHECKED, number=checked)

    def _account_for_files(self, engine: CacheEngine) -> None:
        directory = self._setting.directory / NAMESPACE
        if not self._setting.alone:
            return
        names = set(os.listdir(directory))
        used = sum(os.stat(directory / n).st_size for n in names if n.endswith(".slots"))
        if used > self._setting.slots * self._setting.slot_bytes:
            self._ledger.note(
                Kind.OVERSIZE, number=used - self._setting.slots * self._setting.slot_bytes
            )
        expected = {"NAMESPACE.json"}
        for store in engine._tier.stores:
            owner, generation = store.lock.owner, store.journal.header.generation
            expected |= {f"{owner}.lock", store.slots.path.name, store.journal.path.name}
            expected |= {f"{owner}.{generation}.snap"} if generation else set()
            stats = f"{owner}.stats.json"  # may just be replaced
            expected |= {name for name in names if name == stats or name.startswith(stats + ".")}
        strays = names - expected - _idle_owners(names, engine)
        if strays:
            sys.stderr.write(f"left behind: {sorted(strays)}\n")
            self._ledger.note(Kind.LITTER, number=len(strays))


def _idle_owners(names: set[str], engine: CacheEngine) -> set[str]:
    """Files of whole dead owners that did not fit into this life's share: they stay readable."""
    own = {store.lock.owner for store in engine._tier.stores}
    owners = {name.partition(".")[0] for name in names if name.endswith(".journal")} - own
    kinds = (".lock", ".slots", ".journal", ".snap", ".tmp", ".stats.json")
    return {n for n in names if n.partition(".")[0] in owners and n.endswith(kinds)}


def rotate_often(journal: JournalWriter, live_count: int) -> bool:
    """Replaces ``JournalWriter.should_rotate``: a new generation every ``ROTATE_RECORDS`` records."""
    return journal.size > 4096 + ROTATE_RECORDS * 64
