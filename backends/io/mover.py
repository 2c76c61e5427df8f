"""PageMover: moves pages between memory and media, straight where alignment allows, else through a slab.

It knows no keys and no index, and takes no lock of the engine: pins and WRITING slots protect the bytes while
they move. Invariant: when a call returns, nothing reads or writes the caller's memory any more, and a
page is DONE only if every byte of it moved and ``verify`` accepted it.

Threads: any. Reads and writes have an engine and a slab each, so a long write does not hold up a read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from flexkv_sglang.backends.io.direction import Direction, MakeEngine
from flexkv_sglang.backends.io.operations import IOV_MAX
from flexkv_sglang.backends.io.probe import make_engine
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.transfer import (
    CLOSE_TIMEOUT_S,
    IoMode,
    Outcome,
    PageTransfer,
    Positions,
)
from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.threads import Companion
from flexkv_sglang.types import MEMORY_ALIGN, SECTOR, BoolArray, PageBuffers, round_up

_OUTCOMES = tuple(Outcome)  # by value: several times quicker than Outcome(value)


def direct_pages(buffers: PageBuffers, modes: Sequence[IoMode]) -> BoolArray:
    """Which pages go straight between memory and disk; the others are copied once.

    A page is moved without a copy if the medium is opened through the page cache, or if all its
    addresses, all its buffer lengths and its total length are aligned as the medium asks.
    """
    addresses_fit = (buffers.addresses % np.uint64(MEMORY_ALIGN) == 0).all(axis=1)
    total_fits = buffers.payload_bytes % SECTOR == 0
    few = len(buffers.lengths) <= IOV_MAX
    direct = np.zeros(len(buffers), np.bool_)
    for mode, rows in by_mode(modes):
        if not mode.o_direct:
            direct[rows] = few
        elif few and total_fits and not (buffers.lengths % np.uint64(mode.segment_align)).any():
            direct[rows] = addresses_fit[rows]
    return direct


def by_mode(modes: Sequence[IoMode]) -> list[tuple[IoMode, Positions]]:
    """Each mode and the positions it has. Nearly always there is one."""
    if not modes or modes.count(modes[0]) == len(modes):
        return [(mode, np.arange(len(modes))) for mode in modes[:1]]
    return [
        (mode, np.array([i for i, other in enumerate(modes) if other == mode], np.intp))
        for mode in dict.fromkeys(modes)
    ]


class PageMover:
    """Moves pages of one payload size. ``make``: an I/O engine of a kind (tests put faults around it).

    ``modes``: how pages are moved in the directories that calls will use, for ``prepare``.
    """

    def __init__(
        self,
        payload_bytes: int,
        metrics: Metrics,
        make: MakeEngine = make_engine,
        *,
        modes: Iterable[IoMode] = (),
    ) -> None:
        self._modes = frozenset(modes)
        self._process = os.getpid()
        self._payload_bytes = payload_bytes
        self._metrics = metrics
        self._row_bytes = round_up(payload_bytes, SECTOR)
        self._traffic = ReadPriority()
        self._directions = {
            name: Direction(self._row_bytes, self._traffic, make) for name in ("read", "write")
        }

    def register_memory(self, address: int, byte_count: int) -> None:
        """Announce memory that many calls will use: the kernel may pin it, piece by piece as it is used.

        It must stay mapped at this address until ``close``. Where pinning is refused nothing changes.
        """
        for direction in self._directions.values():
            direction.register_memory(address, byte_count)

    def prepare(self, page: PageBuffers) -> None:
        """Make now what the first call with such pages would wait for, in directories of ``modes``."""
        for mode in self._modes:
            bounces = not direct_pages(page.take([0]), [mode])[0]
            for direction in self._directions.values():
                direction.prepare(mode.engine, bounces=bounces)

    def counts(self) -> dict[str, int]:
        """ "read_operations", "write_fixed_operations", ...: see ``Ring``, ``PosixIo`` and ``ReadPriority``."""
        found = {
            f"{name}_{counter}": value
            for name, direction in self._directions.items()
            for counter, value in direction.counts().items()
        }
        return found | dict(self._traffic.counts)

    def move(self, transfer: PageTransfer) -> list[Outcome]:
        """Carry the transfer out, as far as its deadline allows. Raises ``OSError`` and ``TierUnavailableError``.

        A page read through the slab reaches its target only after ``verify`` accepted it. Nobody may change the
        memory of pages that are written until this returns.
        """
        if os.getpid() != self._process:  # a forked process shares the rings and the slots
            raise TierUnavailableError(f"the files belong to process {self._process}, which forked")
        buffers, modes = transfer.buffers, transfer.modes
        assert transfer.page_bytes == self._payload_bytes, (
            transfer.page_bytes,
            self._payload_bytes,
        )
        direction = self._directions["write" if transfer.writing else "read"]
        direct = direct_pages(buffers, modes)
        self._metrics.count("copied_pages", int(len(direct) - direct.sum()))
        groups = by_mode(modes)
        if len(groups) > 1:
            return self._move_each(transfer, groups)
        for mode, _ in groups:
            rows = np.flatnonzero(direct)
            if len(rows):
                part = transfer if len(rows) == len(transfer) else transfer.part(rows)
                for engine in direction.engines(mode.engine, part):
                    engine.move(part)
                part.finish()
                transfer.outcomes[rows] = part.outcomes
            rows = np.flatnonzero(~direct)
            if len(rows):
                self._bounce(transfer, direction, mode.engine, rows)
        return [_OUTCOMES[value] for value in transfer.outcomes.tolist()]

    def _move_each(
        self, transfer: PageTransfer, groups: Sequence[tuple[IoMode, Positions]]
    ) -> list[Outcome]:
        """Disks that are used in different ways, at the same time: one that hangs does not hold up the other."""
        parts = [transfer.part(rows) for _, rows in groups]
        for part, (mode, rows) in zip(parts, groups, strict=True):
            part.modes = (mode,) * len(rows)
        others = [Companion(partial(self.move, part)) for part in parts[1:]]
        try:
            self.move(parts[0])
        finally:
            errors = [other.wait() for other in others]
        for error in filter(None, errors):
            raise error
        for part, (_, rows) in zip(parts, groups, strict=True):
            transfer.outcomes[rows] = part.outcomes
        return [_OUTCOMES[value] for value in transfer.outcomes.tolist()]

    def _bounce(
        self, transfer: PageTransfer, direction: Direction, kind: str, rows: Positions
    ) -> None:
        """Through the slab, as many pages at a time as it has rows."""
        slab = direction.slab()
        with slab.lock:
            for start in range(0, len(rows), slab.rows):
                group = rows[start : start + slab.rows]
                part = transfer.part(group, slab.addresses, self._row_bytes)
                for engine in direction.engines(kind, part):
                    engine.move(part)
                part.finish()
                transfer.outcomes[group] = part.outcomes

    def abandon(self) -> None:
        """A disk hangs: what is in flight keeps its engines until it ends; other calls get new ones."""
        self._traffic = ReadPriority()  # a read that hangs must not hold back writes for ever
        for direction in self._directions.values():
            direction.abandon(self._traffic)

    def close(self, seconds: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait ``seconds`` for running transfers and release the engines. False: some still run."""
        end = time.monotonic() + seconds
        ended = [each.close(end - time.monotonic()) for each in self._directions.values()]
        return all(ended)
