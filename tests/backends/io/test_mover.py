"""What goes straight between memory and disk, what is copied, and that no byte beyond a page is touched."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.backends.io.mover import PageMover, direct_pages
from flexkv_sglang.backends.io.probe import make_engine, probe_directory
from flexkv_sglang.backends.io.transfer import (
    Extents,
    IoEngine,
    IoMode,
    Outcome,
    PageTransfer,
    Verify,
    accept_all,
)
from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.types import SECTOR, PageBuffers, round_up
from stores.engines import page_memory, soon

DIRECT_512 = IoMode("io_uring", True, 512)
DIRECT_4096 = IoMode("io_uring", True, 4096)
BUFFERED = IoMode("buffered", False, 1)
PAGE = 8192


@pytest.mark.parametrize(
    ("payload", "buffers", "shift", "mode", "direct"),
    [
        (65536, 1, 0, DIRECT_4096, True),
        (65536, 2, 0, DIRECT_4096, True),
        (65536, 1, 512, DIRECT_4096, True),  # memory needs 512 only
        (65536, 1, 64, DIRECT_4096, False),  # torch.empty
        (65536, 32, 0, DIRECT_4096, False),  # buffers of 2048 bytes
        (65536, 32, 0, DIRECT_512, True),
        (70272, 1, 0, DIRECT_512, False),  # MLA, page_size 1, 61 layers
        (1024, 2, 0, DIRECT_512, False),
        (70272, 3, 7, BUFFERED, True),
    ],
)
def test_a_page_is_copied_only_where_alignment_demands_it(
    payload: int, buffers: int, shift: int, mode: IoMode, direct: bool
) -> None:
    _, pages = page_memory(4, payload, buffers, shift=shift)
    assert direct_pages(pages, [mode] * 4).tolist() == [direct] * 4


def test_each_page_of_a_mixed_call_is_planned_by_itself() -> None:
    _, aligned = page_memory(2, 8192)
    _, shifted = page_memory(2, 8192, shift=64)
    mixed = PageBuffers(np.concatenate([aligned.addresses, shifted.addresses]), aligned.lengths)
    planned = direct_pages(mixed, [DIRECT_4096, BUFFERED, DIRECT_4096, BUFFERED])
    assert planned.tolist() == [True, True, False, True]


def extents_of(fd: int, offsets: np.ndarray, mode: IoMode) -> Extents:
    return np.full(len(offsets), fd, np.int32), offsets.astype(np.uint64), (mode,) * len(offsets)


def read(
    mover: PageMover, extents: Extents, buffers: PageBuffers, verify: Verify = accept_all
) -> list[Outcome]:
    return mover.move(PageTransfer(*extents, buffers, soon(), verify))


def write(
    mover: PageMover, extents: Extents, buffers: PageBuffers, verify: Verify = accept_all
) -> list[Outcome]:
    return mover.move(PageTransfer(*extents, buffers, soon(), verify, writing=True))


@pytest.fixture(params=["io_uring", "threads", "buffered"])
def mode(request: pytest.FixtureRequest, tmp_path: Path) -> IoMode:
    return probe_directory(str(tmp_path), request.param)


@pytest.fixture
def fd(tmp_path: Path, mode: IoMode) -> Iterator[int]:
    opened = os.open(tmp_path / "slots", os.O_RDWR | os.O_CREAT | mode.open_flags)
    os.posix_fallocate(opened, 0, 64 << 20)
    yield opened
    os.close(opened)


@pytest.mark.parametrize(
    ("payload", "buffers", "shift"),
    [(65536, 2, 0), (65536, 1, 64), (70272, 1, 0), (1000, 1, 3), (6144, 3, 1)],
)
def test_round_trip_touches_nothing_around_the_pages(
    fd: int, mode: IoMode, payload: int, buffers: int, shift: int
) -> None:
    count = 130
    slot_bytes = round_up(payload, SECTOR)
    extents = extents_of(fd, np.arange(count) * slot_bytes, mode)
    source, source_buffers = page_memory(count, payload, buffers, shift=shift, seed=1)
    metrics = Metrics()
    mover = PageMover(payload, metrics)
    verified: list[int] = []

    def verify(page: int, parts: list[tuple[int, int]]) -> bool:
        verified.append(page)
        return sum(length for _, length in parts) == payload

    assert set(write(mover, extents, source_buffers, verify)) == {Outcome.DONE}
    assert sorted(verified) == list(range(count))
    roomy, _ = page_memory(count + 2, payload, 1, shift=shift)
    middle = roomy[1:-1]
    starts = np.uint64(middle.ctypes.data) + np.arange(count, dtype=np.uint64)[:, None] * np.uint64(
        payload
    )
    steps = np.arange(buffers, dtype=np.uint64)[None, :] * source_buffers.lengths[0]
    targets = PageBuffers(starts + steps, source_buffers.lengths)
    assert set(read(mover, extents, targets)) == {Outcome.DONE}
    assert np.array_equal(middle, source)
    assert (roomy[0] == 0xA5).all()
    assert (roomy[-1] == 0xA5).all()
    copied = [not flag for b in (source_buffers, targets) for flag in direct_pages(b, extents[2])]
    assert metrics.snapshot().get("copied_pages", 0) == sum(copied)
    mover.close()


@pytest.mark.parametrize("mode", ["io_uring", "threads"], indirect=True)
def test_a_rejected_bounced_page_never_reaches_its_target(fd: int, mode: IoMode) -> None:
    extents = extents_of(fd, np.array([0, 4096]), mode)
    target, buffers = page_memory(2, 1000, shift=1)
    mover = PageMover(1000, Metrics())
    assert read(mover, extents, buffers, lambda page, _parts: page == 1) == [
        Outcome.REFUSED,
        Outcome.DONE,
    ]
    assert (target[0] == 0xA5).all()
    assert (target[1] == 0).all()
    mover.close()


def test_a_short_transfer_is_a_failed_page(fd: int, mode: IoMode) -> None:
    os.ftruncate(fd, 65536 + 4096)
    extents = extents_of(fd, np.array([0, 65536]), mode)
    _, buffers = page_memory(2, 65536)
    mover = PageMover(65536, Metrics())
    assert read(mover, extents, buffers) == [
        Outcome.DONE,
        Outcome.SHORT,
    ]
    mover.close()


def test_an_io_error_is_not_mistaken_for_wrong_bytes(mode: IoMode, tmp_path: Path) -> None:
    write_only = os.open(tmp_path / "write-only", os.O_WRONLY | os.O_CREAT | mode.open_flags)
    os.posix_fallocate(write_only, 0, 65536)
    extents = extents_of(write_only, np.zeros(1), mode)
    _kept, buffers = page_memory(1, 65536)
    mover = PageMover(65536, Metrics())
    asked: list[int] = []
    outcome = read(mover, extents, buffers, lambda page, _parts: bool(asked.append(page)))
    assert (outcome, asked) == ([Outcome.FAILED], [])
    mover.close()
    os.close(write_only)


@pytest.mark.parametrize(("payload", "shift"), [(1 << 20, 0), (300_000, 64)])
@pytest.mark.parametrize("mode", ["io_uring", "threads"], indirect=True)
def test_announced_memory_changes_nothing_but_the_operations(
    fd: int, mode: IoMode, payload: int, shift: int
) -> None:
    """Straight (two buffers of 512 KiB) and through the slab, which is announced by itself."""
    count, slot_bytes = 12, round_up(payload, SECTOR)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(slot_bytes)
    extents = extents_of(fd, offsets, mode)
    source, sources = page_memory(count, payload, 2, shift=shift, seed=11)
    target, targets = page_memory(count, payload, 2, shift=shift)
    memory = [(array.ctypes.data, array.nbytes) for array in (source, target)]
    announced, plain = PageMover(payload, Metrics()), PageMover(payload, Metrics())
    for address, byte_count in memory:
        announced.register_memory(address, byte_count)
    done = [Outcome.DONE] * count
    assert write(announced, extents, sources) == read(announced, extents, targets) == done
    for direction in announced._directions.values():
        for engine in direction._engines.values():
            assert getattr(engine, "_pinning", None) is None or engine._pinning.wait_idle(10)
    begun = announced.counts()
    assert write(announced, extents, sources) == done
    for mover in (plain, announced):
        target[:] = 0xA5
        assert read(mover, extents, targets) == done
        assert np.array_equal(target, source)
    counts = announced.counts()
    if mode.engine == "io_uring" and counts["read_pinned_bytes"]:
        for way in ("read", "write"):
            made = counts[f"{way}_operations"] - begun[f"{way}_operations"]
            fixed = counts[f"{way}_fixed_operations"] - begun.get(f"{way}_fixed_operations", 0)
            assert fixed == made > 0
    announced.close()
    plain.close()


def test_adjacent_pages_are_verified_one_by_one(fd: int, mode: IoMode) -> None:
    """Sixteen pages in one operation; two of them are refused, and only they."""
    count = 16
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(SECTOR)
    extents = extents_of(fd, offsets, mode)
    source, sources = page_memory(count, SECTOR, seed=12)
    target, targets = page_memory(count, SECTOR)
    mover = PageMover(SECTOR, Metrics())
    write(mover, extents, sources)

    def verify(page: int, parts: list[tuple[int, int]]) -> bool:
        assert parts == [(int(targets.addresses[page, 0]), SECTOR)]
        return page not in (3, 9) and np.array_equal(target[page], source[page])

    outcomes = read(mover, extents, targets, verify)
    assert [page for page, outcome in enumerate(outcomes) if outcome is Outcome.REFUSED] == [3, 9]
    assert outcomes.count(Outcome.DONE) == count - 2
    counts = mover.counts()
    assert counts["read_operations"] == counts["write_operations"] == 1
    mover.close()


def test_pages_not_begun_in_time_are_late_and_not_verified(fd: int, mode: IoMode) -> None:
    offsets = np.array([0, 65536], np.uint64)
    extents = extents_of(fd, offsets, mode)
    _kept, buffers = page_memory(2, 65536)
    mover = PageMover(65536, Metrics())
    asked: list[int] = []
    for writing in (False, True):
        late = PageTransfer(
            *extents,
            buffers,
            time.monotonic() - 1,
            lambda page, _parts: bool(asked.append(page)),
            writing=writing,
        )
        assert mover.move(late) == [Outcome.LATE] * 2
    assert not asked
    mover.close()


def test_nothing_moves_after_close_also_in_a_direction_that_was_never_used(
    fd: int, mode: IoMode
) -> None:
    """A call that is late knows numbers of files that are closed by now, and may be another's."""
    extents = extents_of(fd, np.zeros(1), mode)
    _source, sources = page_memory(1, SECTOR, seed=13)
    target, targets = page_memory(1, SECTOR)
    mover = PageMover(SECTOR, Metrics())
    assert write(mover, extents, sources) == [Outcome.DONE]
    assert mover.close()
    for move, buffers in ((write, sources), (read, targets)):
        with pytest.raises(TierUnavailableError):
            move(mover, extents, buffers)
    mover.abandon()
    with pytest.raises(TierUnavailableError):
        read(mover, extents, targets)
    assert (target == 0xA5).all()


