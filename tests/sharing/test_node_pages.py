"""Pages of a node as its agent serves them: of every directory, with silence about those that have none."""

from __future__ import annotations

import ctypes
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.members.change_log import ChangeLogs
from flexkv_sglang.backends.fleet.vocabulary import PageStatus, fingerprints_of
from flexkv_sglang.backends.io.transfer import Outcome
from flexkv_sglang.backends.slots.space.places import prepare_directory
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.node_pages import NodePages, payload_bytes_of
from flexkv_sglang.types import PageBuffers, PageKey
from stores.engines import keys, open_engine, page_memory, soon

PAGE = 5000  # not a whole number of sectors
SIZE = 8 * 8192


@contextmanager
def serving(*directories: Path, logs: ChangeLogs | None = None) -> Iterator[NodePages]:
    """The namespace ``ns`` of these directories."""
    places = {directory: prepare_directory(str(directory), "auto") for directory in directories}
    log = (logs or ChangeLogs(outbox=False)).log("ns")
    with closing(NodePages(places, "ns", PAGE, log, Metrics(), depth=8)) as pages:
        pages.scan()
        yield pages


def write(directory: Path, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Pages of an owner that has ended; their bytes."""
    source, buffers = page_memory(count, PAGE, seed=1)
    with closing(open_engine(directory, PAGE, SIZE)) as engine:
        assert all(engine.put(keys(count), buffers, None, soon()))
    return source


def aligned(count: int) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[int]]:
    memory = np.zeros((count + 1) * 8192, np.uint8)
    start = -memory.ctypes.data % 4096
    return memory, [memory.ctypes.data + start + row * 8192 for row in range(count)]


def read(pages: NodePages, wanted: list[PageKey]) -> list[bytes | None]:
    """Per page its bytes, None where there is none."""
    _memory, addresses = aligned(len(wanted))
    served = pages.read(wanted, addresses, soon())
    return [
        ctypes.string_at(address, PAGE) if page.status is PageStatus.OK else None
        for page, address in zip(served, addresses, strict=True)
    ]


def expected(buffers: PageBuffers) -> list[bytes]:
    return [
        b"".join(ctypes.string_at(a, n) for a, n in zip(row, buffers.lengths.tolist(), strict=True))
        for row in buffers.addresses.tolist()
    ]


def test_bytes_of_every_directory(tmp_path: Path) -> None:
    """Three pages on a disk, three others in memory: what a lower and an upper tier may hold."""
    memory = Path("/dev/shm") / f"flexkv-test-{tmp_path.name}"
    _source, buffers = page_memory(6, PAGE, seed=1)
    try:
        for directory, rows in ((tmp_path / "disk", slice(3)), (memory, slice(3, 6))):
            directory.mkdir()
            with closing(open_engine(directory, PAGE, SIZE)) as engine:
                assert all(engine.put(keys(6)[rows], buffers.take(rows), None, soon()))
        with serving(tmp_path / "disk", memory) as pages:
            assert read(pages, keys(6)) == expected(buffers)
    finally:
        shutil.rmtree(memory, ignore_errors=True)


def test_a_directory_without_the_namespace_is_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two servers with different directories share one agent: it must not say so every second."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write(tmp_path / "a", 2)
    with serving(tmp_path / "a", tmp_path / "b") as pages:
        caplog.clear()
        for _ in range(5):
            pages.scan()
        assert [r for r in caplog.records if r.levelno >= logging.INFO] == []
        assert len(pages) == 2


def told(logs: ChangeLogs) -> list[int]:
    """Per key: do other nodes think that it is here?"""
    log = logs.find("ns")
    assert log is not None
    held = set(log.snapshot().fingerprints.tolist())
    return [fp for fp in fingerprints_of(keys(8)).tolist() if fp in held]


def test_a_slot_that_is_given_away_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second look: bytes that may be another page's are not sent."""
    _source, buffers = page_memory(4, PAGE, seed=1)
    with closing(open_engine(tmp_path, PAGE, SIZE)) as engine:
        assert all(engine.put(keys(4), buffers, None, soon()))
        with serving(tmp_path) as pages:
            move = pages._move

            def meanwhile(*arguments: Any) -> list[Outcome]:
                outcomes = move(*arguments)
                engine.clear()
                assert engine.put(keys(1, seed=9), buffers.take(slice(1)), None, soon()) == [True]
                return outcomes

            assert read(pages, keys(4)) == expected(buffers)
            monkeypatch.setattr(pages, "_move", meanwhile)
            assert read(pages, keys(4)) == [None] * 4


def test_the_directory_vanishes(tmp_path: Path) -> None:
    write(tmp_path, 3)
    logs = ChangeLogs(outbox=False)
    with serving(tmp_path, logs=logs) as pages:
        assert None not in read(pages, keys(3))
        assert told(logs) == fingerprints_of(keys(3)).tolist()
        shutil.rmtree(tmp_path / "ns")
        pages.scan()
        assert told(logs) == []
        assert read(pages, keys(3)) == [None] * 3
        assert len(pages) == 0
        assert payload_bytes_of(tmp_path / "ns") is None
        write(tmp_path, 2)
        pages.scan()
        assert None not in read(pages, keys(2))


def read_until(pages: NodePages, stop: threading.Event, begun: threading.Event) -> None:
    while not stop.is_set():
        read(pages, keys(4))
        begun.set()


def test_closed_while_it_is_read(tmp_path: Path) -> None:
    """A namespace is forgotten while the server reads from it: pages or none, no exception, nothing written later."""
    write(tmp_path, 4)
    for _ in range(20):
        with serving(tmp_path) as pages, ThreadPoolExecutor() as pool:
            stop, begun = threading.Event(), threading.Event()
            reading = pool.submit(read_until, pages, stop, begun)
            assert begun.wait(10)
            pages.close()
            memory, addresses = aligned(4)
            pages.read(keys(4), addresses, soon())
            before = memory.copy()
            stop.set()
            reading.result(10)
            assert (memory == before).all()
            assert read(pages, keys(4)) == [None] * 4


def test_a_page_that_rots_is_told_once_and_served_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 3)
    (slots,) = tmp_path.glob("ns/*.slots")
    with serving(tmp_path) as pages:
        for page in range(3):
            with slots.open("r+b") as file:
                file.seek(page * 8192 + 100)
                file.write(b"rot")
        for _ in range(3):
            pages.reported_bad([keys(3)[1]])
        assert [r.levelno for r in caplog.records].count(logging.ERROR) == 1
        assert [got is None for got in read(pages, keys(3))] == [False, True, True]


def test_a_report_about_a_good_page_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with serving(tmp_path) as pages:
        pages.reported_bad(keys(2))
        assert None not in read(pages, keys(2))
