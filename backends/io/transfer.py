"""PageTransfer: one description of a call that moves pages, from the cache down to the system call.

It says which pages move, where they lie on the medium and in memory, until when, and it collects the result of each.
Two I/O engines carry transfers out: ``ring.Ring`` (io_uring) and ``posix_io.PosixIo`` (threads).
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flexkv_sglang.types import I64, U64, BoolArray, PageBuffers

NOT_TRIED = -errno.ETIME
"""Result of a page that was not submitted before the deadline."""

CLOSE_TIMEOUT_S = 6.0
"""SGLang joins its threads for 10 s when a backend is detached; a hung disk must not exceed that."""

_TURN_S = 0.25
_VERIFY_BYTES = 1 << 20  # verified in one go between two looks at the completion queue

Positions = npt.NDArray[np.intp]

Verify = Callable[[int, list[tuple[int, int]]], bool]
"""(page position, its buffers as (address, bytes)) -> accept it? Called while other pages move, from any thread."""


class Outcome(IntEnum):
    """Result of one page."""

    FAILED = 0  # an I/O error: the page may be fine next time
    SHORT = 1  # the medium holds less than a page there
    REFUSED = 2  # ``verify`` refused it
    DONE = 3  # every byte moved, and ``verify`` accepted it
    LATE = 4  # not begun before the deadline


@dataclass(frozen=True, slots=True)
class IoMode:
    """How pages of one directory are moved.

    ``segment_align``: every buffer of a zero-copy page must be a multiple of this many bytes (512 where
    the disk allows it, else 4096). ``reason``: why a better rung of the ladder was not taken, or "".
    """

    engine: str
    o_direct: bool
    segment_align: int
    reason: str = ""

    @property
    def open_flags(self) -> int:
        """Flags for every descriptor of a slot file in this directory."""
        return os.O_CLOEXEC | (os.O_DIRECT if self.o_direct else 0)


Extents = tuple[npt.NDArray[np.int32], U64, tuple[IoMode, ...]]
"""Columns ``fds``, ``offsets`` and ``modes`` of a ``PageTransfer``, as the tiers give them."""


def take_turn(lock: threading.Lock, engine: IoEngine, deadline: float) -> bool:
    """Take an engine's lock for a batch. False: its deadline has come before, or a disk hangs in the engine."""
    while not lock.acquire(timeout=max(0.0, min(_TURN_S, deadline - time.monotonic()))):
        if engine.given_up or time.monotonic() >= deadline:
            return False
    return True


def accept_all(_position: int, _buffers: list[tuple[int, int]]) -> bool:
    """A ``Verify`` that checks nothing."""
    return True


