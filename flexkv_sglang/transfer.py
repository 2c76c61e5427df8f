"""PageMover: moves pages between memory and media, straight where alignment allows, else through a slab.

Knows no keys, no index and takes no lock of the engine: pins and WRITING slots protect the bytes while
they move. Invariant: when a call returns, nothing reads or writes the caller's memory any more, and a
page is DONE only if every byte of it moved and ``inspect`` accepted it.

Threads: any. Reads and writes have an engine and a slab each, so a long write does not hold up a read.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io import NOT_TRIED, IoBatch, IoEngine, OnDone
from flexkv_sglang.backends.probe import IoMode, make_engine
from flexkv_sglang.backends.slot_file import Extents
from flexkv_sglang.metrics import Metrics
from flexkv_sglang.types import MEMORY_ALIGN, SECTOR, BoolArray, PageBuffers, round_up

Inspect = Callable[[int, list[tuple[int, int]]], bool]
"""(page position, its buffers as (address, bytes)) -> keep it? Called off the I/O path, from any thread."""

_SLAB_BYTES = 32 << 20


class Outcome(IntEnum):
    """What became of one page."""

    FAILED = 0  # an I/O error: the page may be fine next time
    SHORT = 1  # the medium holds less than a page there
    REFUSED = 2  # ``inspect`` said no
    DONE = 3  # every byte moved and accepted
    LATE = 4  # not begun before the deadline


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
    needs = np.array([mode.segment_align if mode.o_direct else 0 for mode in modes], np.uint64)
    addresses_fit = (buffers.addresses % np.uint64(MEMORY_ALIGN) == 0).all(axis=1)
    total_fits = buffers.payload_bytes % SECTOR == 0
    direct = np.zeros(len(buffers), np.bool_)
    for need in np.unique(needs).tolist():
        rows = needs == need
        if need == 0:
            direct[rows] = True
        elif total_fits and not (buffers.lengths % np.uint64(need)).any():
            direct[rows] = addresses_fit[rows]
    return MovePlan(direct)


class _Slab:
    """Page-aligned memory for bounced pages, made at first use. Shared mapping: safe across a fork."""

    def __init__(self, row_bytes: int) -> None:
        self.lock = threading.Lock()  # held while the bounced pages of one call use it
        self.rows = max(1, _SLAB_BYTES // row_bytes)
        self._memory = mmap.mmap(-1, self.rows * row_bytes)
        base = np.frombuffer(self._memory, np.uint8).ctypes.data
        self.addresses = np.uint64(base) + np.arange(self.rows, dtype=np.uint64) * np.uint64(
            row_bytes
        )


class _Lane:
    """One direction: its engines (one per kind), and one slab."""

    def __init__(self, row_bytes: int, make: Callable[[str], IoEngine]) -> None:
        self._row_bytes = row_bytes
        self._make = make
        self._guard = threading.Lock()  # guards making engines and the slab
        self._engines: dict[str, IoEngine] = {}
        self._abandoned: list[IoEngine] = []  # hold transfers that do not end
        self._slab: _Slab | None = None

    def engine(self, kind: str) -> IoEngine:
        with self._guard:
            if kind not in self._engines:
                self._engines[kind] = self._make(kind)
            return self._engines[kind]

    def slab(self) -> _Slab:
        with self._guard:
            if self._slab is None:
                self._slab = _Slab(self._row_bytes)
            return self._slab

    def abandon(self) -> None:
        """Leave engines and slab to calls that hang in them; the next call gets new ones."""
        with self._guard:
            self._abandoned += self._engines.values()
            self._engines = {}
            self._slab = None

    def close(self) -> bool:
        with self._guard:
            engines = [*self._engines.values(), *self._abandoned]
        ended = [engine.close() for engine in engines]  # each, also after a False
        return all(ended)


@dataclass(frozen=True, slots=True)
class _Job:
    """One call: what moves where, and what became of each page (``Outcome`` ``[n]``)."""

    direction: str
    extents: Extents
    buffers: PageBuffers
    deadline: float
    inspect: Inspect
    outcomes: npt.NDArray[np.int8]


class PageMover:
    """Moves pages of one payload size. ``make``: an I/O engine of a kind (tests put faults around it)."""

    def __init__(
        self,
        payload_bytes: int,
        metrics: Metrics,
        make: Callable[[str], IoEngine] = make_engine,
    ) -> None:
        self._payload_bytes = payload_bytes
        self._metrics = metrics
        row_bytes = round_up(payload_bytes, SECTOR)
        self._lanes = {"read": _Lane(row_bytes, make), "write": _Lane(row_bytes, make)}
        self._row_bytes = row_bytes

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
        """Memory to media. ``inspect`` sees the page's source buffers once its bytes have been taken."""
        return self._move("write", extents, buffers, deadline, inspect)

    def abandon(self) -> None:
        """A disk hangs: what is in flight keeps its engines until it ends; other calls get new ones."""
        for lane in self._lanes.values():
            lane.abandon()

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
        direct = plan.direct
        self._metrics.count("copied_pages", plan.copied)
        kinds = np.array([mode.engine for mode in extents.modes])
        for kind in np.unique(kinds).tolist():
            rows = np.flatnonzero(direct & (kinds == kind))
            if len(rows):
                self._direct(job, kind, rows)
            rows = np.flatnonzero(~direct & (kinds == kind))
            if len(rows):
                self._bounced(job, kind, rows)
        return [Outcome(value) for value in job.outcomes.tolist()]

    def _direct(self, job: _Job, kind: str, rows: npt.NDArray[np.intp]) -> None:
        """Between disk and the caller's memory; each page is inspected as it lands."""
        buffers = job.buffers
        batch = IoBatch(
            job.extents.fds[rows],
            job.extents.offsets[rows],
            buffers.addresses[rows],
            buffers.lengths,
        )
        lengths = buffers.lengths.tolist()

        def on_done(positions: npt.NDArray[np.intp], moved: npt.NDArray[np.int64]) -> None:
            for position, count in zip(positions.tolist(), moved.tolist(), strict=True):
                page = int(rows[position])
                parts = list(zip(buffers.addresses[page].tolist(), lengths, strict=True))
                job.outcomes[page] = self._outcome(job, page, parts, count, batch.page_bytes)

        self._run(job, kind, batch, on_done)

    @staticmethod
    def _outcome(
        job: _Job, page: int, parts: list[tuple[int, int]], moved: int, wanted: int
    ) -> Outcome:
        if moved != wanted:
            if moved == NOT_TRIED:
                return Outcome.LATE
            return Outcome.FAILED if moved < 0 else Outcome.SHORT
        return Outcome.DONE if job.inspect(page, parts) else Outcome.REFUSED

    def _bounced(self, job: _Job, kind: str, rows: npt.NDArray[np.intp]) -> None:
        """Through the slab, as many pages at a time as it has rows."""
        lane = self._lanes[job.direction]
        slab = lane.slab()
        with slab.lock:
            for start in range(0, len(rows), slab.rows):
                self._bounce_group(job, kind, slab, rows[start : start + slab.rows])

    def _bounce_group(self, job: _Job, kind: str, slab: _Slab, rows: npt.NDArray[np.intp]) -> None:
        staged = slab.addresses[: len(rows)]
        batch = IoBatch(
            job.extents.fds[rows],
            job.extents.offsets[rows],
            staged[:, None],
            np.array([self._row_bytes], np.uint64),
        )
        pages, addresses = rows.tolist(), staged.tolist()
        if job.direction == "write":
            for address, page in zip(addresses, pages, strict=True):
                _copy(job.buffers, page, address, to_slab=True)
        moved = self._run(job, kind, batch, None).tolist()
        for address, page, count in zip(addresses, pages, moved, strict=True):
            parts = [(address, self._payload_bytes)]
            outcome = self._outcome(job, page, parts, count, self._row_bytes)
            if outcome is Outcome.DONE and job.direction == "read":
                _copy(job.buffers, page, address, to_slab=False)
            job.outcomes[page] = outcome

    def _run(
        self,
        job: _Job,
        kind: str,
        batch: IoBatch,
        on_done: OnDone | None,
    ) -> npt.NDArray[np.int64]:
        engine = self._lanes[job.direction].engine(kind)
        move = engine.read if job.direction == "read" else engine.write
        return move(batch, job.deadline, on_done)


def _copy(buffers: PageBuffers, page: int, slab_address: int, *, to_slab: bool) -> None:
    """Gather one page into its slab row, or scatter it back."""
    for address, length in zip(
        buffers.addresses[page].tolist(), buffers.lengths.tolist(), strict=True
    ):
        if to_slab:
            ctypes.memmove(slab_address, address, length)
        else:
            ctypes.memmove(address, slab_address, length)
        slab_address += length
