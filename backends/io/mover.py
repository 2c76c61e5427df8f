"""PageMover: moves pages between memory and media, straight where alignment allows, else through a slab.

Knows no keys, no index and takes no lock of the engine: pins and WRITING slots protect the bytes while
they move. Invariant: when a call returns, nothing reads or writes the caller's memory any more, and a
page is DONE only if every byte of it moved and, for a read, ``inspect`` accepted it.

Threads: any. Reads and writes have an engine and a slab each, so a long write does not hold up a read.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io.batch import IOV_MAX, NOT_TRIED, IoBatch
from flexkv_sglang.backends.io.direction import Direction, MakeEngine, Slab
from flexkv_sglang.backends.io.extents import Extents
from flexkv_sglang.backends.io.probe import IoMode, make_engine
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.types import MEMORY_ALIGN, SECTOR, U64, BoolArray, PageBuffers, round_up

Inspect = Callable[[int, list[tuple[int, int]]], bool]
"""(page position, its buffers as (address, bytes)) -> keep it? Called while other pages move, from any thread."""

_WORK_BYTES = 1 << 20  # looked at in one go between two looks at the completion queue


class Outcome(IntEnum):
    """What became of one page."""

    FAILED = 0  # an I/O error: the page may be fine next time
    SHORT = 1  # the medium holds less than a page there
    REFUSED = 2  # ``inspect`` said no
    DONE = 3  # every byte moved and accepted
    LATE = 4  # not begun before the deadline


_OUTCOMES = tuple(Outcome)  # by value: several times quicker than Outcome(value)


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Which pages of a call go straight between memory and disk (True) and which are copied once."""

    direct: BoolArray

    @property
    def copied(self) -> int:
        """Pages that go through the bounce slab."""
        return int(len(self.direct) - self.direct.sum())


def plan_move(buffers: PageBuffers, modes: Sequence[IoMode]) -> MovePlan:
    """A page is moved without a copy if the medium is opened through the page cache, or if all its
    addresses, all its buffer lengths and its total length are aligned as the medium asks."""
    addresses_fit = (buffers.addresses % np.uint64(MEMORY_ALIGN) == 0).all(axis=1)
    total_fits = buffers.payload_bytes % SECTOR == 0
    few = len(buffers.lengths) <= IOV_MAX
    direct = np.zeros(len(buffers), np.bool_)
    for mode, rows in by_mode(modes):
        if not mode.o_direct:
            direct[rows] = few
        elif few and total_fits and not (buffers.lengths % np.uint64(mode.segment_align)).any():
            direct[rows] = addresses_fit[rows]
    return MovePlan(direct)


def by_mode(modes: Sequence[IoMode]) -> list[tuple[IoMode, npt.NDArray[np.intp]]]:
    """Each mode and the positions it has. Nearly always there is one."""
    if not modes or modes.count(modes[0]) == len(modes):
        return [(mode, np.arange(len(modes))) for mode in modes[:1]]
    return [
        (mode, np.array([i for i, other in enumerate(modes) if other == mode], np.intp))
        for mode in dict.fromkeys(modes)
    ]


@dataclass(frozen=True, slots=True)
class _Job:
    """One call: what moves where, and what became of each page (``Outcome`` ``[n]``)."""

    direction: str
    extents: Extents
    buffers: PageBuffers
    deadline: float
    inspect: Inspect
    outcomes: npt.NDArray[np.int8]


