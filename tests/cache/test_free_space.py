"""Slots are given back as far as it helps; a tier that started short notices that it may grow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.cache.health import free_space
from stores.engines import keys, open_engine, page_memory, soon, wait_until
from stores.ext4_loop import ext4

PAGE = 65536
MIB = 1 << 20


class FakeDisk:
    """Free space as a test sets it, and a clock. ``engine``: 256 MiB of pages on it, which nothing else looks at."""

    def __init__(self, engine: CacheEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.now, self.engine = 64 * MIB, 1000.0, engine
        (self.directory,) = engine._upkeep.directories
        for name in ("free_bytes", "unallocated_bytes"):
            monkeypatch.setattr(free_space, name, lambda _: self.free)
        monkeypatch.setattr(free_space, "floor_bytes", lambda *_: 64 * MIB)
        self.keeper = free_space.FreeSpace(
            engine._pages, engine._metrics, None, clock=lambda: self.now
        )

    def round(self, seconds: float = 5.0) -> int:
        """A round of the duty. Returns the bytes that it gave back."""
        before = self.engine._tier.stores[0].slots.slot_class
        self.keeper.keep_floor(self.directory)
        self.now += seconds
        return before.slot_bytes * (
            before.slot_count - self.engine._tier.stores[0].slots.slot_class.slot_count
        )


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDisk]:
    monkeypatch.setattr("flexkv_sglang.cache.upkeep._FLOOR_ROUND_S", 1e9)
    engine = open_engine(tmp_path, PAGE, 256 * MIB)
    yield FakeDisk(engine, monkeypatch)
    engine.close()


def test_what_shows_late_is_given_back_once(disk: FakeDisk) -> None:
    disk.free -= 16 * MIB
    assert disk.round() == 16 * MIB
    assert [disk.round() for _ in range(6)] == [0] * 6
    disk.free -= 8 * MIB  # others go on taking
    assert disk.round() == 8 * MIB
    disk.free += 24 * MIB  # the file system has committed
    assert disk.round() == 0
    disk.free -= 16 * MIB
    assert disk.round() == 16 * MIB


def test_after_two_rounds_that_free_nothing_no_more_is_given_back(
    disk: FakeDisk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.free -= 16 * MIB
    assert sum(disk.round(20.0) for _ in range(50)) == 32 * MIB
    assert caplog.text.count("free no space on this disk") == 1
    disk.free += 32 * MIB  # the snapshot is gone
    assert disk.round() == 0
    disk.free -= 32 * MIB
    assert disk.round() == 16 * MIB


def test_a_journal_without_space_does_not_switch_the_remedy_off(disk: FakeDisk) -> None:
    store = disk.engine._tier.stores[0]
    _, buffers = page_memory(20, PAGE, seed=1)
    assert all(disk.engine.put(keys(20), buffers, None, soon()))
    store.breaker.trip("journal: no space", readable=True)
    disk.engine._upkeep.bypass_failed()
    disk.free -= 16 * MIB
    assert disk.round() == 16 * MIB
    assert store.slots.path.stat().st_size == 240 * MIB
    assert disk.engine.prefix(keys(20)) == 20
    assert wait_until(lambda: not store.breaker.is_open, 20)
    assert store.journal.header.files[0].slot_count == 240 * MIB // PAGE
    assert disk.engine.prefix(keys(20)) == 20


def test_an_owner_that_died_between_the_cut_and_its_journal_is_adopted(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 4 * MIB)
    _, buffers = page_memory(20, PAGE, seed=1)
    assert all(engine.put(keys(20), buffers, None, soon()))
    path = engine._tier.stores[0].slots.path
    engine.close()
    os.truncate(path, 10 * PAGE)
    engine = open_engine(tmp_path, PAGE, 10 * PAGE)
    assert engine.page_count() == 10
    assert engine.slot_count == 10
    engine.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own."""
    with ext4(tmp_path, 128) as mount:
        yield mount


def test_a_disk_that_others_fill_to_the_end_is_written_again(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.cache.upkeep._FLOOR_ROUND_S", 0.5)
    engine = open_engine(small_disk / "kv", PAGE, 64 * MIB)
    fd = os.open(small_disk / "others", os.O_RDWR | os.O_CREAT)
    at, step = 0, MIB
    while step >= 4096:
        try:
            os.posix_fallocate(fd, at, step)
            at += step
        except OSError:
            step //= 2
    os.close(fd)
    _, buffers = page_memory(8, PAGE, seed=1)
    seeds = iter(range(1, 10_000))

    def written() -> bool:
        chain = keys(8, seed=next(seeds))
        return all(engine.put(chain, buffers, None, soon())) and engine.prefix(chain) == 8

    assert wait_until(lambda: written() and os.statvfs(small_disk).f_bavail > 0, 20)
    assert not engine._tier.stores[0].failed
    engine.close()


def test_what_shows_at_once_is_not_waited_for(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = disk.engine._tier.stores[0]
    used = 256 * MIB

    def free(_: Path) -> int:
        return disk.free + used - store.slots.slot_class.slot_count * PAGE

    for name in ("free_bytes", "unallocated_bytes"):
        monkeypatch.setattr(free_space, name, free)
    for _ in range(5):  # others fill the disk all the time
        disk.free -= 8 * MIB
        assert disk.round() == 8 * MIB
