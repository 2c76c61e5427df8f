"""FaultyIo: an ``IoEngine`` around a real one. On request it fails as disks and kernels do.

It never breaks the contract of an engine itself: results are per page, nothing is in flight when a call
returns, ``progress`` sees the bytes the caller will keep.
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

from flexkv_sglang.backends.io.batch import NOT_TRIED, IoBatch, IoEngine, Progress
from flexkv_sglang.types import I64


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
        self.counts = inner.counts
        self._inner = inner
        self._faults = faults

    def read(self, batch: IoBatch, deadline: float, progress: Progress | None = None) -> I64:
        """Medium to memory; see ``IoEngine``."""
        return self._run("read", batch, deadline, progress)

    def write(self, batch: IoBatch, deadline: float, progress: Progress | None = None) -> I64:
        """Memory to medium; see ``IoEngine``."""
        return self._run("write", batch, deadline, progress)

    def register_memory(self, address: int, byte_count: int) -> None:
        """See ``IoEngine``."""
        self._inner.register_memory(address, byte_count)

    def close(self) -> bool:
        """See ``IoEngine``."""
        return self._inner.close()

    def _run(
        self, direction: str, batch: IoBatch, deadline: float, progress: Progress | None
    ) -> I64:
        faults = self._faults
        if faults.gate is not None:
            faults.gate.pass_through(direction)
        fault = faults.take(direction)
        move = self._inner.read if direction == "read" else self._inner.write
        if fault is None:
            return move(batch, deadline, progress)
        if fault is Fault.BROKEN:
            raise OSError(errno.EIO, "planted")
        if fault is Fault.SLOW:
            time.sleep(SLOW_S)
            faults.delayed_s += SLOW_S
            return move(batch, deadline, progress)
        if fault is Fault.HUNG:
            time.sleep(max(0.0, deadline - time.monotonic()))
            return np.full(len(batch), NOT_TRIED, np.int64)
        results = self._damaged(fault, direction, batch, deadline)
        tried = np.flatnonzero(results != NOT_TRIED)
        if progress is not None and len(tried):
            progress.landed(tried, results[tried])
        return results

    def _damaged(self, fault: Fault, direction: str, batch: IoBatch, deadline: float) -> I64:
        rng = self._faults.rng
        hit = sorted(rng.sample(range(len(batch)), rng.randint(1, len(batch))))
        if fault is Fault.CORRUPT and direction == "write":
            copy, memory = _copied(batch)
            memory[hit[0], rng.randrange(memory.shape[1])] ^= 1 << rng.randrange(8)
            return self._inner.write(copy, deadline)
        spared = [row for row in range(len(batch)) if row not in hit]
        moved = spared if fault in (Fault.EIO, Fault.NO_SPACE) else list(range(len(batch)))
        results = np.full(len(batch), -errno.EIO, np.int64)
        if fault is Fault.NO_SPACE:
            results[:] = -errno.ENOSPC
        if moved:
            part = IoBatch(
                batch.fds[moved], batch.offsets[moved], batch.addresses[moved], batch.lengths
            )
            move = self._inner.read if direction == "read" else self._inner.write
            results[moved] = move(part, deadline)
        if fault is Fault.SHORT:
            results[hit] = rng.randrange(batch.page_bytes)
        if direction == "read" and fault in (Fault.SHORT, Fault.CORRUPT):
            for row in hit:
                _spoil(batch, row, rng)
        return results


def _copied(batch: IoBatch) -> tuple[IoBatch, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """The batch with its bytes in memory of its own, uint8 ``[n, page bytes]``, page-aligned."""
    size = batch.page_bytes
    step = -(-size // 4096) * 4096
    memory = np.frombuffer(mmap.mmap(-1, step * len(batch)), np.uint8).reshape(len(batch), step)
    starts = np.cumsum(batch.lengths) - batch.lengths
    bases = np.uint64(memory.ctypes.data) + np.arange(len(batch), dtype=np.uint64) * np.uint64(step)
    addresses = bases[:, None] + starts[None, :]
    for row in range(len(batch)):
        for source, target, length in zip(
            batch.addresses[row].tolist(),
            addresses[row].tolist(),
            batch.lengths.tolist(),
            strict=True,
        ):
            ctypes.memmove(target, source, length)
    return IoBatch(batch.fds, batch.offsets, addresses, batch.lengths), memory[:, :size]


def _spoil(batch: IoBatch, row: int, rng: random.Random) -> None:
    """Flip one bit of a page in memory."""
    part = rng.randrange(len(batch.lengths))
    address = int(batch.addresses[row][part]) + rng.randrange(int(batch.lengths[part]))
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 1 << rng.randrange(8)
