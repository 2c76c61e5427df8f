"""Reading and writing have a health of their own: failed writes cost no page that is there."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.io.probe import make_engine
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.transfer import IoEngine, IoMode, PageTransfer
from flexkv_sglang.backends.slots import breaker
from flexkv_sglang.cache import upkeep
from flexkv_sglang.cache.engine import CacheEngine
from stores.engines import keys, open_engine, page_memory, soon, wait_until
from stores.ext4_loop import ext4, turn_read_only

PAGE, PAGES = 8192, 100
SIZE = 256 * PAGE


class BadWrites:
    """Engines whose writes fail with ``code``, 0: they work; and so does every probe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code = 0
        real = upkeep.probe_directory

        def probe(directory: str, wanted: str = "auto") -> IoMode:
            if self.code:
                raise OSError(self.code, os.strerror(self.code))
            return real(directory, wanted)

        monkeypatch.setattr(upkeep, "probe_directory", probe)
        monkeypatch.setattr(breaker, "_PAUSE_S", 0.1)

    def make(self, kind: str, traffic: ReadPriority | None = None) -> IoEngine:
        engine = make_engine(kind, traffic)
        move = engine.move

        def moved(transfer: PageTransfer) -> None:
            if self.code and transfer.writing:
                everything = np.arange(len(transfer))
                transfer.on_complete(everything, np.full(len(transfer), -self.code, np.int64))
            else:
                move(transfer)

        engine.move = moved  # type: ignore[method-assign]
        return engine


def put(engine: CacheEngine, seed: int, count: int = 10) -> int:
    _, buffers = page_memory(count, PAGE, seed=seed)
    return sum(engine.put(keys(count, seed), buffers, None, soon()))


def served(engine: CacheEngine) -> int:
    """Pages of seed 0 that are announced, delivered and right."""
    right, _ = page_memory(PAGES, PAGE, seed=0)
    target, buffers = page_memory(PAGES, PAGE)
    announced = engine.prefix(keys(PAGES))
    done = engine.get(keys(PAGES), buffers, soon())
    assert announced == sum(done)
    return sum(
        flag and bool((a == b).all()) for flag, a, b in zip(done, target, right, strict=True)
    )


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    lines = [line for line in caplog.records if line.levelno >= logging.WARNING]
    return sum(words in line.getMessage() for line in lines)


@pytest.mark.parametrize(
    ("code", "reads_between"),
    [(errno.EROFS, False), (errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)],
)
def test_failing_writes_condemn_no_read_and_are_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    reads_between: bool,
) -> None:
    bad = BadWrites(monkeypatch)
    engine = open_engine(tmp_path, PAGE, SIZE, make=bad.make)
    assert put(engine, 0, PAGES) == PAGES
    bad.code = code
    with caplog.at_level(logging.WARNING):
        for seed in range(1, 9):
            assert put(engine, seed) == 0
            assert not reads_between or served(engine) == PAGES
        assert served(engine) == PAGES
        assert said(caplog, "takes no more pages") == 1
        assert said(caplog, "is bypassed") == 0
        assert wait_until(lambda: said(caplog, f"still fails: [Errno {code}]"))
        bad.code = 0
        assert wait_until(lambda: engine._metrics.snapshot().get("breaker_closed"))
        assert put(engine, 1) == 10
        assert said(caplog, "is in use again") == 1
        assert said(caplog, "still fails") == 1
    assert served(engine) == PAGES
    engine.check()
    engine.close()


def test_a_disk_that_hung_and_came_back_read_only_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BadWrites(monkeypatch)
    engine = open_engine(tmp_path, PAGE, SIZE, make=bad.make)
    assert put(engine, 0, PAGES) == PAGES
    bad.code = errno.EROFS
    with caplog.at_level(logging.WARNING):
        engine._tier.stores[0].breaker.trip("a transfer hangs")
        engine._upkeep.bypass_failed()
        assert served(engine) == 0
        assert wait_until(lambda: engine.prefix(keys(PAGES)) == PAGES)
    assert served(engine) == PAGES
    assert put(engine, 1) == 0, "it takes no pages yet"
    assert said(caplog, "is read again, but takes no pages: [Errno 30] Read-only file system") == 1
    bad.code = 0
    assert wait_until(lambda: not engine._tier.stores[0].failed)
    assert put(engine, 1) == 10
    assert served(engine) == PAGES
    engine.check()
    engine.close()


def test_a_file_system_that_turned_read_only_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ext4(tmp_path) as disk:
        engine = open_engine(disk, PAGE, SIZE)
        assert put(engine, 0, PAGES) == PAGES
        turn_read_only(disk)
        with caplog.at_level(logging.WARNING):
            for seed in range(1, 9):
                assert put(engine, seed) == 0
            assert served(engine) == PAGES
        assert said(caplog, "takes no more pages") == 1
        assert said(caplog, "is bypassed") == 0
        engine.close()
