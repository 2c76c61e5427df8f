"""Conformance of the two I/O engines: what a batch promises, checked against raw file access."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.io.operations import runs
from flexkv_sglang.backends.io.posix_io import PosixIo
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.ring import Ring, depth_for
from flexkv_sglang.backends.io.transfer import NOT_TRIED, IoEngine, Outcome, PageTransfer
from flexkv_sglang.types import PageBuffers
from stores.engines import page_memory, soon, wait_until

PAGE = 16384
COUNT = 200  # more than a ring has entries


class Watched(PageTransfer):
    """A transfer that remembers which results were reported, and what ``look`` says of each page."""

    def __init__(self, transfer: PageTransfer, look: Callable[[int], bool]) -> None:
        super().__init__(
            transfer.fds,
            transfer.offsets,
            (),
            transfer.buffers,
            transfer.deadline,
            lambda page, _buffers: self.verified(page),
        )
        self.seen: list[int] = []
        self.right = True
        self.looked: list[int] = []
        self._look = look

    def verified(self, page: int) -> bool:
        self.looked.append(page)
        self.right &= self._look(page)
        return True

    def on_complete(self, positions: np.ndarray, moved: np.ndarray) -> None:
        self.right &= bool((moved == PAGE).all())
        self.seen.extend(positions.tolist())  # atomic
        PageTransfer.on_complete(self, positions, moved)


def read(engine: IoEngine, transfer: PageTransfer) -> np.ndarray:
    """Bytes moved or -errno per page."""
    transfer = dataclasses.replace(transfer)  # its results are for one call
    engine.move(transfer)
    return transfer.moved


def write(engine: IoEngine, transfer: PageTransfer) -> np.ndarray:
    """Bytes moved or -errno per page."""
    transfer = dataclasses.replace(transfer, writing=True)
    engine.move(transfer)
    return transfer.moved


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


def batch(
    fd: int | np.ndarray, buffers: PageBuffers, slots: np.ndarray, deadline: float | None = None
) -> PageTransfer:
    """Pages in these slots of ``fd``, one file or one per page; ``buffers`` may be of more pages."""
    return PageTransfer(
        np.full(len(slots), fd, np.int32),
        slots.astype(np.uint64) * np.uint64(buffers.payload_bytes),
        (),
        buffers.take(slice(len(slots))),
        soon() if deadline is None else deadline,
    )


@pytest.mark.parametrize("buffers", [1, 2, 8])
def test_pages_written_are_the_bytes_in_the_file_and_come_back(
    engine: IoEngine, file: int, buffers: int
) -> None:
    slots = np.random.default_rng(1).permutation(COUNT)
    source, source_buffers = page_memory(COUNT, PAGE, buffers, seed=3)
    moved = write(engine, batch(file, source_buffers, slots))
    assert (moved == PAGE).all()
    for page, slot in enumerate(slots.tolist()):
        assert os.pread(file, PAGE, slot * PAGE) == source[page].tobytes()
    target, target_buffers = page_memory(COUNT, PAGE, buffers)
    assert (read(engine, batch(file, target_buffers, slots)) == PAGE).all()
    assert np.array_equal(source, target)


def test_every_completion_is_reported_once_and_its_bytes_are_there(
    engine: IoEngine, file: int
) -> None:
    slots = np.arange(COUNT)
    source, source_buffers = page_memory(COUNT, PAGE, seed=4)
    write(engine, batch(file, source_buffers, slots))
    target, target_buffers = page_memory(COUNT, PAGE)
    watched = Watched(
        batch(file, target_buffers, slots), lambda p: np.array_equal(target[p], source[p])
    )
    engine.move(watched)
    watched.finish()
    assert sorted(watched.seen) == sorted(watched.looked) == list(range(COUNT))
    assert watched.right
    assert (watched.outcomes == Outcome.DONE).all()


@pytest.mark.parametrize("where", ["on_complete", "run_pending"])
def test_an_exception_of_the_caller_is_raised_only_when_nothing_is_in_flight(
    engine: IoEngine, file: int, where: str
) -> None:
    _, buffers = page_memory(COUNT, PAGE)

    def fail(*_args: object) -> bool:
        raise RuntimeError("planted")

    watched = Watched(batch(file, buffers, np.arange(COUNT)), lambda _p: True)
    setattr(watched, where, fail)
    with pytest.raises(RuntimeError, match="planted"):
        engine.move(watched)
    assert (read(engine, batch(file, buffers, np.arange(COUNT))) == PAGE).all()


def test_a_deadline_in_the_past_tries_nothing_and_the_engine_lives_on(
    engine: IoEngine, file: int
) -> None:
    target, buffers = page_memory(COUNT, PAGE)
    moved = read(engine, batch(file, buffers, np.arange(COUNT), time.monotonic() - 1))
    assert (moved == NOT_TRIED).all()
    assert (target == 0xA5).all()
    assert (read(engine, batch(file, buffers, np.arange(COUNT))) == PAGE).all()


def test_reads_at_and_across_the_end_are_short_not_errors(engine: IoEngine, file: int) -> None:
    os.ftruncate(file, PAGE * 3 + 4096)
    _, buffers = page_memory(COUNT, PAGE)
    moved = read(engine, batch(file, buffers, np.array([2, 3, 4])))
    assert moved.tolist() == [PAGE, 4096, 0]


def test_a_bad_descriptor_is_a_result_not_an_exception(engine: IoEngine, file: int) -> None:
    _, buffers = page_memory(COUNT, PAGE)
    mixed = batch(np.array([file, 10_000, file]), buffers, np.zeros(3))
    assert read(engine, mixed).tolist() == [PAGE, -errno.EBADF, PAGE]


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
        both = batch(fd, PageBuffers(addresses, aligned.lengths), np.zeros(2))
        moved = read(engine, both).tolist()
        assert moved[0] == PAGE
        assert moved[1] in (-errno.EINVAL, PAGE)  # tmpfs takes any address
        assert (kept_alive[0] == 0).all()
        assert (also_kept[1] == (0xA5 if moved[1] < 0 else 0)).all()
    finally:
        os.close(fd)


def test_an_empty_batch_is_fine_and_close_twice_too(engine: IoEngine, file: int) -> None:
    _, buffers = page_memory(1, PAGE)
    assert len(read(engine, batch(file, buffers, np.arange(0)))) == 0
    engine.close()
    engine.close()
    with pytest.raises(OSError, match="closed"):
        read(engine, batch(file, buffers, np.arange(1)))


def test_two_threads_share_an_engine(engine: IoEngine, file: int) -> None:
    source, source_buffers = page_memory(COUNT, PAGE, seed=5)
    write(engine, batch(file, source_buffers, np.arange(COUNT)))
    failures: list[str] = []

    def read_all() -> None:
        target, buffers = page_memory(COUNT, PAGE)
        for _ in range(5):
            target[:] = 0xA5
            moved = read(engine, batch(file, buffers, np.arange(COUNT)))
            if not ((moved == PAGE).all() and np.array_equal(target, source)):
                failures.append("bytes differ")

    threads = [threading.Thread(target=read_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_depth_keeps_32_mebibytes_in_flight_within_bounds() -> None:
    assert depth_for(4096) == 128
    assert depth_for(1 << 20) == 32
    assert depth_for(8 << 20) == 8
    assert depth_for(64 << 20, limit=4) == 4


@pytest.mark.parametrize("engine", ["io_uring", "threads"], indirect=True)
def test_adjacent_pages_need_one_operation_and_keep_their_own_results(
    engine: IoEngine, file: int, tmp_path: Path
) -> None:
    """Two files, both with a hole in their numbering; the second ends inside a run of joined pages."""
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(other, 0, PAGE * 12 + 5000)
    slots = np.array([*range(20), *range(30, 40), *range(16)])
    source, buffers = page_memory(len(slots), PAGE, 2, seed=6)
    fds = np.array([file] * 30 + [other] * 16, np.int32)
    mixed = batch(fds, buffers, slots)
    before = engine.counts["operations"]
    assert (write(engine, mixed) == PAGE).all()
    assert engine.counts["operations"] - before == 3
    os.ftruncate(other, PAGE * 12 + 5000)
    target, targets = page_memory(len(slots), PAGE, 2)
    wanted = batch(fds, targets, slots)
    moved = read(engine, wanted)
    assert moved.tolist() == [PAGE] * 42 + [5000, 0, 0, 0]
    assert np.array_equal(target[:42], source[:42])
    assert np.array_equal(target[42, :5000], source[42, :5000])
    assert (target[43:] == 0xA5).all()
    os.close(other)


def test_a_bad_page_in_a_joined_operation_spoils_only_itself(engine: IoEngine, file: int) -> None:
    source, buffers = page_memory(8, PAGE, seed=7)
    assert (write(engine, batch(file, buffers, np.arange(8))) == PAGE).all()
    target, targets = page_memory(8, PAGE)
    addresses = targets.addresses.copy()
    addresses[3] = 8  # not mapped
    spoiled = batch(file, PageBuffers(addresses, targets.lengths), np.arange(8))
    before = engine.counts["operations"]
    moved = read(engine, spoiled).tolist()
    assert engine.counts["operations"] - before == 1
    assert moved == [PAGE] * 3 + [-errno.EFAULT] + [PAGE] * 4
    keep = [0, 1, 2, 4, 5, 6, 7]
    assert np.array_equal(target[keep], source[keep])


def pinned_by_now(ring: Ring) -> int:
    """Bytes that are pinned once all that was asked for is."""
    assert ring._pinning is not None
    assert ring._pinning.wait_idle(10)
    return ring.counts["pinned_bytes"]


@pytest.mark.parametrize("buffers", [1, 2])
def test_pinned_and_plain_operations_move_the_same_bytes(file: int, buffers: int) -> None:
    page, count = 512 << 10, 6
    source, source_buffers = page_memory(count, page, buffers, seed=8)
    target, target_buffers = page_memory(count, page, buffers)
    os.posix_fallocate(file, 0, page * count)
    pinned, plain = Ring(), Ring()
    pinned.register_memory(source.ctypes.data, source.nbytes)
    out = batch(file, source_buffers, np.arange(count))
    back = batch(file, target_buffers, np.arange(count))
    assert (write(pinned, out) == page).all()
    plainly = pinned.counts["operations"]
    assert pinned.counts["fixed_operations"] == 0, "no call waits for pinning"
    if not pinned_by_now(pinned):
        pytest.skip("this kernel or its memlock limit refuses to pin")
    assert (write(pinned, out) == page).all()
    fixed = count * buffers
    assert pinned.counts["fixed_operations"] == pinned.counts["operations"] - plainly == fixed
    assert (read(plain, back) == page).all()
    assert plain.counts["fixed_operations"] == 0
    assert np.array_equal(target, source)
    target[:] = 0
    pinned.register_memory(target.ctypes.data, target.nbytes)  # a second piece of memory
    assert (read(pinned, back) == page).all()
    assert pinned_by_now(pinned)
    assert (read(pinned, back) == page).all()
    assert pinned.counts["fixed_operations"] == 2 * count * buffers
    assert np.array_equal(target, source)
    os.ftruncate(file, page * 2 + (300 << 10))
    short = [page, page, 300 << 10, 0, 0, 0]
    assert read(pinned, back).tolist() == short
    assert read(plain, back).tolist() == short
    assert pinned.close()
    assert plain.close()


def test_where_pinning_is_refused_everything_still_works(tmp_path: Path) -> None:
    """As another user with little memlock: the plain operations do it."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _REFUSED, str(tmp_path / "pages")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["0", "0", "True"], done.stderr