@pytest.mark.parametrize("shift", [0, 64])
def test_the_first_call_makes_nothing_that_was_prepared(fd: int, mode: IoMode, shift: int) -> None:
    made: list[str] = []

    def make(kind: str, traffic: Any = None) -> IoEngine:
        made.append(kind)
        return make_engine(kind, traffic)

    mover = PageMover(PAGE, Metrics(), make, modes=[mode])
    _, pages = page_memory(4, PAGE, shift=shift, seed=1)
    mover.prepare(pages.take([0]))
    slabs = [direction._slab for direction in mover._directions.values()]
    copied = mode.o_direct and bool(shift)
    assert made == [mode.engine] * 2
    assert all((slab is not None) is copied for slab in slabs)
    extents = extents_of(fd, np.arange(4, dtype=np.uint64) * np.uint64(PAGE), mode)
    assert write(mover, extents, pages) == read(mover, extents, pages) == [Outcome.DONE] * 4
    assert made == [mode.engine] * 2
    assert [direction._slab for direction in mover._directions.values()] == slabs
    mover.close()


def test_what_cannot_be_prepared_is_left_to_the_first_call(fd: int, mode: IoMode) -> None:
    """As a process that has no descriptor left at the moment."""
    refuse = [True]

    def make(kind: str, traffic: Any = None) -> IoEngine:
        if refuse[0]:
            raise OSError(errno.EMFILE, "planted")
        return make_engine(kind, traffic)

    mover = PageMover(PAGE, Metrics(), make, modes=[mode])
    _, pages = page_memory(4, PAGE, seed=1)
    mover.prepare(pages.take([0]))
    extents = extents_of(fd, np.arange(4, dtype=np.uint64) * np.uint64(PAGE), mode)
    with pytest.raises(OSError, match="planted"):
        write(mover, extents, pages)
    refuse[0] = False
    assert write(mover, extents, pages) == [Outcome.DONE] * 4
    mover.close()
