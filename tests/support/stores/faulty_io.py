"""FaultyIo: an ``IoEngine`` around a real one. On request it fails as disks and kernels do.

It never breaks the contract of an engine itself: results are per page, nothing is in flight when a call
returns, ``verify`` sees the bytes the caller will keep.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import threading
import time
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from flexkv_sglang.backends.io.transfer import NOT_TRIED, IoEngine, PageTransfer
from flexkv_sglang.types import I64, PageBuffers


class Fault(Enum):
    """Fault of one call."""

    EIO = auto()  # some pages: -EIO, not moved
    NO_SPACE = auto()  # some pages: -ENOSPC (writes)
    SHORT = auto()  # some pages: fewer bytes than asked for
    SLOW = auto()  # everything, later
    HUNG = auto()  # nothing until the deadline, then nothing was tried
    CORRUPT = auto()  # one bit of one page differs on the medium (write) or in memory (read)
    BROKEN = auto()  # the call raises OSError


WRITE_FAULTS = tuple(Fault)
READ_FAULTS = tuple(fault for fault in Fault if fault is not Fault.NO_SPACE)
SLOW_S = 0.003


@dataclass
class CallGate:
    """Holds the first call of ``direction`` until ``go_on`` is set (or ``seconds`` have passed)."""

    direction: str
    seconds: float = 5.0
    arrived: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def pass_through(self, direction: str) -> None:
        """Called at the start of every transfer."""
        if direction == self.direction and not self.arrived.is_set():
            self.arrived.set()
            self.go_on.wait(self.seconds)


@dataclass
class Faults:
    """Shared by all ``FaultyIo`` of a test: the fault of the next call, the gate, and what was injected."""

    rng: random.Random
    next: Fault | None = None
    gate: CallGate | None = None
    delayed_s: float = 0.0
    injected: dict[str, int] = field(default_factory=dict)

    def take(self, direction: str) -> Fault | None:
        """Take the fault for a call that begins now."""
        fault, self.next = self.next, None
        if fault is not None:
            name = f"{direction} {fault.name}"
            self.injected[name] = self.injected.get(name, 0) + 1
        return fault


class FaultyIo:
    """Decorator around one engine; see the module docstring."""

    def __init__(self, inner: IoEngine, faults: Faults) -> None:
        self.kind = inner.kind
        self.given_up = False
        self.counts = inner.counts
        self._inner = inner
        self._faults = faults

    def move(self, transfer: PageTransfer) -> None:
        """See ``IoEngine``."""
        faults, direction = self._faults, "write" if transfer.writing else "read"
        if faults.gate is not None:
            faults.gate.pass_through(direction)
        fault = faults.take(direction)
        if fault is Fault.BROKEN:
            raise OSError(errno.EIO, "planted")
        if fault is Fault.SLOW:
            time.sleep(SLOW_S)
            faults.delayed_s += SLOW_S
        if fault is None or fault is Fault.SLOW:
            self._inner.move(transfer)
        elif fault is Fault.HUNG:
            time.sleep(max(0.0, transfer.deadline - time.monotonic()))
        else:
            results = self._damaged(fault, transfer)
            tried = np.flatnonzero(results != NOT_TRIED)
            if len(tried):
                transfer.on_complete(tried, results[tried])

    def register_memory(self, address: int, byte_count: int) -> None:
        """See ``IoEngine``."""
        self._inner.register_memory(address, byte_count)

    def close(self, seconds: float = 6.0) -> bool:
        """See ``IoEngine``."""
        return self._inner.close(seconds)

    def _damaged(self, fault: Fault, transfer: PageTransfer) -> I64:
        rng, count = self._faults.rng, len(transfer)
        hit = sorted(rng.sample(range(count), rng.randint(1, count)))
        if fault is Fault.CORRUPT and transfer.writing:
            copy, memory = _copied(transfer)
            memory[hit[0], rng.randrange(memory.shape[1])] ^= 1 << rng.randrange(8)
            self._inner.move(copy)
            return copy.moved
        spared = [row for row in range(count) if row not in hit]
        moved = spared if fault in (Fault.EIO, Fault.NO_SPACE) else list(range(count))
        results = np.full(count, -errno.EIO, np.int64)
        if fault is Fault.NO_SPACE:
            results[:] = -errno.ENOSPC
        if moved:
            part = copy_of(transfer, np.array(moved))
            self._inner.move(part)
            results[moved] = part.moved
        if fault is Fault.SHORT:
            results[hit] = rng.randrange(transfer.page_bytes)
        if not transfer.writing and fault in (Fault.SHORT, Fault.CORRUPT):
            for row in hit:
                _spoil(transfer.buffers, row, rng)
        return results


def copy_of(
    transfer: PageTransfer, rows: np.ndarray, buffers: PageBuffers | None = None
) -> PageTransfer:
    """A transfer of some of the pages that verifies nothing; into ``buffers`` of all its pages, if given."""
    return PageTransfer(
        transfer.fds[rows],
        transfer.offsets[rows],
        (),
        (buffers or transfer.buffers).take(rows),
        transfer.deadline,
        writing=transfer.writing,
    )


def _copied(
    transfer: PageTransfer,
) -> tuple[PageTransfer, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """The transfer with its bytes in memory of its own, uint8 ``[n, page bytes]``, page-aligned."""
    size, count, lengths = transfer.page_bytes, len(transfer), transfer.buffers.lengths
    step = -(-size // 4096) * 4096
    memory = np.frombuffer(mmap.mmap(-1, step * count), np.uint8).reshape(count, step)
    starts = np.cumsum(lengths) - lengths
    bases = np.uint64(memory.ctypes.data) + np.arange(count, dtype=np.uint64) * np.uint64(step)
    addresses = bases[:, None] + starts[None, :]
    for row in range(count):
        for source, target, length in zip(
            transfer.buffers.addresses[row].tolist(),
            addresses[row].tolist(),
            lengths.tolist(),
            strict=True,
        ):
            ctypes.memmove(target, source, length)
    copy = copy_of(transfer, np.arange(count), PageBuffers(addresses, lengths))
    return copy, memory[:, :size]


def _spoil(buffers: PageBuffers, row: int, rng: random.Random) -> None:
    """Flip one bit of a page in memory."""
    part = rng.randrange(len(buffers.lengths))
    address = int(buffers.addresses[row][part]) + rng.randrange(int(buffers.lengths[part]))
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 1 << rng.randrange(8)
