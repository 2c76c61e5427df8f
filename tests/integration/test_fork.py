"""A process that is forked after the start: it touches no file of its parent, and costs it no commit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from flexkv_sglang.backends.slots.journal import new_records
from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.backends.slots.records import RecordOp
from models.plain_pools import Pool, attach, config, names
from stores.engines import keys, open_engine, page_memory, soon, wait_until

pytestmark = pytest.mark.sglang

PAGE = 8192


def in_child(work: Callable[[], bool]) -> bool:
    """Fork, and have ``work`` done in the child, which ends at once; what it returned."""
    child = os.fork()
    if not child:
        signal.alarm(20)
        good = False
        try:
            good = work()
        finally:
            os._exit(0 if good else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_of_the_server_misses_and_its_parent_loses_nothing(tmp_path: Path) -> None:
    pool = Pool(seed=1)
    storage = attach(config(tmp_path), pool, {})
    assert all(storage.batch_set_v1(names(8), pool.indices(*range(8))))

    def work() -> bool:
        found = (
            storage.batch_set_v1(names(8, 1), pool.indices(*range(8))),
            storage.batch_get_v1(names(8), pool.indices(*range(8))),
            storage.batch_exists(names(8)),
            storage.clear(),
            storage.close(),
        )
        return found == ([False] * 8, [False] * 8, 0, None, None)

    assert in_child(work)
    assert all(storage.batch_set_v1(names(8, 2), pool.indices(*range(8))))
    assert storage.batch_exists(names(8)) == 8
    storage.close()
    again = attach(config(tmp_path), pool, {})
    assert again.batch_exists(names(8)) == again.batch_exists(names(8, 2)) == 8
    assert again.batch_exists(names(8, 1)) == 0
    again.close()


@pytest.mark.parametrize("io_engine", ["io_uring", "buffered"])
def test_no_byte_and_no_record_of_a_child_reaches_the_files(tmp_path: Path, io_engine: str) -> None:
    engine = open_engine(tmp_path, PAGE, 64 * PAGE, io_engine=io_engine)
    _, buffers = page_memory(8, PAGE, seed=1)
    assert all(engine.put(keys(8), buffers, None, soon()))
    (journal,), (slots,) = (tmp_path / "ns").glob("*.journal"), (tmp_path / "ns").glob("*.slots")
    before = journal.read_bytes(), slots.read_bytes()

    def work() -> bool:
        target, targets = page_memory(8, PAGE)
        put = engine.put(keys(8, 1), buffers, None, soon())
        got = engine.get(keys(8), targets, soon())
        records = new_records(RecordOp.CLEAR, 1)
        appended = [store.append(records) for store in engine._tier.stores]
        engine.clear()
        engine.close()
        return not any(appended) and not any(put) and not any(got) and bool((target == 0xA5).all())

    assert in_child(work)
    assert (journal.read_bytes(), slots.read_bytes()) == before
    assert all(engine.put(keys(8, 2), buffers, None, soon()))
    engine.close()
    again = open_engine(tmp_path, PAGE, 64 * PAGE, io_engine=io_engine)
    assert again.prefix(keys(8)) == again.prefix(keys(8, 2)) == 8
    again.close()


def test_a_child_that_lives_on_keeps_no_lock(tmp_path: Path) -> None:
    lock = OwnerLock.create(tmp_path)
    here, there = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        os.close(there)
        os.read(here, 1)
        os._exit(0)
    os.close(here)
    try:
        assert OwnerLock.try_take(tmp_path, lock.owner) is None, "the parent holds it"
        lock.close()
        assert wait_until(lambda: OwnerLock.try_take(tmp_path, lock.owner) is not None)
    finally:
        os.close(there)
        os.waitpid(child, 0)
