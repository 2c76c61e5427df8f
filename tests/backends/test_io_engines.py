"""Conformance of the two I/O engines: what a batch promises, checked against raw file access."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines import page_memory, soon
from flexkv_sglang.backends.io import NOT_TRIED, IoBatch, IoEngine
from flexkv_sglang.backends.posix_io import PosixIo
from flexkv_sglang.backends.ring import Ring, depth_for
from flexkv_sglang.types import PageBuffers

PAGE = 16384
COUNT = 200  # more than a ring has entries


@pytest.fixture(params=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[IoEngine]:
    made: IoEngine = Ring(64) if request.param == "io_uring" else PosixIo(4)
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, PAGE * COUNT)
    yield fd
    os.close(fd)


def batch(fd: int, buffers: PageBuffers, slots: np.ndarray) -> IoBatch:
    return IoBatch(
        np.full(len(slots), fd, np.int32),
        slots.astype(np.uint64) * np.uint64(PAGE),
        buffers.addresses[: len(slots)],
        buffers.lengths,
    )


@pytest.mark.parametrize("buffers", [1, 2, 8])
def test_pages_written_are_the_bytes_in_the_file_and_come_back(
    engine: IoEngine, file: int, buffers: int
) -> None:
    slots = np.random.default_rng(1).permutation(COUNT)
    source, source_buffers = page_memory(COUNT, PAGE, buffers, seed=3)
    moved = engine.write(batch(file, source_buffers, slots), soon())
    assert (moved == PAGE).all()
    for page, slot in enumerate(slots.tolist()):
        assert os.pread(file, PAGE, slot * PAGE) == source[page].tobytes()
    target, target_buffers = page_memory(COUNT, PAGE, buffers)
    assert (engine.read(batch(file, target_buffers, slots), soon()) == PAGE).all()
    assert np.array_equal(source, target)


def test_every_completion_is_reported_once_and_its_bytes_are_there(
    engine: IoEngine, file: int
) -> None:
    slots = np.arange(COUNT)
    source, source_buffers = page_memory(COUNT, PAGE, seed=4)
    engine.write(batch(file, source_buffers, slots), soon())
    target, target_buffers = page_memory(COUNT, PAGE)
    seen: list[int] = []
    guard = threading.Lock()

    def on_done(positions: np.ndarray, moved: np.ndarray) -> None:
        assert (moved == PAGE).all()
        with guard:
            seen.extend(positions.tolist())
        for position in positions.tolist():
            assert np.array_equal(target[position], source[position])

    engine.read(batch(file, target_buffers, slots), soon(), on_done)
    assert sorted(seen) == list(range(COUNT))


def test_an_exception_in_on_done_is_raised_only_when_nothing_is_in_flight(
    engine: IoEngine, file: int
) -> None:
    _, buffers = page_memory(COUNT, PAGE)

    def on_done(_positions: np.ndarray, _moved: np.ndarray) -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        engine.read(batch(file, buffers, np.arange(COUNT)), soon(), on_done)
    assert (engine.read(batch(file, buffers, np.arange(COUNT)), soon()) == PAGE).all()


def test_a_deadline_in_the_past_tries_nothing_and_the_engine_lives_on(
    engine: IoEngine, file: int
) -> None:
    target, buffers = page_memory(COUNT, PAGE)
    moved = engine.read(batch(file, buffers, np.arange(COUNT)), time.monotonic() - 1)
    assert (moved == NOT_TRIED).all()
    assert (target == 0xA5).all()
    assert (engine.read(batch(file, buffers, np.arange(COUNT)), soon()) == PAGE).all()


def test_reads_at_and_across_the_end_are_short_not_errors(engine: IoEngine, file: int) -> None:
    os.ftruncate(file, PAGE * 3 + 4096)
    _, buffers = page_memory(COUNT, PAGE)
    moved = engine.read(batch(file, buffers, np.array([2, 3, 4])), soon())
    assert moved.tolist() == [PAGE, 4096, 0]


def test_a_bad_descriptor_is_a_result_not_an_exception(engine: IoEngine, file: int) -> None:
    _, buffers = page_memory(COUNT, PAGE)
    mixed = IoBatch(
        np.array([file, 10_000, file], np.int32),
        np.zeros(3, np.uint64),
        buffers.addresses[:3],
        buffers.lengths,
    )
    assert engine.read(mixed, soon()).tolist() == [PAGE, -errno.EBADF, PAGE]


def test_direct_io_from_an_unaligned_address_fails_that_page_alone(
    engine: IoEngine, tmp_path: Path
) -> None:
    path = tmp_path / "direct"
    path.write_bytes(bytes(PAGE * 2))
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    try:
        kept_alive, aligned = page_memory(2, PAGE)
        also_kept, unaligned = page_memory(2, PAGE, shift=64)
        addresses = np.stack([aligned.addresses[0], unaligned.addresses[1]])
        both = IoBatch(
            np.array([fd, fd], np.int32), np.zeros(2, np.uint64), addresses, aligned.lengths
        )
        moved = engine.read(both, soon()).tolist()
        assert moved[0] == PAGE
        assert moved[1] in (-errno.EINVAL, PAGE)  # tmpfs takes any address
        assert (kept_alive[0] == 0).all()
        assert (also_kept[1] == (0xA5 if moved[1] < 0 else 0)).all()
    finally:
        os.close(fd)


def test_an_empty_batch_is_fine_and_close_twice_too(engine: IoEngine, file: int) -> None:
    _, buffers = page_memory(1, PAGE)
    assert len(engine.read(batch(file, buffers, np.arange(0)), soon())) == 0
    engine.close()
    engine.close()
    with pytest.raises(OSError, match="closed"):
        engine.read(batch(file, buffers, np.arange(1)), soon())


def test_two_threads_share_an_engine(engine: IoEngine, file: int) -> None:
    source, source_buffers = page_memory(COUNT, PAGE, seed=5)
    engine.write(batch(file, source_buffers, np.arange(COUNT)), soon())
    failures: list[str] = []

    def read_all() -> None:
        target, buffers = page_memory(COUNT, PAGE)
        for _ in range(5):
            target[:] = 0xA5
            moved = engine.read(batch(file, buffers, np.arange(COUNT)), soon())
            if not ((moved == PAGE).all() and np.array_equal(target, source)):
                failures.append("bytes differ")

    threads = [threading.Thread(target=read_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_depth_keeps_eight_mebibytes_in_flight_within_bounds() -> None:
    assert depth_for(4096) == 128
    assert depth_for(256 << 10) == 32
    assert depth_for(4 << 20) == 8
    assert depth_for(64 << 20, limit=4) == 4