class _Inspection:
    """``io.Progress`` of one batch: inspects pages while others move, and writes the outcomes.

    A page that is read is inspected after it has landed; one that is written at any time, also before its
    bytes are taken, because its owner does not change it before the call returns. Any thread.
    """

    def __init__(
        self, job: _Job, pages: npt.NDArray[np.intp], batch: IoBatch, parts: _Parts
    ) -> None:
        """``pages``: the job's pages that ``batch`` moves; ``parts``: their memory, as inspected."""
        self._job = job
        self._pages = pages
        self._page_numbers: list[int] = pages.tolist()
        self._parts = parts
        self._wanted = batch.page_bytes
        self._step = max(1, _WORK_BYTES // self._wanted)
        self._reading = job.direction == "read"
        # deque: append and popleft are atomic. Positions whose turn it is.
        self._ready = deque[int]() if self._reading else deque(range(len(pages)))

    def landed(self, positions: npt.NDArray[np.intp], moved: npt.NDArray[np.int64]) -> None:
        good = moved == self._wanted
        if not good.all():
            bad = np.where(moved < 0, Outcome.FAILED, Outcome.SHORT)
            bad = np.where(moved == NOT_TRIED, Outcome.LATE, bad)
            self._job.outcomes[self._pages[positions[~good]]] = bad[~good]
            positions = positions[good]
        if self._reading:
            self._ready.extend(positions.tolist())
        else:
            self._job.outcomes[self._pages[positions]] = Outcome.DONE

    def work(self) -> bool:
        for _ in range(self._step):
            try:
                position = self._ready.popleft()
            except IndexError:
                return False
            page = self._page_numbers[position]
            kept = self._job.inspect(page, self._parts.of(position))
            if self._reading:
                if kept:
                    self._parts.accept(position)
                self._job.outcomes[page] = Outcome.DONE if kept else Outcome.REFUSED
        return True

    def finish(self) -> None:
        """Inspect what is left, once nothing is in flight; nothing that did not move."""
        if not self._reading:
            moved = self._job.outcomes[self._pages] == Outcome.DONE
            self._ready = deque(position for position in self._ready if moved[position])
        while self.work():
            pass


class PageMover:
    """Moves pages of one payload size. ``make``: an I/O engine of a kind (tests put faults around it)."""

    def __init__(
        self, payload_bytes: int, metrics: Metrics, make: MakeEngine = make_engine
    ) -> None:
        self._payload_bytes = payload_bytes
        self._metrics = metrics
        self._row_bytes = round_up(payload_bytes, SECTOR)
        self._traffic = ReadPriority()
        self._lanes = {
            direction: Direction(self._row_bytes, self._traffic, make)
            for direction in ("read", "write")
        }

    def register_memory(self, address: int, byte_count: int) -> None:
        """Announce memory that many calls will use: the kernel may pin it, piece by piece as it is used.

        It must stay mapped at this address until ``close``. Where pinning is refused nothing changes.
        """
        for lane in self._lanes.values():
            lane.register_memory(address, byte_count)

    def counts(self) -> dict[str, int]:
        """ "read_operations", "write_fixed_operations", ...: see ``Ring``, ``PosixIo`` and ``ReadPriority``."""
        found = {
            f"{direction}_{name}": value
            for direction, lane in self._lanes.items()
            for name, value in lane.counts().items()
        }
        return found | dict(self._traffic.counts)

    def read(
        self, extents: Extents, buffers: PageBuffers, deadline: float, inspect: Inspect
    ) -> list[Outcome]:
        """Media to memory. A bounced page reaches its target only after ``inspect`` accepted it.

        ``deadline`` is ``time.monotonic()`` seconds; pages not begun by then are LATE.
        """
        return self._move("read", extents, buffers, deadline, inspect)

    def write(
        self, extents: Extents, buffers: PageBuffers, deadline: float, inspect: Inspect
    ) -> list[Outcome]:
        """Memory to media. ``inspect`` sees the page's source buffers, which nobody may change meanwhile."""
        return self._move("write", extents, buffers, deadline, inspect)

    def abandon(self) -> None:
        """A disk hangs: what is in flight keeps its engines until it ends; other calls get new ones."""
        self._traffic = ReadPriority()  # a read that hangs must not hold back writes for ever
        for lane in self._lanes.values():
            lane.abandon(self._traffic)

    def close(self) -> bool:
        """Wait a bounded time for running transfers and release the engines. False: some still run."""
        ended = [lane.close() for lane in self._lanes.values()]
        return all(ended)

    def _move(
        self,
        direction: str,
        extents: Extents,
        buffers: PageBuffers,
        deadline: float,
        inspect: Inspect,
    ) -> list[Outcome]:
        assert len(extents.offsets) == len(buffers), (len(extents.offsets), len(buffers))
        assert buffers.payload_bytes == self._payload_bytes, (
            buffers.payload_bytes,
            self._payload_bytes,
        )
        job = _Job(
            direction,
            extents,
            buffers,
            deadline,
            inspect,
            np.full(len(buffers), Outcome.LATE, np.int8),
        )
        plan = plan_move(buffers, extents.modes)
        self._metrics.count("copied_pages", plan.copied)
        for mode, of_mode in by_mode(extents.modes):
            rows = of_mode[plan.direct[of_mode]]
            if len(rows):
                self._direct(job, mode.engine, rows)
            rows = of_mode[~plan.direct[of_mode]]
            if len(rows):
                self._bounced(job, mode.engine, rows)
        return [_OUTCOMES[value] for value in job.outcomes.tolist()]

    def _direct(self, job: _Job, kind: str, rows: npt.NDArray[np.intp]) -> None:
        """Between disk and the caller's memory."""
        batch = IoBatch(
            job.extents.fds[rows],
            job.extents.offsets[rows],
            job.buffers.addresses[rows],
            job.buffers.lengths,
        )
        self._run(job, kind, rows, batch, _Parts(batch.addresses, job.buffers.lengths))

    def _bounced(self, job: _Job, kind: str, rows: npt.NDArray[np.intp]) -> None:
        """Through the slab, as many pages at a time as it has rows."""
        slab = self._lanes[job.direction].slab()
        with slab.lock:
            for start in range(0, len(rows), slab.rows):
                self._bounce_group(job, kind, slab, rows[start : start + slab.rows])

    def _bounce_group(self, job: _Job, kind: str, slab: Slab, rows: npt.NDArray[np.intp]) -> None:
        staged = slab.addresses[: len(rows), None]
        batch = IoBatch(
            job.extents.fds[rows],
            job.extents.offsets[rows],
            staged,
            np.array([self._row_bytes], np.uint64),
        )
        parts = _StagedParts(staged, job.buffers.take(rows))
        if job.direction == "write":
            parts.gather()
        self._run(job, kind, rows, batch, parts)

    def _run(
        self, job: _Job, kind: str, rows: npt.NDArray[np.intp], batch: IoBatch, parts: _Parts
    ) -> None:
        engine = self._lanes[job.direction].engine(kind)
        move = engine.read if job.direction == "read" else engine.write
        inspection = _Inspection(job, rows, batch, parts)
        move(batch, job.deadline, inspection)
        inspection.finish()


class _Parts:
    """Memory of the pages of one batch, as ``inspect`` is shown it."""

    def __init__(self, addresses: U64, lengths: U64) -> None:
        self._addresses: list[list[int]] = addresses.tolist()
        self._lengths: list[int] = lengths.tolist()

    def of(self, position: int) -> list[tuple[int, int]]:
        """Buffers of one page: (address, bytes)."""
        return list(zip(self._addresses[position], self._lengths, strict=True))

    def accept(self, position: int) -> None:
        """A page that was read is right."""


class _StagedParts(_Parts):
    """Rows of the slab (uint64 ``[n, 1]``) that stand for the caller's ``targets``, cut as those are:
    what is sampled of a buffer must not depend on the way it took."""

    def __init__(self, rows: U64, targets: PageBuffers) -> None:
        starts = np.concatenate([[0], np.cumsum(targets.lengths)[:-1]]).astype(np.uint64)
        super().__init__(rows + starts, targets.lengths)
        self._targets = _Parts(targets.addresses, targets.lengths)

    def gather(self) -> None:
        """Caller's memory to slab, before a write."""
        for position in range(len(self._addresses)):
            staged = self._addresses[position][0]
            for address, length in self._targets.of(position):
                ctypes.memmove(staged, address, length)
                staged += length

    def accept(self, position: int) -> None:
        staged = self._addresses[position][0]
        for address, length in self._targets.of(position):
            ctypes.memmove(address, staged, length)
            staged += length
