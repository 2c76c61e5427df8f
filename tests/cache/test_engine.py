"""The engine over real files: restart, neighbours, verification, failures, clear. ``test_tier_suite`` has the rest."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.backends.io.transfer import Outcome
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.errors import ConfigError, JournalError
from flexkv_sglang.types import PageKey
from stores.engines import keys, open_engine, page_memory, soon, wait_until

PAGE = 8192
SIZE = 64 * PAGE


def fill(engine: CacheEngine, count: int, seed: int = 0, parent: PageKey | None = None) -> Any:
    source, buffers = page_memory(count, PAGE, seed=seed)
    assert engine.put(keys(count, seed), buffers, parent, soon()) == [True] * count
    return source


def served(engine: CacheEngine, count: int, seed: int = 0) -> tuple[list[bool], Any]:
    target, buffers = page_memory(count, PAGE)
    return engine.get(keys(count, seed), buffers, soon()), target


def flip(directory: Path, step: int = 1) -> None:
    for path in directory.rglob("*.slots"):
        data = bytearray(path.read_bytes())
        for i in range(0, len(data), step):
            data[i] ^= 0x40
        path.write_bytes(data)


@pytest.mark.parametrize("io_engine", ["io_uring", "threads", "buffered"])
def test_pages_come_back_from_this_process_a_neighbour_and_a_restart(
    tmp_path: Path, io_engine: str
) -> None:
    first = open_engine(tmp_path, PAGE, SIZE, io_engine=io_engine)
    source = fill(first, 20)
    second = open_engine(tmp_path, PAGE, SIZE, io_engine=io_engine)
    for engine in (first, second):
        assert engine.prefix(keys(30)) == 20
        done, target = served(engine, 20)
        assert all(done)
        assert np.array_equal(source, target)
    second.close()
    first.close()
    restarted = open_engine(tmp_path, PAGE, SIZE, io_engine=io_engine)
    done, target = served(restarted, 20)
    assert all(done)
    assert np.array_equal(source, target)
    restarted.check()
    restarted.close()
    assert len(list(tmp_path.rglob("*.slots"))) == 2


def test_a_page_that_a_neighbour_has_is_not_written(tmp_path: Path) -> None:
    first, second = open_engine(tmp_path, PAGE, SIZE), open_engine(tmp_path, PAGE, SIZE)
    fill(first, 10)
    fill(second, 10)
    assert second.page_count() == 0
    _, buffers = page_memory(12, PAGE, seed=0)
    assert second.put(keys(12), buffers, None, soon()) == [True] * 12
    assert second.page_count() == 2
    done, _ = served(second, 12)
    assert all(done)  # ten from the neighbour, two of its own, in one call
    first.close()
    second.close()


def test_get_answers_the_leading_run_only(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    _, buffers = page_memory(3, PAGE, seed=1)
    names = keys(5)
    engine.put([names[0], names[1], names[3]], buffers, None, soon())
    target, targets = page_memory(5, PAGE)
    assert engine.get(names, targets, soon()) == [True, True, False, False, False]
    assert (target[2:] == 0xA5).all()
    engine.close()


@pytest.mark.parametrize("verify", ["full", "sampled"])
def test_flipped_bytes_are_refused_once_and_then_unknown(tmp_path: Path, verify: str) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE, verify=verify)
    neighbour = open_engine(tmp_path, PAGE, SIZE, verify=verify)
    fill(engine, 5)
    flip(tmp_path)
    assert served(neighbour, 5)[0] == [False] * 5
    assert served(engine, 5)[0] == [False] * 5
    assert engine.prefix(keys(5)) == 0
    assert wait_until(lambda: neighbour.prefix(keys(5)) == 0)
    fill(engine, 5)  # and can be stored again
    assert all(served(engine, 5)[0])
    engine.check()
    engine.close()
    neighbour.close()


def test_two_slots_that_changed_places_are_refused(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    same = np.tile(np.arange(256, dtype=np.uint8), PAGE // 256)
    source, buffers = page_memory(2, PAGE)
    source[0], source[1] = same, same[::-1]
    engine.put(keys(2), buffers, None, soon())
    path = next(tmp_path.rglob("*.slots"))
    data = path.read_bytes()
    path.write_bytes(data[PAGE : 2 * PAGE] + data[:PAGE] + data[2 * PAGE :])
    assert served(engine, 2)[0] == [False, False]
    engine.close()


def test_a_page_found_under_another_pages_name_is_refused(tmp_path: Path) -> None:
    """Payload and checksum of the slot agree; only the key in the checksum differs."""
    engine = open_engine(tmp_path, PAGE, SIZE)
    fill(engine, 2)
    table, (first, second) = engine._pages.index._keys, keys(2)
    one, other = table.get(first), table.get(second)
    table.remove(one)
    table.remove(other)
    table.put(first, other)
    table.put(second, one)
    assert served(engine, 2)[0] == [False, False]
    engine.close()


def test_one_damaged_page_ends_the_run_and_those_behind_it_stay(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    fill(engine, 5)
    with next(tmp_path.rglob("*.slots")).open("r+b") as file:
        file.seek(2 * PAGE + 77)
        file.write(b"\0\0\0\0")
    assert served(engine, 5)[0] == [True, True, False, False, False]
    assert engine.prefix(keys(5)) == 2
    assert engine.prefix(keys(5)[3:]) == 2
    engine.close()


@pytest.mark.parametrize("verify", ["full", "sampled"])
@pytest.mark.parametrize("first_shift", [0, 64])
def test_the_checksum_does_not_depend_on_whether_a_page_was_copied(
    tmp_path: Path, verify: str, first_shift: int
) -> None:
    page = 96 * 4096
    engine = open_engine(tmp_path, page, 8 * page, verify=verify)
    source, buffers = page_memory(4, page, 3, shift=first_shift, seed=1)
    assert all(engine.put(keys(4), buffers, None, soon()))
    target, buffers = page_memory(4, page, 3, shift=64 - first_shift)
    assert all(engine.get(keys(4), buffers, soon()))
    assert np.array_equal(source, target)
    engine.close()


def test_a_stricter_process_finds_no_page_that_was_verified_less(
    tmp_path: Path,
) -> None:
    relaxed = open_engine(tmp_path, PAGE, SIZE, verify="off")
    fill(relaxed, 4)
    strict = open_engine(tmp_path, PAGE, SIZE, verify="full")
    assert strict.prefix(keys(4)) == 0
    assert served(strict, 4)[0] == [False] * 4
    assert all(served(relaxed, 4)[0])
    strict.close()
    relaxed.close()


def test_a_stricter_process_adopts_the_slots_and_not_the_less_verified_pages(
    tmp_path: Path,
) -> None:
    relaxed = open_engine(tmp_path, PAGE, SIZE, verify="off")
    fill(relaxed, 4)
    relaxed.close()
    strict = open_engine(tmp_path, PAGE, SIZE, verify="sampled")
    assert strict.page_count() == 0
    assert strict.prefix(keys(4)) == 0
    fill(strict, 4)
    strict.close()
    assert len(list(tmp_path.rglob("*.slots"))) == 1


def test_a_full_tier_evicts_leaves_and_stays_within_its_files(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    for seed in range(20):
        fill(engine, 10, seed)
        engine.check()
    assert engine.page_count() == 64
    assert all(served(engine, 10, 19)[0])
    assert engine.prefix(keys(10, 0)) == 0
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.slots")) == SIZE
    engine.close()


def test_a_batch_larger_than_the_tier_is_granted_a_leading_part(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    _, buffers = page_memory(80, PAGE, seed=1)
    assert engine.put(keys(80), buffers, None, soon()) == [True] * 64 + [False] * 16
    assert engine.prefix(keys(80)) == 64
    engine.close()


def test_clear_forgets_here_and_at_the_neighbours_and_over_a_restart(tmp_path: Path) -> None:
    engine, neighbour = open_engine(tmp_path, PAGE, SIZE), open_engine(tmp_path, PAGE, SIZE)
    fill(engine, 10)
    assert wait_until(lambda: neighbour.prefix(keys(10)) == 10)
    engine.clear()
    assert engine.prefix(keys(10)) == 0
    assert wait_until(lambda: neighbour.prefix(keys(10)) == 0)
    fill(engine, 10, 7)
    engine.close()
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert engine.prefix(keys(10)) == 0
    assert all(served(engine, 10, 7)[0])
    engine.close()
    neighbour.close()


def test_clear_during_a_put_leaves_no_page_and_no_slot_behind(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    mover: Any = engine._mover
    original, at_move, go_on = mover.move, threading.Event(), threading.Event()

    def slow_write(*args: Any) -> list[Outcome]:
        at_move.set()
        assert go_on.wait(10)
        return list(original(*args))

    mover.move = slow_write
    _, buffers = page_memory(64, PAGE, seed=1)
    answer: list[list[bool]] = []
    thread = threading.Thread(
        target=lambda: answer.append(engine.put(keys(64), buffers, None, soon()))
    )
    thread.start()
    assert at_move.wait(10)
    engine.clear()
    go_on.set()
    thread.join()
    mover.move = original
    assert answer == [[False] * 64]
    assert engine.prefix(keys(64)) == 0
    engine.check()
    engine.close()
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert (engine.page_count(), engine.prefix(keys(64))) == (
        0,
        0,
    )  # nothing was recorded behind CLEAR
    fill(engine, 64, 2)  # every slot is free again
    engine.close()
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert (engine.prefix(keys(64)), engine.prefix(keys(64, 2))) == (0, 64)
    engine.close()


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "planted"), None])
def test_a_failed_write_is_false_invisible_and_leaks_nothing(
    tmp_path: Path, failure: OSError | None
) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    mover: Any = engine._mover
    original = mover.move

    def broken(*args: Any) -> list[Outcome]:
        done = original(*args)
        if failure is not None:
            raise failure
        return [outcome if i % 2 == 0 else Outcome.SHORT for i, outcome in enumerate(done)]

    mover.move = broken
    _, buffers = page_memory(10, PAGE, seed=1)
    expected = [False] * 10 if failure else [i % 2 == 0 for i in range(10)]
    assert engine.put(keys(10), buffers, None, soon()) == expected
    assert engine.prefix(keys(10)) == int(expected[0])
    mover.move = original
    engine.check()
    for seed in range(4):
        fill(engine, 16, seed)
    engine.check()
    engine.close()


def test_a_failed_journal_stops_writes_and_keeps_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    fill(engine, 10)
    journal = engine._tier.stores[0].journal

    def refuse(_records: object) -> None:
        raise JournalError("planted")

    monkeypatch.setattr(journal, "append", refuse)
    _, buffers = page_memory(4, PAGE, seed=9)
    assert engine.put(keys(4, 9), buffers, None, soon()) == [False] * 4
    assert engine.prefix(keys(4, 9)) == 0
    monkeypatch.undo()
    assert engine.put(keys(4, 9), buffers, None, soon()) == [False] * 4  # until a probe succeeds
    assert all(served(engine, 10)[0])
    assert wait_until(lambda: all(engine.put(keys(4, 9), buffers, None, soon())))
    assert all(served(engine, 10)[0])
    engine.check()
    engine.close()


def test_a_page_is_forgotten_after_its_file_was_cut_and_kept_after_an_io_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    fill(engine, 4)
    mover: Any = engine._mover
    monkeypatch.setattr(mover, "move", lambda transfer: [Outcome.FAILED] * len(transfer))
    assert served(engine, 4)[0] == [False] * 4
    assert engine.prefix(keys(4)) == 4
    monkeypatch.undo()
    os.truncate(next(tmp_path.rglob("*.slots")), PAGE * 2)
    assert served(engine, 4)[0] == [True, True, False, False]
    assert engine.prefix(keys(4)) == 2
    engine.close()


def test_a_read_past_its_deadline_is_a_miss_and_the_pages_stay(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    fill(engine, 10)
    target, buffers = page_memory(10, PAGE)
    assert engine.get(keys(10), buffers, time.monotonic() - 1) == [False] * 10
    assert (target == 0xA5).all()
    assert all(served(engine, 10)[0])
    engine.close()


def test_close_is_idempotent_and_leaves_no_descriptor_open(tmp_path: Path) -> None:
    gc.collect()  # leftovers of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        engine, neighbour = open_engine(tmp_path, PAGE, SIZE), open_engine(tmp_path, PAGE, SIZE)
        fill(engine, 4, 1)
        served(neighbour, 4, 1)
        for each in (engine, neighbour, engine):
            each.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flexkv")]


def test_a_journal_of_outdated_records_is_rotated_and_neighbours_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.backends.slots.journal._MIN_ROTATE_BYTES", 0)
    engine, neighbour = open_engine(tmp_path, PAGE, SIZE), open_engine(tmp_path, PAGE, SIZE)
    for seed in range(40):
        fill(engine, 10, seed)
        assert wait_until(lambda seed=seed: neighbour.prefix(keys(10, seed)) == 10)
    assert wait_until(lambda: engine._metrics.snapshot().get("journal_rotations"))
    assert len(list(tmp_path.rglob("*.journal"))) == 2
    assert neighbour.neighbour_page_count() == engine.page_count() == 64
    assert all(served(neighbour, 10, 39)[0])
    engine.close()
    restarted = open_engine(tmp_path, PAGE, SIZE)
    assert all(served(restarted, 10, 39)[0])
    restarted.check()
    restarted.close()
    neighbour.close()


def test_a_smaller_size_cuts_the_file_and_a_larger_one_adds_to_it(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    fill(engine, 64)
    engine.close()
    engine = open_engine(tmp_path, PAGE, SIZE // 2)
    assert engine.page_count() == 32
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.slots")) == SIZE // 2
    engine.check()
    engine.close()
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert engine.page_count() == 32
    fill(engine, 64, 3)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.slots")) == SIZE
    engine.close()


def test_an_impossible_size_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"size: .* less than one page .* Valid:"):
        open_engine(tmp_path, PAGE, PAGE - 1)
    with pytest.raises(ConfigError, match=r"size: .* can be taken.* Valid:"):
        open_engine(tmp_path, PAGE, 1 << 60)
    assert not list(tmp_path.rglob("*.slots"))
    assert not list(tmp_path.rglob("*.lock"))