_REFUSED = """
import mmap, os, resource, sys, time
import numpy as np
from flexkv_sglang.backends.io.ring import Ring
from flexkv_sglang.backends.io.transfer import PageTransfer
from flexkv_sglang.types import PageBuffers

fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.getuid() == 0:
    os.setuid(65534)
array = np.frombuffer(mmap.mmap(-1, 8 << 20), np.uint8)
array[: 4 << 20] = 7
ring = Ring()
ring.register_memory(array.ctypes.data, len(array))
half = np.uint64(4 << 20)
for writing, start in ((True, 0), (False, 4 << 20)):
    buffers = PageBuffers(
        np.array([[array.ctypes.data + start]], np.uint64), np.array([half], np.uint64)
    )
    transfer = PageTransfer(
        np.array([fd], np.int32), np.zeros(1, np.uint64), (), buffers,
        time.monotonic() + 20, writing=writing,
    )
    ring.move(transfer)
    assert transfer.moved[0] == 4 << 20
    ring._pinning.wait_idle(10)
print(ring.counts["pinned_bytes"], ring.counts["fixed_operations"], bool((array == 7).all()))
"""


def test_writes_stay_small_while_a_read_is_under_way_and_shortly_after(file: int) -> None:
    traffic = ReadPriority()
    with traffic.reading():
        assert traffic.write_depth(32, 1 << 20) == 4
        assert traffic.write_depth(32, 4 << 20) == 2
        assert traffic.write_depth(32, 64 << 20) == 1
        assert traffic.write_depth(2, 4096) == 2
    assert traffic.write_depth(32, 1 << 20) == 4
    assert dict(traffic.counts) == {"small_windows": 5}
    wait_until(lambda: traffic.write_depth(32, 1 << 20) == 32)
    assert traffic.counts["full_windows"] == 1