@dataclass(slots=True)
class PageTransfer:
    """``n`` pages that move between files and memory, and the result of each.

    Page ``i`` lies in the file ``fds[i]`` (int32 ``[n]``) at byte ``offsets[i]`` (uint64 ``[n]``), its buffers one
    after the other; ``modes[i]`` says how that file may be used. ``deadline``: ``time.monotonic()`` seconds.
    ``verify`` sees a page that is read after it has arrived; one that is written at any time, also before its
    bytes are taken, because its owner does not change it before the call returns.

    ``moved``: int64 ``[n]``, bytes moved, ``-errno`` or ``NOT_TRIED``; ``outcomes``: int8 ``[n]`` of ``Outcome``.
    Both are final when ``finish`` returns. Threads: ``on_complete`` and ``run_pending`` any, the rest one.

    ``flying``: bool ``[n]``, pages whose operations are under way, also those of a part. A write may be left by its
    call when its disk hangs: then ``ended`` has a result once nothing flies any more, and until then those slots belong
    to nobody. A read is never left, because the kernel could still write into its caller's memory.
    """

    fds: npt.NDArray[np.int32]
    offsets: U64
    modes: Sequence[IoMode]
    buffers: PageBuffers
    deadline: float
    verify: Verify = accept_all
    writing: bool = False
    page_bytes: int = field(init=False)
    moved: I64 = field(init=False)
    flying: BoolArray = field(init=False)  # shared by all parts
    ended: Future[None] = field(init=False, default_factory=Future)
    outcomes: npt.NDArray[np.int8] = field(init=False)
    _pages: Sequence[int] = field(init=False)  # positions as ``verify`` knows them
    _rows: Positions = field(init=False)  # the same, for ``flying``
    _addresses: list[list[int]] = field(init=False)  # buffers as ``verify`` sees them
    _lengths: list[int] = field(init=False)
    _targets: list[list[int]] | None = field(
        init=False, default=None
    )  # of pages read through a slab
    _pending: deque[int] = field(init=False)  # pages to verify; append and popleft are atomic

    def __post_init__(self) -> None:
        count = len(self.offsets)
        assert count == len(self.buffers) == len(self.fds), (count, len(self.buffers))
        self._pages = range(count)
        self._rows = np.arange(count)
        self.flying = np.zeros(count, np.bool_)
        self._addresses = self.buffers.addresses.tolist()
        self._lengths = self.buffers.lengths.tolist()
        self._start()

    def _start(self) -> None:
        count = len(self.offsets)
        self.page_bytes = self.buffers.payload_bytes
        self.moved = np.full(count, NOT_TRIED, np.int64)
        self.outcomes = np.full(count, Outcome.LATE, np.int8)
        self._pending = deque(range(count) if self.writing else ())

    def __len__(self) -> int:
        return len(self.offsets)

    def part(
        self, rows: Positions, slab_rows: U64 | None = None, row_bytes: int = 0
    ) -> PageTransfer:
        """The pages ``rows``, straight or through ``slab_rows`` (uint64 addresses of ``row_bytes`` each).

        ``verify`` sees pages in a slab cut as the caller's buffers are: what is sampled of a buffer must not depend on
        the way it took. Pages to be written are copied into the slab here; pages that are read go to the caller's
        memory once they are verified.
        """
        found = copy(self)
        found.fds, found.offsets, found.modes = self.fds[rows], self.offsets[rows], ()
        found._rows = self._rows[rows]
        found._pages = found._rows.tolist()
        addresses = [self._addresses[row] for row in rows.tolist()]
        if slab_rows is None:
            found.buffers, found._addresses = self.buffers.take(rows), addresses
        else:
            lengths = self.buffers.lengths
            staged = slab_rows[: len(rows), None]
            found.buffers = PageBuffers(staged, np.array([row_bytes], np.uint64))
            found._addresses = (staged + (np.cumsum(lengths) - lengths)).tolist()
            if self.writing:
                for source, target in zip(addresses, found._addresses, strict=True):
                    _copy(source, target, self._lengths)
            else:
                found._targets = addresses
        found._start()
        return found

    def begin(self, positions: Positions | slice) -> None:
        """Note that operations on these pages are under way from now on."""
        self.flying[self._rows[positions]] = True

    def on_complete(self, positions: Positions, moved: I64) -> None:
        """Note the final results of the pages at these positions, each once."""
        self.flying[self._rows[positions]] = False
        self.moved[positions] = moved
        whole = moved == self.page_bytes
        if not whole.all():
            bad = np.where(moved < 0, Outcome.FAILED, Outcome.SHORT)
            bad = np.where(moved == NOT_TRIED, Outcome.LATE, bad)
            self.outcomes[positions[~whole]] = bad[~whole]
            positions = positions[whole]
        if self.writing:
            self.outcomes[positions] = Outcome.DONE
        else:
            self._pending.extend(positions.tolist())

    @property
    def tried(self) -> bool:
        """Has an operation begun on any page of this part?"""
        return bool((self.moved != NOT_TRIED).any() or self.flying[self._rows].any())

    def land(self) -> None:
        """No operation of this part is under way any more, whatever of it was reported. ``ended`` stays as it is."""
        self.flying[self._rows] = False

    def settle(self) -> None:
        """Of a write that was left: nothing of this part flies any more."""
        self.flying[self._rows] = False
        if not self.flying.any():
            with suppress(InvalidStateError):  # another part has said so
                self.ended.set_result(None)

    def run_pending(self) -> bool:
        """Verify a few pages, in about the time of one operation. False if none was pending."""
        for _ in range(max(1, _VERIFY_BYTES // self.page_bytes)):
            try:
                position = self._pending.popleft()
            except IndexError:
                return False
            addresses = self._addresses[position]
            buffers = list(zip(addresses, self._lengths, strict=True))
            right = self.verify(self._pages[position], buffers)
            if not self.writing:
                if right and self._targets is not None:
                    _copy(addresses, self._targets[position], self._lengths)
                self.outcomes[position] = Outcome.DONE if right else Outcome.REFUSED
        return True

    def finish(self) -> None:
        """Verify the pages that are left, once nothing is in flight; none that did not move."""
        if self.writing:
            done = self.outcomes == Outcome.DONE
            self._pending = deque(position for position in self._pending if done[position])
        while self.run_pending():
            pass


def _copy(sources: list[int], targets: list[int], lengths: list[int]) -> None:
    for source, target, length in zip(sources, targets, lengths, strict=True):
        ctypes.memmove(target, source, length)


class IoEngine(Protocol):
    """Carries transfers out. One at a time per engine (it has its own lock); any thread may call.

    ``move`` calls ``on_complete`` for every page that was tried and ``run_pending`` while it waits; the caller calls
    ``finish`` afterwards. It returns only when nothing is in flight any more: after that nothing touches the
    caller's memory. Only a write is left when it hangs, ``OVERDUE_S`` past its deadline (see ``PageTransfer``). An
    exception of ``verify`` is raised then, too. ``register_memory`` announces memory that may be pinned; it must stay
    mapped until ``close``. ``close`` lets a running transfer begin no more operations, waits ``seconds`` for its
    end and answers whether it has ended; idempotent. ``counts``: operations and pinned bytes. ``given_up``: a disk
    hangs; who waits for its turn returns without having tried anything.
    """

    kind: str
    given_up: bool
    counts: Counter[str]

    def move(self, transfer: PageTransfer) -> None: ...
    def register_memory(self, address: int, byte_count: int) -> None: ...
    def close(self, seconds: float = CLOSE_TIMEOUT_S) -> bool: ...
