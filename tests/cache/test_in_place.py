"""Files that vanish, are replaced or restored under a running engine: noticed, said once, there again."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.slots import breaker
from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.cache.health import in_place
from stores.engines import keys, open_engine, page_memory, soon, wait_until
from stores.ext4_loop import ext4

PAGE, PAGES = 8192, 100
SIZE = 256 * PAGE


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(in_place, "LOOK_S", 0.1)
    monkeypatch.setattr(breaker, "_PAUSE_S", 0.1)
    caplog.set_level(logging.INFO)


def put(engine: CacheEngine, seed: int, count: int = PAGES) -> int:
    _, buffers = page_memory(count, PAGE, seed=seed)
    return sum(engine.put(keys(count, seed), buffers, None, soon()))


def served(engine: CacheEngine, seed: int) -> int:
    right, _ = page_memory(PAGES, PAGE, seed=seed)
    target, buffers = page_memory(PAGES, PAGE)
    done = engine.get(keys(PAGES, seed), buffers, soon())
    for row in np.flatnonzero(done):
        assert np.array_equal(target[row], right[row])
    return sum(done)


def restored(engine: CacheEngine, count: int = 1) -> bool:
    """Were so many files put back, and is the directory in use?"""
    stores = engine._tier.stores
    return wait_until(
        lambda: (
            engine._metrics.snapshot().get("restored_files", 0) >= count
            and not any(store.failed for store in stores)
        )
    )


def deleted_files() -> list[str]:
    names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return [name for name in names if name.endswith("(deleted)") and ".slots" in name]


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(
        words in record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
    )


def check_next_start(engine: CacheEngine, place: Path, seed: int) -> None:
    """A neighbour and the next start have the pages; there is one owner, and nothing beside its files."""
    neighbour = open_engine(place, PAGE, 4 * PAGE)
    assert served(neighbour, seed) == PAGES
    neighbour.close()
    neighbour.discard()
    engine.check()
    engine.close()
    (owner,) = owners(place / "ns")
    again = open_engine(place, PAGE, SIZE)
    assert served(again, seed) == PAGES
    assert owners(place / "ns") == [owner]
    ends = sorted(path.name.split(".")[-1] for path in (place / "ns").glob(f"{owner}.*"))
    assert [end for end in ends if end != "json"] == ["journal", "lock", "slots", "snap"]
    again.close()


def test_a_lock_file_that_is_cleaned_away_is_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert put(engine, 0) == PAGES
    (owner,) = owners(tmp_path / "ns")
    (tmp_path / "ns" / f"{owner}.lock").unlink()
    assert restored(engine)
    assert OwnerLock.try_take(tmp_path / "ns", owner) is None, "it is held"
    assert served(engine, 0) == PAGES
    assert said(caplog, f"{owner}.lock was removed, replaced or cut: it is put back") == 1
    assert said(caplog, "is bypassed") == 0
    check_next_start(engine, tmp_path, 0)


@pytest.mark.parametrize("what", ["removed", "an older one in place", "an older one, a new file"])
def test_a_journal_that_is_not_the_written_one_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert put(engine, 0) == PAGES
    (journal,) = (tmp_path / "ns").glob("*.journal")
    old = tmp_path / "old"
    shutil.copy(journal, old)
    assert put(engine, 1) == PAGES
    if what == "removed":
        journal.unlink()
    elif what == "an older one in place":
        subprocess.run(["cp", str(old), str(journal)], check=True)
    else:
        old.rename(journal)
    assert put(engine, 2, 10) == 10
    assert restored(engine)
    assert put(engine, 3, 10) == 10
    assert served(engine, 1) == PAGES
    assert said(caplog, "was removed, replaced or cut: a new journal has its pages") == 1
    check_next_start(engine, tmp_path, 1)


@pytest.mark.parametrize("what", ["the whole directory", "its namespace", "the slot file"])
def test_a_directory_that_is_removed_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    place = tmp_path / "kv"
    engine = open_engine(place, PAGE, SIZE)
    assert put(engine, 0) == PAGES
    if what == "the whole directory":
        shutil.rmtree(place)
    elif what == "its namespace":
        shutil.rmtree(place / "ns")
    else:
        next((place / "ns").glob("*.slots")).unlink()
    assert restored(engine)
    assert not deleted_files(), "the old file's space is free"
    assert served(engine, 0) == 0
    assert put(engine, 0) == PAGES
    assert put(engine, 1) == PAGES
    assert served(engine, 1) == PAGES
    assert said(caplog, "is bypassed, 100 pages miss") == 1
    assert said(caplog, "it is made again, its pages are lost") == 1
    assert said(caplog, "is in use again") == 1
    assert (place / "ns" / "NAMESPACE.json").exists()
    check_next_start(engine, place, 1)


def test_a_removed_directory_in_which_another_server_has_begun_is_shared(tmp_path: Path) -> None:
    place = tmp_path / "kv"
    first = open_engine(place, PAGE, SIZE)
    assert put(first, 0) == PAGES
    shutil.rmtree(place)
    second = open_engine(place, PAGE, SIZE)
    assert put(second, 1) == PAGES
    assert restored(first)
    assert put(first, 2) == PAGES
    assert wait_until(lambda: first.prefix(keys(PAGES, 1)) == PAGES)
    assert wait_until(lambda: second.prefix(keys(PAGES, 2)) == PAGES)
    assert served(first, 1) == served(second, 2) == PAGES
    assert len(owners(place / "ns")) == 2
    first.close()
    second.close()


def test_a_backup_of_everything_that_is_copied_back_costs_pages_and_nothing_else(
    tmp_path: Path,
) -> None:
    place, backup = tmp_path / "kv", tmp_path / "backup"
    engine = open_engine(place, PAGE, SIZE)
    assert put(engine, 0) == PAGES
    shutil.copytree(place, backup)
    assert put(engine, 1) == PAGES
    shutil.rmtree(place)
    subprocess.run(["cp", "-a", str(backup), str(place)], check=True)
    assert restored(engine)
    assert put(engine, 2) == PAGES
    assert served(engine, 2) == PAGES
    check_next_start(engine, place, 2)


def test_files_that_another_process_has_taken_over_are_left_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert put(engine, 0) == PAGES
    (owner,) = owners(tmp_path / "ns")
    path = tmp_path / "ns" / f"{owner}.lock"
    path.unlink()
    path.touch()
    taken = OwnerLock.try_take(tmp_path / "ns", owner)
    assert taken is not None
    assert wait_until(lambda: engine._tier.stores[0].failed)
    assert wait_until(lambda: said(caplog, "another process has taken over its files"))
    assert put(engine, 1) == 0
    assert served(engine, 0) == 0
    taken.close()
    assert restored(engine), "it has left them"
    assert put(engine, 1) == PAGES
    engine.close()


def test_a_file_system_that_is_gone_is_not_replaced_by_the_one_below(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ext4(tmp_path) as disk:
        engine = open_engine(disk, PAGE, SIZE)
        assert put(engine, 0) == PAGES
        held = tmp_path / "held"
        held.mkdir()
        subprocess.run(["mount", "--bind", str(disk), str(held)], check=True)
        try:
            subprocess.run(["umount", "-l", str(disk)], check=True)
            assert wait_until(lambda: engine._tier.stores[0].failed)
            assert wait_until(lambda: "is not mounted" in caplog.text)
            assert not list(disk.iterdir()), "nothing is made on the disk below"
            subprocess.run(["mount", "--bind", str(held), str(disk)], check=True)
            assert wait_until(lambda: served(engine, 0) == PAGES), "and no page is lost"
            engine.close()
        finally:
            subprocess.run(["umount", "-l", str(held)], check=True)
