"""Disks that fail, hang or fill up: the others go on, no wrong page is served, and all recover without help."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.backends.io.transfer import PageTransfer
from flexkv_sglang.cache.assembly import Quota, open_tiers, prepare_tiers
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.cache.health import free_space
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig, TierConfig
from flexkv_sglang.metrics.registry import Metrics
from stores.engines import keys, open_engine, open_hierarchy_on, page_memory, soon, wait_until
from stores.faulty_io import copy_of

PAGE = 8192


class BadDisk:
    """An I/O engine in front of a real one: I/O on ``files`` fails or hangs as long as the test wants."""

    kind = "bad"
    given_up = False

    def __init__(self, real: Any, files: set[int]) -> None:
        self._real = real
        self._files = files
        self.failing = False
        self.released = threading.Event()
        self.released.set()

    def move(self, transfer: PageTransfer) -> None:
        bad = np.isin(transfer.fds, list(self._files))
        if bad.any():
            self.released.wait(30)
        if not (self.failing and bad.any()):
            self._real.move(transfer)
            return
        results = np.full(len(transfer), -errno.EIO, np.int64)
        good = np.flatnonzero(~bad)
        part = copy_of(transfer, good)
        self._real.move(part)
        results[good] = part.moved
        transfer.on_complete(np.arange(len(transfer)), results)

    def close(self, seconds: float = 6.0) -> bool:
        return bool(self._real.close())


def two_disks(tmp_path: Path) -> Tiers:
    config = FlexKVConfig(
        tiers=(TierConfig((str(tmp_path / "a"), str(tmp_path / "b")), 128 * PAGE),)
    )
    return open_tiers(
        config,
        prepare_tiers(config),
        "ns",
        {},
        PAGE,
        [Quota(tier.size) for tier in config.tiers],
        Metrics(),
    )


def spoil(engine: CacheEngine, directory: Path, direction: str) -> BadDisk:
    """Put a ``BadDisk`` for one directory into the path of reads or writes."""
    files = {s.slots.fd for s in engine._tier.stores if directory in s.lock.directory.parents}
    side = engine._mover._directions[direction]
    disk = BadDisk(side.engine("io_uring"), files)
    side._engines["io_uring"] = disk
    return disk


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Tiers]:
    hierarchy = two_disks(tmp_path)
    yield hierarchy
    hierarchy.check()
    hierarchy.close()


def put(hierarchy: Tiers, count: int, seed: int) -> tuple[list[bool], Any]:
    source, buffers = page_memory(count, PAGE, seed=seed)
    return hierarchy.put(keys(count, seed), buffers, None, soon()), source


def get(hierarchy: Tiers, count: int, seed: int) -> tuple[list[bool], Any]:
    target, buffers = page_memory(count, PAGE)
    return hierarchy.get(keys(count, seed), buffers, soon()), target


def test_a_disk_that_fails_reads_is_bypassed_its_pages_are_put_elsewhere_and_it_comes_back(
    store: Tiers, tmp_path: Path
) -> None:
    _, source = put(store, 16, seed=1)
    engine = store.tiers[0]
    disk = spoil(engine, tmp_path / "a", "read")
    disk.failing = True
    on_bad = [i for i in range(16) if engine._tier.stores[0].breaker is _breaker_of(engine, i)]
    assert 0 < len(on_bad) < 16
    one_bad = keys(16, 1)[on_bad[0]]
    for _ in range(3):  # that page alone: in a larger call the other disk's pages still move
        _, buffers = page_memory(1, PAGE)
        assert store.get([one_bad], buffers, soon()) == [False]
    assert engine._tier.stores[0].breaker.is_open
    assert store.prefix([one_bad]) == 0
    done, again = put(store, 16, seed=1)
    assert all(done), "the other disk takes the pages of the bad one"
    done, target = get(store, 16, seed=1)
    assert all(done)
    assert np.array_equal(again, target)
    done, _ = put(store, 40, seed=2)
    assert sum(done) == 40, "and evicts for more"
    engine.check()
    disk.failing = False
    assert wait_until(lambda: not engine._tier.stores[0].breaker.is_open)
    assert all(put(store, 60, seed=3)[0])
    done, target = get(store, 60, seed=3)
    assert all(done)
    assert len(source)
    assert store._metrics.snapshot()["breaker_closed"] == 1


def _breaker_of(engine: CacheEngine, position: int) -> Any:
    slot = engine._pages.index.find(keys(16, 1)[position])
    assert slot is not None
    return engine._tier.breakers([slot])[0]


def test_changes_during_a_bypass_hold_after_a_restart(tmp_path: Path) -> None:
    """Pages put elsewhere meanwhile, and a clear: the disk's journal must not bring the old state back."""
    store = two_disks(tmp_path)
    put(store, 16, seed=1)
    engine = store.tiers[0]
    breaker = engine._tier.stores[0].breaker
    breaker.trip("planted")
    engine._upkeep.bypass_failed()
    assert store.prefix(keys(16, 1)) < 16
    store.clear()
    put(store, 4, seed=2)
    assert wait_until(lambda: not breaker.is_open)
    store.close()
    store = two_disks(tmp_path)
    assert store.prefix(keys(16, 1)) == 0
    assert store.page_count() == 4
    assert all(get(store, 4, seed=2)[0])
    store.check()
    store.close()