@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_a_write_beside_a_read_is_throttled_but_gets_done(file: int, kind: str) -> None:
    traffic = ReadPriority()
    engine: IoEngine = Ring(64, traffic) if kind == "io_uring" else PosixIo(8, traffic=traffic)
    slots = np.arange(0, COUNT, 2)  # not adjacent
    source, buffers = page_memory(len(slots), PAGE, seed=9)
    with traffic.reading():
        assert (write(engine, batch(file, buffers, slots)) == PAGE).all()
    assert traffic.counts["full_windows"] == 0
    assert traffic.counts["small_windows"] >= len(slots) // 8  # a ring of 64 would need two windows
    for page, slot in enumerate(slots.tolist()):
        assert os.pread(file, PAGE, slot * PAGE) == source[page].tobytes()
    engine.close()


def test_pages_are_joined_up_to_a_mebibyte_and_the_limit_of_buffers() -> None:
    fds = np.zeros(600, np.int32)
    for page, parts, joined in ((PAGE, 1, 64), (4096, 8, 128), (4096, 1, 256), (1 << 20, 1, 1)):
        lengths = np.full(parts, page // parts, np.uint64)
        addresses = np.zeros((600, parts), np.uint64)
        offsets = np.arange(600, dtype=np.uint64) * np.uint64(page)
        buffers = PageBuffers(addresses, lengths)
        borders = runs(PageTransfer(fds, offsets, (), buffers, 0.0))
        assert np.diff(borders).max() == joined
        assert (borders[0], borders[-1]) == (0, 600)
        assert len(runs(PageTransfer(fds, offsets[::-1].copy(), (), buffers, 0.0))) == 601