def test_a_disk_that_hangs_holds_up_one_call_only(store: Tiers, tmp_path: Path) -> None:
    put(store, 16, seed=1)
    engine = store.tiers[0]
    disk = spoil(engine, tmp_path / "a", "read")
    disk.released.clear()
    target, buffers = page_memory(1, PAGE)
    breaker = engine._tier.stores[0].breaker
    there = next(i for i in range(16) if _breaker_of(engine, i) is breaker)
    asked = [keys(16, 1)[there]]
    answers: list[list[bool]] = []
    stuck = threading.Thread(
        target=lambda: answers.append(store.get(asked, buffers, time.monotonic() + 0.2))
    )
    stuck.start()
    assert wait_until(lambda: breaker.is_open)
    assert wait_until(lambda: engine._upkeep._bypassed)
    done, source = put(store, 16, seed=2)
    assert all(done)
    got, other = get(store, 16, seed=2)
    assert all(got)
    assert np.array_equal(source, other)
    assert stuck.is_alive(), "it owns the caller's memory until the disk answers"
    disk.released.set()
    stuck.join(10)
    assert not stuck.is_alive()
    assert len(answers) == 1
    assert len(target)
    assert wait_until(lambda: not breaker.is_open)


def test_of_two_directories_one_may_be_missing_at_start(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file where a directory should be")
    store = two_disks(tmp_path)
    done, source = put(store, 8, seed=1)
    assert all(done)
    got, target = get(store, 8, seed=1)
    assert all(got)
    assert np.array_equal(source, target)
    store.close()


def test_space_is_given_back_when_others_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_hierarchy_on([(tmp_path, 64 * PAGE)], PAGE)
    engine = store.tiers[0]
    for seed in range(4):
        put(store, 16, seed)
    path = engine._tier.stores[0].slots.path
    before = path.stat().st_blocks
    monkeypatch.setattr(free_space, "floor_bytes", lambda *_: 10 * PAGE)
    monkeypatch.setattr(free_space, "free_bytes", lambda *_: 0)
    for directory in engine._upkeep.directories:
        engine._free_space.keep_floor(directory)
    monkeypatch.undo()
    assert path.stat().st_size == 54 * PAGE
    assert path.stat().st_blocks < before
    assert store.page_count() <= 54
    store.check()
    assert all(put(store, 16, seed=9)[0])
    assert all(get(store, 16, seed=9)[0])
    count = store.page_count()
    store.close()
    store = open_hierarchy_on([(tmp_path, 54 * PAGE)], PAGE)
    assert store.page_count() == count
    assert all(get(store, 16, seed=9)[0])
    store.close()


@pytest.mark.parametrize("durability", ["none", "journal"])
def test_durability_decides_about_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    config = FlexKVConfig(tiers=(TierConfig((str(tmp_path),), 16 * PAGE),), durability=durability)
    store = open_tiers(
        config,
        prepare_tiers(config),
        "ns",
        {},
        PAGE,
        [Quota(tier.size) for tier in config.tiers],
        Metrics(),
    )
    owned = store.tiers[0]._tier.stores[0]
    events: list[str] = []
    for place, name in ((owned.slots, "sync"), (owned.journal, "sync"), (owned.journal, "append")):
        monkeypatch.setattr(place, name, _noted(events, place, name))
    put(store, 16, seed=1)
    put(store, 4, seed=2)
    monkeypatch.undo()
    plain = ["JournalWriter.append"] * 3  # records; tombstones, records
    flushed = [
        *("SlotFile.sync", "JournalWriter.append", "JournalWriter.sync"),
        *("JournalWriter.append", "JournalWriter.sync"),
        *("SlotFile.sync", "JournalWriter.append", "JournalWriter.sync"),
    ]
    assert events == (plain if durability == "none" else flushed)
    store.close()


def _noted(events: list[str], place: Any, name: str) -> Callable[..., Any]:
    real = getattr(place, name)

    def call(*args: Any) -> Any:
        events.append(f"{type(place).__name__}.{name}")
        return real(*args)

    return call


def test_close_does_not_come_between_a_record_and_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that hangs keeps its files: their numbers must not become another's under it."""
    monkeypatch.setattr("flexkv_sglang.cache.engine.CLOSE_S", 0.2)
    engine = open_engine(tmp_path, PAGE, 64 * PAGE)
    _, buffers = page_memory(4, PAGE, seed=1)
    assert all(engine.put(keys(4), buffers, None, soon()))
    (store,) = engine._tier.stores
    (directory,) = engine._upkeep.directories
    answers = threading.Event()
    under_way = directory.journal.post(lambda: answers.wait(10), 10.0)  # as if a commit hung
    engine.close()
    assert store.slots.fd >= 0
    assert store.lock.held
    assert not engine.released()
    answers.set()
    assert under_way.result(10)
    engine.close()
    assert store.slots.fd < 0
    assert not store.lock.held
